"""Weights of model folders by fragments, against the weights that transformers' own class holds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, ImageGPTConfig, ImageGPTForCausalImageModeling, PreTrainedModel

from pipeline.checkpoint.fragments import Fragment, Part
from pipeline.weights.folder_reader import FolderReader
from pipeline.weights.folder_settings import read_folder_settings

SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 17}
HEAD_WIDTH = 16


def their_model(block: str, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    if block == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=16, eos_token_id=16, colors=16, **settings))
    return ImageGPTForCausalImageModeling(ImageGPTConfig(**SHAPE, **settings))


def expected_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """In our names and shapes: ImageGPT's projections are transposed, without bias, and our attention scales itself."""
    weights = {}
    for name, value in model.state_dict().items():
        if isinstance(model, ImageGPTForCausalImageModeling):
            if name.endswith(".bias"):
                continue
            if ".c_" in name:
                value = value.T.contiguous()
            if name.endswith("attn.c_attn.weight") and not model.config.scale_attn_weights:
                value[:32] *= HEAD_WIDTH**0.5
        weights[name] = value
    return weights


@pytest.mark.parametrize(
    ("block", "settings", "form"),
    [
        ("igpt", {}, "safetensors"),
        ("igpt", {"scale_attn_weights": False}, "several files"),
        ("igpt", {}, "bin"),
        ("gpt2", {}, "safetensors"),
        ("gpt2", {"tie_word_embeddings": False}, "safetensors"),
    ],
)
def test_every_fragment_has_the_weights_of_transformers(
    block: str, settings: dict[str, object], form: str, tmp_path: Path
) -> None:
    theirs = their_model(block, **settings)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if form == "several files" else "5GB")
    if form == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    assert (tmp_path / "model.safetensors.index.json").exists() == (form == "several files")
    reader, expected = FolderReader(read_folder_settings(tmp_path)), expected_weights(theirs)
    assert reader.shapes == {name: tuple(value.shape) for name, value in expected.items()}
    draw = np.random.default_rng(0)
    for name, value in expected.items():
        assert torch.equal(reader.read(name), value), name
        for _ in range(3):
            start, stop = sorted(draw.integers(0, value.numel() + 1, 2))
            fragment = Fragment(name, tuple(value.shape), int(start), int(stop - start), 0)
            target = torch.empty(fragment.length)
            reader.fill(target, fragment, "weight")
            assert torch.equal(target, value.flatten()[start:stop]), name
    part = Part(0, 3, 1, 2, transposed=block == "gpt2")
    name = "transformer.h.1.attn.c_attn.weight"
    fragment = Fragment(name, tuple(expected[name].shape), 5, 700, 0, part)
    target = torch.empty(700)
    reader.fill(target, fragment, "weight")
    assert torch.equal(target, part.of(expected[name]).flatten()[5:705])


def test_rows_that_no_fragment_needs_are_not_read(tmp_path: Path) -> None:
    """So that no rank holds the model; a damaged value is found by the rank that needs it."""
    their_model("igpt").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    weights[name][:, 100] = torch.nan  # (in, out): row 100 of ours
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    reader = FolderReader(read_folder_settings(tmp_path))
    reader.fill(torch.empty(3200), Fragment(name, (128, 32), 0, 3200, 0), "weight")
    with pytest.raises(ValueError, match=f"has NaN or Inf in 32 of 64 values of {name}"):
        reader.fill(torch.empty(40), Fragment(name, (128, 32), 3190, 40, 0), "weight")


def test_a_tied_model_without_its_embedding(tmp_path: Path) -> None:
    their_model("gpt2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.wte.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights, such as lm_head\.weight; it must be a complete GPT2"):
        FolderReader(read_folder_settings(tmp_path))


@pytest.mark.parametrize("stored", [{"state_dict": {}}, [torch.zeros(1)]], ids=["nested", "list"])
def test_a_file_of_other_things_than_weights(stored: object, tmp_path: Path) -> None:
    their_model("igpt").config.save_pretrained(tmp_path)
    torch.save(stored, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError) as caught:
        FolderReader(read_folder_settings(tmp_path))
    assert str(caught.value) == (
        f"The weights in {tmp_path} can't be read: pytorch_model.bin has other things than weights; it must have "
        f"tensors by their names."
    )


@pytest.mark.parametrize("content", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_lists_no_files(content: str, tmp_path: Path) -> None:
    their_model("igpt").config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError) as caught:
        FolderReader(read_folder_settings(tmp_path))
    assert str(caught.value) == (
        f"The weights in {tmp_path} can't be read: model.safetensors.index.json has no weight_map, which must have the "
        f"file of each weight by its name."
    )
