"""Features against transformers' own hidden states; the choice of images."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Model, ImageGPTModel

from data_prep.shards.reader import ShardSet
from pipeline.evaluate import cache as cache_module
from pipeline.evaluate.cache import CachedArray
from pipeline.evaluate.context import Evaluation, choose_images
from pipeline.evaluate.features.pooled import pooled_features
from pipeline.model.objectives import IGNORED

HUGGING_FACE = {"igpt": ImageGPTModel, "gpt2": GPT2Model}


@pytest.mark.parametrize("block", ["igpt", "gpt2"])
def test_features_are_the_hidden_states_after_ln_1(
    block: str, model_folders: dict[str, Path], evaluation_of: Callable
) -> None:
    evaluation = evaluation_of(model_folders[block], batch_size=48)  # the last batch is smaller
    images = evaluation.images("test")
    features = pooled_features(evaluation, images)  # (L+1, N, D)

    reference = HUGGING_FACE[block].from_pretrained(model_folders[block]).eval()
    tokens = torch.from_numpy(images.tokens().astype(np.int64))
    inputs = torch.cat([torch.full((len(tokens), 1), evaluation.shards.colors), tokens[:, :-1]], dim=1)
    with torch.no_grad():
        states = reference(input_ids=inputs, output_hidden_states=True).hidden_states  # the last is after ln_f
        expected = [layer.ln_1(state).mean(1) for layer, state in zip(reference.h, states[:-1], strict=True)]
        expected.append(states[-1].mean(1))
    assert features.shape == (4, 130, 16)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, torch.stack(expected).numpy(), atol=1e-5)


def test_the_traps_of_the_public_tutorial_are_far_outside_the_tolerance(
    model_folder: Path, evaluation_of: Callable
) -> None:
    """Without SOS every color sits one position off; states pooled before the norm are others. Both in every layer."""
    evaluation = evaluation_of(model_folder)
    images = evaluation.images("test")
    features = pooled_features(evaluation, images)  # (L+1, N, D)
    reference = ImageGPTModel.from_pretrained(model_folder).eval()
    tokens = torch.from_numpy(images.tokens().astype(np.int64))
    inputs = torch.cat([torch.full((len(tokens), 1), evaluation.shards.colors), tokens[:, :-1]], dim=1)
    norms = [*(layer.ln_1 for layer in reference.h), torch.nn.Identity()]  # the last state is after ln_f
    with torch.no_grad():
        without_sos = reference(input_ids=tokens, output_hidden_states=True).hidden_states
        before_norm = reference(input_ids=inputs, output_hidden_states=True).hidden_states[:-1]
        wrong = [norm(state).mean(1).numpy() for norm, state in zip(norms, without_sos, strict=True)]
        wrong += [state.mean(1).numpy() for state in before_norm]
    for layer, trap in zip([0, 1, 2, 3, 0, 1, 2], wrong, strict=True):
        assert np.abs(features[layer] - trap).mean() > 1e-3  # the tolerance is 1e-5


def test_the_model_has_no_hooks_left(model_folder: Path, evaluation_of: Callable) -> None:
    evaluation = evaluation_of(model_folder)
    pooled_features(evaluation, evaluation.images("valid"))
    assert not any(module._forward_hooks for module in evaluation.model.model.modules())


class Counted:
    """Counts the images that a model reads, and may be made to fail after some."""

    def __init__(self, evaluation: Evaluation, fails_after: int | None = None) -> None:
        self.read = 0
        self._fails_after = fails_after
        self._hook = evaluation.model.model.transformer.register_forward_pre_hook(self._count)

    def _count(self, _module: object, inputs: tuple[torch.Tensor]) -> None:
        if self._fails_after is not None and self.read >= self._fails_after:
            raise KeyboardInterrupt
        self.read += len(inputs[0])


def test_features_are_computed_once_for_all_tasks(model_folder: Path, evaluation_of: Callable) -> None:
    first, later = evaluation_of(model_folder), evaluation_of(model_folder)
    counted = [Counted(first), Counted(later)]
    features = [pooled_features(evaluation, evaluation.images("test")) for evaluation in (first, later)]
    np.testing.assert_array_equal(*features)
    assert [counter.read for counter in counted] == [130, 0]
    pooled_features(later, choose_images(later.shards, "test", limit=20, seed=0))  # other images
    assert counted[1].read == 20


def test_another_model_has_features_of_its_own(model_folders: dict[str, Path], evaluation_of: Callable) -> None:
    igpt, gpt2 = (evaluation_of(model_folders[block]) for block in ("igpt", "gpt2"))
    features = [pooled_features(evaluation, evaluation.images("test")) for evaluation in (igpt, gpt2)]
    assert not np.array_equal(*features)


def test_a_killed_extraction_goes_on(
    model_folder: Path, evaluation_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "SECONDS_BETWEEN_RECORDS", 0.0)
    expected = evaluation_of(model_folder, batch_size=20, features="elsewhere")
    expected = np.array(pooled_features(expected, expected.images("test")))
    killed = evaluation_of(model_folder, batch_size=20)
    Counted(killed, fails_after=60)
    with pytest.raises(KeyboardInterrupt):
        pooled_features(killed, killed.images("test"))
    again = evaluation_of(model_folder, batch_size=20)
    counted = Counted(again)
    np.testing.assert_array_equal(pooled_features(again, again.images("test")), expected)
    assert counted.read == 130 - 60
    assert sorted(path.suffix for path in again.features.iterdir() if path.suffix != ".lock") == [".json", ".npy"]


def test_a_note_that_was_cut_off_counts_for_nothing(tmp_path: Path) -> None:
    cache = CachedArray(tmp_path, "test")
    cache.record_batches(0, [0, 20])
    with (tmp_path / "test.batches" / "rank-0").open("a") as file:
        file.write("\n12")  # of 120;
    cache.record_batches(0, [40])
    cache.record_batches(1, [60])
    assert cache.finished_batches() == {0, 20, 40, 60}


def test_tasks_of_an_array_wait_for_each_other(
    model_folder: Path, evaluation_of: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """While another process holds the file, nothing is computed; afterwards it is there."""
    first, later = evaluation_of(model_folder), evaluation_of(model_folder)
    pooled_features(first, first.images("test"))
    (lock,) = first.features.glob(".*.lock")
    words = "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
    words += "print('held', flush=True); time.sleep(1)"
    holder = subprocess.Popen([sys.executable, "-c", words, str(lock)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    pooled_features(later, later.images("test"))
    assert holder.wait() == 0
    assert "waiting for another command that writes" in caplog.text


def test_a_damaged_cache_is_logged_and_recomputed(
    model_folder: Path, evaluation_of: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = evaluation_of(model_folder)
    images = evaluation.images("test")
    expected = np.array(pooled_features(evaluation, images))
    (file,) = evaluation.features.glob("*.npy")
    content = bytearray(file.read_bytes())
    for damaged in (content[:-7] + bytes([content[-7] ^ 1]) + content[-6:], content[:999], b""):
        file.write_bytes(damaged)
        np.testing.assert_array_equal(pooled_features(evaluation, images), expected)
        assert f"{file} does not match its digest" in caplog.text
        caplog.clear()
    file.with_suffix(".json").write_text("{")
    np.testing.assert_array_equal(pooled_features(evaluation, images), expected)
    assert "does not match its digest" in caplog.text


def test_hidden_colors_are_drawn_by_image_and_draw(masked_folder: Path, evaluation_of: Callable) -> None:
    """The features are computed from the masked images: plain GPT-2 modules under an explicit mask, all else seen."""
    evaluation = evaluation_of(masked_folder, batch_size=48)
    images = evaluation.images("test")
    model, tokens = evaluation.model.model, torch.from_numpy(images.tokens().astype(np.int64))
    for draw in (0, 1):
        inputs, targets = evaluation.inputs_and_targets(tokens, images.indices, draw)
        masked = targets != IGNORED
        assert masked.float().mean() == pytest.approx(0.15, abs=0.02)
        assert (inputs[masked] == evaluation.shards.colors).all() and torch.equal(inputs[~masked], tokens[~masked])
        assert torch.equal(targets[masked], tokens[masked])
        with torch.no_grad():
            states = model.transformer(inputs, output_hidden_states=True).hidden_states
            expected = [
                block.ln_1(state).mean(1) for block, state in zip(model.transformer.h, states[:-1], strict=True)
            ]
            expected.append(states[-1].mean(1))
        features = pooled_features(evaluation, images, draw)
        np.testing.assert_allclose(features, torch.stack(expected).numpy(), atol=1e-5)
    assert not np.array_equal(pooled_features(evaluation, images, 0), features)


def test_images_are_chosen_by_seed_and_without_unlabelled_ones(shards: ShardSet) -> None:
    first, again, other = (choose_images(shards, "train", limit=40, seed=seed, labelled=True) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.indices, again.indices)
    assert not np.array_equal(first.indices, other.indices)
    assert len(np.unique(first.indices)) == 40
    assert first.indices.min() >= 7  # the first seven are unlabelled
    tokens, labels = shards.split("train").gather(first.indices)
    np.testing.assert_array_equal(first.tokens(), tokens)
    np.testing.assert_array_equal(first.labels, labels)


def test_a_limit_beyond_the_split_takes_all(shards: ShardSet) -> None:
    assert len(choose_images(shards, "test", limit=1000, seed=0)) == 130
    assert len(choose_images(shards, "test", limit=None, seed=0, labelled=True)) == 127
