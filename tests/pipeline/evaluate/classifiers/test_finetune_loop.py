"""The training loop against a plain loop: order, end, and restarts."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.evaluate.cache import TaskCache
from pipeline.evaluate.classifiers.finetune_loop import Batch, Training, best_of, epoch_order, search, train
from pipeline.evaluate.context import Evaluation
from pipeline.evaluate.options import Recipe

PLAIN = Recipe(epochs=3, patience=0, global_size=20, flip=False, reflect_crop=0)


class Counter(nn.Module):
    """Classifies by color counts in float64, with one candidate per learning rate."""

    def __init__(self, candidates: int = 1) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(3, 24, dtype=torch.float64) for _ in range(candidates))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        counts = nn.functional.one_hot(tokens, 24).double().mean(1)  # (B, V)
        return torch.stack([counts @ weight.T for weight in self.weights], dim=1)  # (B, K, C)


def training_of(
    evaluation: Evaluation, rates: tuple[float, ...] = (0.5,), name: str = "counter", **more: object
) -> Training:
    images = {split: evaluation.images(split, labelled=True) for split in ("train", "valid")}
    module = Counter(len(rates))

    def losses(wrapped: nn.Module, batch: Batch) -> torch.Tensor:
        logits = wrapped(batch.tokens)  # (B, K, C)
        labels = batch.labels[:, None].expand(logits.shape[:2])  # (B, K)
        return nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")

    def accuracies() -> np.ndarray:
        tokens = torch.from_numpy(images["valid"].tokens().astype(np.int64))
        message = module(tokens).argmax(-1).numpy()
        return (message == images["valid"].labels[:, None]).mean(0)

    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(module.weights, rates, strict=True)]
    values = {"optimizer": torch.optim.Adam(groups), "losses": losses, "accuracies": accuracies, **more}
    return Training(name=name, module=module, images=images["train"], **values)


def by_hand(
    evaluation: Evaluation, epochs: int, rate: float, size: int, clip: float = 0.0, cosine: bool = False
) -> tuple:
    """The loss of each epoch and the weights (3, 24) of each: the loop without anything around it, in float64."""
    images = evaluation.images("train", labelled=True)
    counts = np.stack([np.bincount(tokens, minlength=24) for tokens in images.tokens()]) / 36
    features, labels = torch.tensor(counts), torch.tensor(images.labels, dtype=torch.long)
    weight = torch.zeros(3, 24, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], rate)
    losses, weights, step = [], [], 0
    steps = epochs * -(-len(labels) // size)
    for epoch in range(epochs):
        order = epoch_order(0, len(labels), len(labels), epoch + 1)
        total = 0.0
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            if cosine:
                optimizer.param_groups[0]["lr"] = rate * (1 + np.cos(np.pi * step / steps)) / 2
            loss = nn.functional.cross_entropy(features[chosen] @ weight.T, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_([weight], clip)
            optimizer.step()
            total += loss.item() * len(chosen)
            step += 1
        losses.append(total / len(order))
        weights.append(weight.detach().clone().numpy())
    return losses, weights


@pytest.mark.parametrize(("clip", "cosine"), [(0.0, False), (0.05, True)])
def test_the_loop_is_the_plain_one(model_folder: Path, evaluation_of: Callable, clip: float, cosine: bool) -> None:
    """Micro-batches of 7, the last global batch smaller: only sums are rounded otherwise."""
    evaluation = evaluation_of(model_folder, batch_size=7)
    training = training_of(evaluation, clip_norm=clip, cosine=cosine)
    record = train(evaluation, training, PLAIN)
    losses, weights = by_hand(evaluation, 3, 0.5, 20, clip, cosine)
    np.testing.assert_allclose(np.array(record.losses)[:, 0], losses, rtol=1e-9)
    np.testing.assert_allclose(training.module.weights[0].detach(), weights[record.best[0] - 1], rtol=1e-6)


def test_candidates_do_not_touch_each_other(model_folder: Path, evaluation_of: Callable) -> None:
    evaluation = evaluation_of(model_folder)
    rates = (0.5, 0.01, 1e6)  # the last one is lost, and the others must not be
    together = train(evaluation, training_of(evaluation, rates), PLAIN)
    for number, rate in enumerate(rates[:2]):
        alone = train(evaluation, training_of(evaluation, (rate,), name=f"alone-{number}"), PLAIN)
        assert [losses[number] for losses in together.losses] == pytest.approx(
            [losses[0] for losses in alone.losses], rel=1e-12
        )
    assert together.best[1] < 2


def test_every_pass_reads_every_image_once_in_an_order_of_its_own() -> None:
    epochs = [epoch_order(0, 10, 10, epoch) for epoch in (1, 2)]
    for order in epochs:
        assert sorted(order) == list(range(10))
    assert not np.array_equal(*epochs)
    assert not np.array_equal(epochs[0], epoch_order(1, 10, 10, 1))
    parts = np.concatenate([epoch_order(0, 10, 7, epoch) for epoch in (1, 2, 3)])  # epochs of 7 images out of 10
    np.testing.assert_array_equal(parts[:20], np.concatenate(epochs))
    assert len(epoch_order(0, 3, 10, 2)) == 10  # more than three passes


def test_it_ends_when_validation_no_longer_improves(model_folder: Path, evaluation_of: Callable) -> None:
    evaluation = evaluation_of(model_folder)
    accuracies_by_epoch = iter([0.2, 0.5, 0.4, 0.5, 0.9])
    seen = []

    def accuracies() -> np.ndarray:
        seen.append([weight.detach().clone() for weight in training.module.weights])
        return np.array([next(accuracies_by_epoch)])

    training = training_of(evaluation, accuracies=accuracies)
    record = train(evaluation, training, replace(PLAIN, epochs=50, patience=2))
    assert len(record) == 4
    assert (record.best, record.valid_accuracy) == ((2, 0), 0.5)
    assert torch.equal(training.module.weights[0], seen[1][0])  # the weights of the best epoch


def noting(batches: dict, losses: Callable, wrapped: nn.Module, batch: Batch) -> torch.Tensor:
    """The losses; leaves in `batches` what was read, by epoch and number."""
    for index, tokens in zip(batch.indices, batch.tokens, strict=True):
        batches[batch.epoch, index] = tokens.numpy()
    return losses(wrapped, batch)


def test_augmentation_depends_on_seed_and_epoch_alone(model_folder: Path, evaluation_of: Callable) -> None:
    evaluation = evaluation_of(model_folder, batch_size=9)
    recipe = replace(PLAIN, flip=True, reflect_crop=2, epochs=2)
    read: dict[str, dict] = {}
    for name, size in (("nine", 9), ("four", 4)):
        training = training_of(evaluation, name=name)
        losses = partial(noting, read.setdefault(name, {}), training.losses)
        sized = replace(evaluation, sizes=replace(evaluation.sizes, batch_size=size))
        train(sized, replace(training, losses=losses), recipe)
    assert len(read["nine"]) == 2 * 323
    for key, tokens in read["nine"].items():
        np.testing.assert_array_equal(tokens, read["four"][key])
    images = evaluation.images("train", labelled=True)
    originals = dict(zip(images.indices, images.tokens(), strict=True))
    changed = [not np.array_equal(tokens, originals[index]) for (_, index), tokens in read["nine"].items()]
    again = [not np.array_equal(read["nine"][1, index], read["nine"][2, index]) for index in images.indices]
    assert np.mean(changed) > 0.9 and np.mean(again) > 0.9
    single: dict = {}  # one image, whose place in the order is always the same
    evaluation = evaluation_of(model_folder, train_images=1)
    training = training_of(evaluation, name="single")
    losses = partial(noting, single, training.losses)
    train(evaluation, replace(training, losses=losses), replace(recipe, epochs=6))
    assert len({tokens.tobytes() for tokens in single.values()}) > 3


class Killed(BaseException):
    """Of the process."""


def killed_after(training: Training, epochs: int) -> Training:
    """Dies in the next epoch's validation."""
    done = []

    def accuracies() -> np.ndarray:
        if len(done) == epochs:
            raise Killed
        done.append(None)
        return training.accuracies()

    return replace(training, accuracies=accuracies)


def test_a_killed_training_goes_on_with_the_same_bits(
    model_folder: Path, evaluation_of: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = evaluation_of(model_folder)
    uninterrupted = training_of(evaluation, (0.5, 0.01), cosine=True)
    expected = train(replace(evaluation, cache=TaskCache.of_task(tmp_path, "uninterrupted", "")), uninterrupted, PLAIN)
    with pytest.raises(Killed):
        train(evaluation, killed_after(training_of(evaluation, (0.5, 0.01), cosine=True), 2), PLAIN)
    again = training_of(evaluation, (0.5, 0.01), cosine=True)
    caplog.clear()
    assert train(evaluation, again, PLAIN) == expected
    assert "counter: resumes after epoch 2" in caplog.text
    for ours, theirs in zip(again.module.weights, uninterrupted.module.weights, strict=True):
        assert torch.equal(ours, theirs)
    assert (
        train(evaluation, killed_after(training_of(evaluation, (0.5, 0.01)), 0), PLAIN) == expected
    )  # nothing is left


@pytest.mark.parametrize("pattern", ["state.npz", "epoch-*.npz"])
def test_a_damaged_state_is_logged_and_trained_again(
    pattern: str, model_folder: Path, evaluation_of: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = evaluation_of(model_folder)
    expected = train(evaluation, training_of(evaluation), PLAIN)
    (file,) = (evaluation.cache.folder / "counter").glob(pattern)
    file.write_bytes(file.read_bytes()[:50])
    caplog.clear()
    assert train(evaluation, training_of(evaluation), PLAIN) == expected
    assert f"{file} can't be read; its content is recomputed" in caplog.text


def test_a_state_of_an_earlier_version_is_trained_again(
    model_folder: Path, evaluation_of: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = evaluation_of(model_folder)
    folder = evaluation.cache.folder / "counter"
    folder.mkdir(parents=True)
    (folder / "state.pt").touch()
    (folder / "epoch-0001.safetensors").touch()
    message = "counter: its cached state is of an earlier version; training starts again"
    for times in (1, 0):  # nothing is logged once it is trained
        train(evaluation, training_of(evaluation), PLAIN)
        assert caplog.text.count(message) == times
        caplog.clear()


def test_the_best_rate_is_taken(model_folder: Path, evaluation_of: Callable) -> None:
    evaluation = evaluation_of(model_folder)
    rates = [1e-9, 0.5, 1e-8, float("inf")]
    module, trials = search(
        evaluation, rates, lambda rate: training_of(evaluation, (rate,), name=f"rate-{rate:g}"), PLAIN
    )
    assert [trial["learning_rate"] for trial in trials] == rates
    assert trials[3]["train_loss_by_epoch"] == [None]  # NaN becomes None, and training ends
    best = best_of(trials)
    assert best["learning_rate"] == 0.5
    assert best["valid_accuracy"] == max(best["valid_accuracy_by_epoch"]) > trials[0]["valid_accuracy"]
    _, weights = by_hand(evaluation, 3, 0.5, 20)
    np.testing.assert_allclose(module.weights[0].detach(), weights[best["best_epoch"] - 1], rtol=1e-6)


def test_losses_that_diverge_at_every_learning_rate() -> None:
    lost = {"learning_rate": 100.0, "valid_accuracy": 0.0, "train_loss_by_epoch": [None]}
    with pytest.raises(ValueError, match=r"learning_rates is 100; at each the loss became NaN or Inf"):
        best_of([lost])
