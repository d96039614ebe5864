"""Tiny shard sets and model folders that the fixtures and tests write."""

from pathlib import Path

import numpy as np
import torch

from data_prep.common.files import write_json
from data_prep.palette.codec import palette_sha256, save_palette
from data_prep.shards.format import FORMAT, VERSION, shard_name
from pipeline.config import ModelConfig
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import gpt2_config
from pipeline.model_folder.convert import save_model_folder
from tests.data_prep.small_data import write_shard

RESOLUTION, COLORS, CLASSES = 6, 24, 3


def random_palette(colors: int = COLORS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (colors, 3)).astype(np.float32)


def random_images(count: int, seed: int, unlabelled: int = 0, preference: float = 1.6) -> tuple[np.ndarray, np.ndarray]:
    """Tokens uint16 (count, T) of classes that prefer some colors, and labels int32; the first ones unlabelled."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    weights = np.ones((CLASSES, COLORS))
    for label in range(CLASSES):
        weights[label, label * 8 : label * 8 + 8] = preference
    tokens = np.stack([random.choice(COLORS, RESOLUTION**2, p=weights[n] / weights[n].sum()) for n in labels])
    labels[:unlabelled] = -1
    return tokens.astype(np.uint16), labels.astype(np.int32)


def separable_images(count: int, seed: int, unlabelled: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Like random_images, with classes that differ in their color counts."""
    return random_images(count, seed, unlabelled, preference=6.0)


def write_shard_set(
    folder: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]], palette: np.ndarray, resolution: int = RESOLUTION
) -> Path:
    """A shard set of the given tokens and labels, in records of 50 images."""
    manifest: dict = {
        "format": FORMAT,
        "version": VERSION,
        "source": {"name": "dots"},
        "resolution": resolution,
        "classes": [f"class {number}" for number in range(CLASSES)],
        "palette": {"colors": len(palette), "sha256": palette_sha256(palette)},
        "splits": {},
    }
    for name, (tokens, labels) in splits.items():
        records = [(tokens[start : start + 50], labels[start : start + 50]) for start in range(0, len(tokens), 50)]
        shard = write_shard(folder / shard_name(name, 0), records)
        manifest["splits"][name] = {"images": len(tokens), "shards": [shard]}
    save_palette(folder / "palette.npy", palette)
    write_json(folder / "shards.json", manifest)
    return folder


def write_model(folder: Path, block: str = "igpt", resolution: int = RESOLUTION, objective: str = "next_color") -> Path:
    """A model folder with random weights, the head's too: nothing in it is zero that training would change."""
    shape = ModelConfig(layers=3, width=16, heads=2, resolution=resolution, block=block)
    config = gpt2_config(shape, COLORS, objective)
    if objective == "masked_color":
        config.mask_probability = 0.15
    model = build_model(config)
    initialize(model, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = torch.Generator().manual_seed(len(name))
            noise = torch.randn(parameter.shape, generator=random)
            if "lm_head" in name:
                parameter.copy_(noise * 0.5)
            elif ".ln_" in name and "weight" in name:
                parameter.add_(noise * 0.3)
    save_model_folder(model, config, random_palette(), folder)
    return folder
