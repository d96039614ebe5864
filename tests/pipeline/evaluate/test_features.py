"""Features against transformers' own hidden states; the choice of pictures."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Model, ImageGPTModel

from data_prep.shards import ShardSet
from pipeline.evaluate.features import pooled_features
from pipeline.evaluate.inputs import choose_pictures

HUGGING_FACE = {"igpt": ImageGPTModel, "gpt2": GPT2Model}


@pytest.mark.parametrize("block", ["igpt", "gpt2"])
def test_features_are_the_hidden_states_after_ln_1(
    block: str, model_folders: dict[str, Path], evaluation_of: Callable, tmp_path: Path
) -> None:
    evaluation = evaluation_of(model_folders[block], batch_size=48)  # the last batch is smaller
    pictures = evaluation.pictures("test")
    features = pooled_features(evaluation, pictures, tmp_path / "test.npy")  # (L+1, N, D)

    reference = HUGGING_FACE[block].from_pretrained(model_folders[block]).eval()
    tokens = torch.from_numpy(pictures.tokens().astype(np.int64))
    inputs = torch.cat([torch.full((len(tokens), 1), evaluation.shards.colors), tokens[:, :-1]], dim=1)
    with torch.no_grad():
        states = reference(input_ids=inputs, output_hidden_states=True).hidden_states  # the last is after ln_f
        expected = [layer.ln_1(state).mean(1) for layer, state in zip(reference.h, states[:-1], strict=True)]
        expected.append(states[-1].mean(1))
    assert features.shape == (4, 130, 16)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, torch.stack(expected).numpy(), atol=1e-5)


def test_the_model_has_no_hooks_left(model_folder: Path, evaluation_of: Callable, tmp_path: Path) -> None:
    evaluation = evaluation_of(model_folder)
    pooled_features(evaluation, evaluation.pictures("valid"), tmp_path / "valid.npy")
    assert not any(module._forward_hooks for module in evaluation.model.model.modules())


def test_pictures_are_chosen_by_seed_and_without_unlabelled_ones(shards: ShardSet) -> None:
    first, again, other = (choose_pictures(shards, "train", limit=40, seed=seed, labelled=True) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.indices, again.indices)
    assert not np.array_equal(first.indices, other.indices)
    assert len(np.unique(first.indices)) == 40
    assert first.indices.min() >= 7  # the first seven are unlabelled
    tokens, labels = shards.split("train").gather(first.indices)
    np.testing.assert_array_equal(first.tokens(), tokens)
    np.testing.assert_array_equal(first.labels, labels)


def test_a_limit_beyond_the_split_takes_all(shards: ShardSet) -> None:
    assert len(choose_pictures(shards, "test", limit=1000, seed=0)) == 130
    assert len(choose_pictures(shards, "test", limit=None, seed=0, labelled=True)) == 127
