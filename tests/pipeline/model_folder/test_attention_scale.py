"""The scale of attention in ImageGPT folders: versions of transformers before 5.21 round it for most head widths."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, ImageGPTForCausalImageModeling

from pipeline.config import ModelConfig
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import gpt2_config
from pipeline.model_folder.convert import load_model_folder, save_model_folder

COLORS, SIDE, WIDTH = 16, 4, 48
PALETTE = np.random.default_rng(0).uniform(-1, 1, (COLORS, 3)).astype(np.float32)
TOKENS = torch.randint(COLORS, (3, SIDE**2), generator=torch.Generator().manual_seed(1))
HEADS = (1, 2, 3)
"""Heads of width 48, 24 and 16: only the last has a root that is a whole number."""


def trained(heads: int) -> GPT2LMHeadModel:
    """A model in which attention matters."""
    config = gpt2_config(ModelConfig(layers=2, width=WIDTH, heads=heads, resolution=SIDE), COLORS)
    model = build_model(config)
    initialize(model, 0)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.2)
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def norm(states: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return states / np.sqrt((states**2).mean(-1, keepdims=True) + epsilon) * weight


def logits_of_old_transformers(folder: Path) -> np.ndarray:
    """ImageGPT in float64, with the rounded divisor of transformers before 5.21."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: value.double().numpy() for name, value in load_file(folder / "model.safetensors").items()}
    width, heads, epsilon = config["n_embd"], config["n_head"], config["layer_norm_epsilon"]
    divisor = int((width // heads) ** 0.5) if config["scale_attn_weights"] else 1
    hidden = np.triu(np.full((SIDE**2, SIDE**2), -np.inf), 1)
    states = weights["transformer.wte.weight"][TOKENS.numpy()] + weights["transformer.wpe.weight"]  # (B, T, D)
    for layer in range(config["n_layer"]):
        block = {name.split(".", 3)[3]: weights[name] for name in weights if name.startswith(f"transformer.h.{layer}.")}
        packed = norm(states, block["ln_1.weight"], epsilon) @ block["attn.c_attn.weight"] + block["attn.c_attn.bias"]
        queries, keys, values = (
            part.reshape(*part.shape[:2], heads, -1).swapaxes(1, 2) for part in np.split(packed, 3, axis=-1)
        )  # (B, H, T, d)
        scores = queries @ keys.swapaxes(2, 3) / divisor + hidden
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (shares / shares.sum(-1, keepdims=True) @ values).swapaxes(1, 2).reshape(states.shape)
        states = states + mixed @ block["attn.c_proj.weight"] + block["attn.c_proj.bias"]
        inner = norm(states, block["ln_2.weight"], epsilon) @ block["mlp.c_fc.weight"] + block["mlp.c_fc.bias"]
        states = states + inner / (1 + np.exp(-1.702 * inner)) @ block["mlp.c_proj.weight"] + block["mlp.c_proj.bias"]
    return norm(states, weights["transformer.ln_f.weight"], epsilon) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("heads", HEADS)
def test_every_version_of_transformers_computes_the_same(heads: int, tmp_path: Path) -> None:
    model = trained(heads)
    save_model_folder(model, model.config, PALETTE, tmp_path / "model")
    installed = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(logits(installed), logits(model), atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits_of_old_transformers(tmp_path / "model"), logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("heads", HEADS)
def test_folders_of_both_kinds_are_the_same_model(heads: int, tmp_path: Path) -> None:
    """One of ours from before the scale was in the weights, and one of now: both train and compute alike."""
    model = trained(heads)
    save_model_folder(model, model.config, PALETTE, tmp_path / "now")
    config = json.loads((tmp_path / "now/config.json").read_text())
    assert config["scale_attn_weights"] is False
    theirs = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "now")
    theirs.config.scale_attn_weights = True
    with torch.no_grad():
        for block in theirs.transformer.h:
            block.attn.c_attn.weight[:, :WIDTH] *= math.sqrt(WIDTH / heads)
    theirs.save_pretrained(tmp_path / "before")
    (tmp_path / "before/preprocessor_config.json").write_text((tmp_path / "now/preprocessor_config.json").read_text())

    rounded = (logits_of_old_transformers(tmp_path / "before") - logits(model).numpy()).max()
    assert (rounded > 0.01) == (heads != 3), "what old versions compute of such a folder"
    for name in ("now", "before"):
        loaded = load_model_folder(tmp_path / name)
        assert loaded.config.to_dict() == model.config.to_dict()
        torch.testing.assert_close(logits(loaded.model), logits(model), atol=1e-4, rtol=0)
        for key, value in loaded.model.state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[key], atol=0, rtol=1e-6)


def test_a_stock_block_keeps_its_scale(tmp_path: Path) -> None:
    """GPT-2 divides right in all versions; a folder that does not scale is read as it is."""
    shape = {"n_layer": 2, "n_embd": WIDTH, "n_head": 1, "n_positions": SIDE**2, "vocab_size": COLORS + 1}
    for scale in (True, False):
        theirs = GPT2LMHeadModel(GPT2Config(**shape, scale_attn_weights=scale, initializer_range=0.3)).eval()
        theirs.save_pretrained(tmp_path / "theirs")
        path = tmp_path / "theirs/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"colors": COLORS}))
        loaded = load_model_folder(tmp_path / "theirs")
        assert loaded.config.scale_attn_weights is scale
        torch.testing.assert_close(logits(loaded.model), logits(theirs), atol=1e-4, rtol=0)
        save_model_folder(loaded.model, loaded.config, PALETTE, tmp_path / f"ours-{scale}")
        again = load_model_folder(tmp_path / f"ours-{scale}")
        torch.testing.assert_close(logits(again.model), logits(theirs), atol=1e-4, rtol=0)
