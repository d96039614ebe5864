"""Fine-tuning: what it learns and writes, and invalid input."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import ImageGPTForImageClassification

from data_prep.shards.reader import ShardSet, open_shard_set
from pipeline.evaluate.cache import TaskCache
from pipeline.evaluate.classifiers.finetune_loop import epoch_order
from pipeline.evaluate.options import FineTuneOptions
from pipeline.evaluate.tasks.fine_tune import FineTune
from pipeline.model_folder.classifier import load_classifier
from pipeline.model_folder.convert import load_model_folder
from tests.pipeline.evaluate.tiny_sets import CLASSES, COLORS, random_palette, separable_images, write_shard_set

QUICK = FineTuneOptions(epochs=4, learning_rates=[0.01, 1e-6], global_size=20, reflect_crop=1)


def test_it_learns_classes_and_leaves_a_classifier(
    model_folder: Path, evaluation_of: Callable, separable: ShardSet
) -> None:
    evaluation = evaluation_of(model_folder, separable)
    before = [parameter.clone() for parameter in evaluation.model.model.parameters()]
    result = FineTune(QUICK).measure(evaluation)
    assert result["test_accuracy"] > 0.9 > 0.5 > result["majority_class_test_accuracy"]
    assert (result["learning_rate"], len(result["trials"])) == (0.01, 2)
    best = result["trials"][0]
    assert (
        best["valid_accuracy_by_epoch"][result["best_epoch"] - 1] == result["valid_accuracy"] == best["valid_accuracy"]
    )
    losses = best["train_loss_by_epoch"]
    assert losses == sorted(losses, reverse=True)
    assert (result["train_images"], result["valid_images"], result["test_images"]) == (200, 90, 100)
    assert f"{result['test_accuracy']:.1%}" in FineTune.summary(result)

    confusion, labels = np.array(result["confusion"]), evaluation.images("test", labelled=True).labels
    assert confusion.sum(1).tolist() == np.bincount(labels).tolist()
    assert confusion.trace() / 100 == result["test_accuracy"]
    for after, parameter in zip(evaluation.model.model.parameters(), before, strict=True):
        assert torch.equal(after, parameter)  # other tasks measure the model as it was

    folder = evaluation.results / result["classifier"]
    theirs = ImageGPTForImageClassification.from_pretrained(folder).eval()
    theirs.score.load_state_dict({"weight": load_file(folder / "class_head.safetensors")["score.weight"]})
    tokens = torch.from_numpy(evaluation.images("test").tokens().astype(np.int64))
    inputs = torch.cat([torch.full((100, 1), COLORS), tokens[:, :-1]], dim=1)
    with torch.no_grad():
        predicted = theirs(input_ids=inputs).logits.argmax(-1).numpy()
    assert (predicted == labels).mean() == result["test_accuracy"]
    assert load_classifier(folder).facts["train_images"] == 200
    assert (evaluation.results / result["figure"]).is_file()


def scale_queries(model: ImageGPTForImageClassification, folded: bool) -> None:
    """Moves the scale of attention into the queries' weights, where a folder has it, or out of them, for training."""
    for block in model.transformer.h:
        assert block.attn.scale_attn_weights == folded
        block.attn.scale_attn_weights = not folded
        block.attn.c_attn.weight.data[:, : block.attn.embed_dim] *= block.attn.head_dim ** (-0.5 if folded else 0.5)


def test_its_steps_are_adams_on_the_joint_loss(model_folder: Path, evaluation_of: Callable, shards: ShardSet) -> None:
    """Six batches without changes of images: losses and weights, by transformers' own modules."""
    evaluation = evaluation_of(model_folder, train_images=48)
    options = FineTuneOptions(epochs=1, learning_rates=[1e-3], global_size=8, flip=False, reflect_crop=0, clip_norm=1.0)
    result = FineTune(options).measure(evaluation)

    theirs = ImageGPTForImageClassification.from_pretrained(model_folder, num_labels=CLASSES).eval()
    scale_queries(theirs, folded=False)
    head = torch.nn.Linear(16, COLORS, bias=False)
    head.load_state_dict({"weight": load_model_folder(model_folder).model.lm_head.weight})
    torch.nn.init.zeros_(theirs.score.weight)
    # Biases are no parameters of ours.
    names = {name for name, _ in load_model_folder(model_folder).model.named_parameters()} | {"score.weight"}
    trained = {name: p for name, p in [*theirs.named_parameters(), ("lm_head.weight", head.weight)] if name in names}
    optimizer = torch.optim.Adam(trained.values(), 1e-3, betas=(0.9, 0.95))
    images = evaluation.images("train", labelled=True)
    losses = []
    for places in epoch_order(0, 48, 48, 1).reshape(6, 8):
        tokens, labels = (torch.from_numpy(of[places].astype(np.int64)) for of in (images.tokens(), images.labels))
        inputs = torch.cat([torch.full((8, 1), COLORS), tokens[:, :-1]], dim=1)
        states = theirs.transformer(input_ids=inputs).last_hidden_state
        loss = torch.nn.functional.cross_entropy(head(states).flatten(0, 1), tokens.flatten())
        loss = loss + torch.nn.functional.cross_entropy(theirs.score(states.mean(1)), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert result["trials"][0]["train_loss_by_epoch"] == [pytest.approx(np.mean(losses), rel=1e-5)]
    saved = load_file(evaluation.results / "fine_tuned" / "model.safetensors")
    saved |= load_file(evaluation.results / "fine_tuned" / "class_head.safetensors")
    scale_queries(theirs, folded=True)
    for name, parameter in trained.items():
        # Adam's first step is the rate times a sign, so a gradient of rounding alone may go either way.
        apart = (saved[name] - parameter.detach()).abs()
        assert (apart > 2e-5).float().mean() < 0.01, name


def test_without_generative_loss_the_color_head_is_unchanged(
    model_folder: Path, evaluation_of: Callable, separable: ShardSet
) -> None:
    evaluation = evaluation_of(model_folder, separable)
    result = FineTune(replace(QUICK, generative_weight=0.0, learning_rates=[0.01])).measure(evaluation)
    assert result["test_accuracy"] > 0.9
    assert result["trials"][0]["train_loss_by_epoch"][0] < np.log(CLASSES)  # no nats of colors in it
    model = load_classifier(evaluation.results / "fine_tuned").loaded.model
    assert torch.equal(model.lm_head.weight, evaluation.model.model.lm_head.weight)
    assert not torch.equal(model.transformer.wte.weight, evaluation.model.model.transformer.wte.weight)


def test_a_masked_model_votes_over_masks(masked_folder: Path, evaluation_of: Callable, separable: ShardSet) -> None:
    evaluation = evaluation_of(masked_folder, separable)
    result = FineTune(replace(QUICK, learning_rates=[0.01])).measure(evaluation)
    assert result["masks"] == len(result["test_accuracy_by_mask"]) == 5
    assert result["test_accuracy_by_mask"][0] == result["test_accuracy"] > 0.9
    assert result["ensembled_test_accuracy"] > 0.9
    assert "by vote over 5 masks" in FineTune.summary(result)
    assert load_classifier(evaluation.results / "fine_tuned").loaded.mask_probability == 0.15


def test_a_class_that_a_split_lacks_is_logged(
    model_folder: Path, evaluation_of: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    splits = {name: separable_images(60, seed) for seed, name in enumerate(("train", "valid", "test"))}
    tokens, labels = splits["test"]
    splits["test"] = tokens[labels != 2], labels[labels != 2]
    other = open_shard_set(write_shard_set(tmp_path / "other", splits, random_palette()))
    result = FineTune(replace(QUICK, epochs=1, learning_rates=[0.01])).measure(evaluation_of(model_folder, other))
    assert "fine_tune: no labelled image in test of class 2" in caplog.text
    assert result["absent_classes"]["test"] == ["class 2"]
    assert result["test_accuracy_by_class"][2] is None
    assert result["confusion"][2] == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rates": []}, r"fine_tune\.learning_rates is \[\]"),
        (
            {"learning_rates": [0.1, -1.0]},
            r"fine_tune\.learning_rates is \[0\.1, -1\.0\]; it must be .* numbers above 0",
        ),
        ({"learning_rates": [0.1, 0.1]}, r"each learning rate may be listed only once"),
        ({"generative_weight": -1}, r"fine_tune\.generative_weight is -1; it must be at least 0"),
        ({"epochs": 0}, r"fine_tune\.epochs is 0; it must be at least 1"),
        ({"patience": -1}, r"fine_tune\.patience is -1; it must be at least 0"),
        ({"global_size": 0}, r"fine_tune\.global_size is 0"),
        ({"clip_norm": -0.1}, r"fine_tune\.clip_norm is -0\.1"),
    ],
)
def test_invalid_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTuneOptions(**options)


def test_what_cannot_be_fine_tuned(model_folder: Path, evaluation_of: Callable, tmp_path: Path) -> None:
    evaluation = evaluation_of(model_folder)
    with pytest.raises(ValueError, match=r"fine_tune\.reflect_crop is 6; for images of 6x6 it must be less than 6"):
        FineTune(replace(QUICK, reflect_crop=6)).measure(evaluation)
    unlabelled = {name: separable_images(20, 0, 20 * (name == "valid")) for name in ("train", "valid", "test")}
    other = open_shard_set(write_shard_set(tmp_path / "other", unlabelled, random_palette()))
    with pytest.raises(ValueError, match="has no labelled images in its split valid"):
        FineTune(QUICK).measure(evaluation_of(model_folder, other))
    with pytest.raises(ValueError, match=r"learning_rates is 1e\+20; at each the loss became NaN or Inf"):
        FineTune(replace(QUICK, learning_rates=[1e20])).measure(
            replace(evaluation, cache=TaskCache.of_task(tmp_path, "lost", ""))
        )
    assert not (evaluation.results / "fine_tuned").exists()
