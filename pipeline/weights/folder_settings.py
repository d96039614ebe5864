"""What a model folder says about its model: config.json and the palette, without its weights.

A folder is an ImageGPT of transformers (the paper's block; the released OpenAI models too), a GPT-2 with a palette, or
a masked model of this pipeline.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import GPT2Config, ImageGPTConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from data_prep.common.files import read_json
from pipeline.model.gpt_config import fixed_settings

CONFIGS = {"imagegpt": ImageGPTConfig, "gpt2": GPT2Config}
BLOCK_OF_TYPE = {"imagegpt": "igpt", "gpt2": "gpt2"}
MASKED_TYPE = "image_gpt_masked"
SHARED_SETTINGS = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
    "initializer_range",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
)
"""Settings with the same meaning in GPT2Config and ImageGPTConfig."""


@dataclass(frozen=True)
class FolderSettings:
    """A model folder without its weights."""

    folder: Path
    model_type: str
    config: GPT2Config
    """Of our model."""
    palette: np.ndarray | None
    """float32 (V, 3) in [-1, 1]; None if the folder has none."""
    resolution: int
    """Side of the images in pixels."""
    scales_queries: bool
    """Whether the queries' weights have the scale of the attention, which our model applies itself."""
    ties_head: bool
    """Whether the head may be stored as the embedding."""
    mask_probability: float | None
    """Probability that a pixel is masked, for a masked model; None for a model of the next color."""


def read_folder_settings(folder: Path) -> FolderSettings:
    """Raises ValueError, one sentence, if the folder has another kind of model, or contradicts itself."""
    settings, palette = _read_settings(folder), _read_palette(folder)
    model_type, masked = settings["model_type"], settings["model_type"] == MASKED_TYPE
    try:
        if masked:
            theirs = GPT2Config.from_dict({key: value for key, value in settings.items() if key != "model_type"})
        else:
            theirs = CONFIGS[model_type].from_dict(settings)
        probability = float(theirs.mask_probability) if masked else None
    except Exception as error:  # transformers raises exceptions of its own for wrong types
        raise ValueError(
            f"{folder / 'config.json'} is not a valid {model_type} configuration: {one_line(error)}."
        ) from error
    resolution = _check_fits(theirs, palette, folder)
    if masked:
        return FolderSettings(folder, model_type, theirs, palette, resolution, False, False, probability)
    block = BLOCK_OF_TYPE[model_type]
    ours = GPT2Config(**shared_settings(theirs), **fixed_settings(block, theirs.vocab_size - 1))
    ties_head = block == "gpt2" and theirs.tie_word_embeddings
    scales_queries = block == "igpt" and not theirs.scale_attn_weights
    if block == "igpt":
        ours.scale_attn_weights = True
    return FolderSettings(folder, model_type, ours, palette, resolution, scales_queries, ties_head, None)


def shared_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings with the same meaning in GPT2Config and ImageGPTConfig."""
    return {key: getattr(config, key) for key in SHARED_SETTINGS}


def one_line(error: Exception) -> str:
    """An error's message as the end of a sentence."""
    return " ".join(str(error).split()).rstrip(".")


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give a model folder that `python -m pipeline export` wrote.")
    settings = read_json(path)
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    if model_type not in (*CONFIGS, MASKED_TYPE):
        raise ValueError(f"{path} has model_type {model_type!r}; it must be imagegpt, gpt2 or {MASKED_TYPE}.")
    if settings.get("add_cross_attention"):
        raise ValueError(f"{path} has add_cross_attention true; it must be false.")
    return settings


def _read_palette(folder: Path) -> np.ndarray | None:
    """The palette in preprocessor_config.json, float32 (V, 3); None if there is no such file or no palette in it."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    settings = read_json(path)
    clusters = settings.get("clusters") if isinstance(settings, dict) else None
    if clusters is None:
        return None
    try:
        palette = np.asarray(clusters, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has clusters that are not numbers; each must be three numbers in [-1, 1].") from error
    if palette.ndim != 2 or palette.shape[1] != 3 or not (np.abs(palette) <= 1).all():
        raise ValueError(f"{path} has clusters of shape {palette.shape}; each must be three numbers in [-1, 1].")
    return palette


def _check_fits(config: PreTrainedConfig, palette: np.ndarray | None, folder: Path) -> int:
    """The resolution. Raises ValueError if the configuration is not of an image model that matches the palette."""
    path, colors = folder / "config.json", config.vocab_size - 1
    if palette is not None and len(palette) != colors:
        raise ValueError(
            f"{path} has vocab_size {config.vocab_size}, but the palette has {len(palette)} colors; "
            f"vocab_size must be the number of colors plus 1 for the start token."
        )
    is_text = config.model_type == "gpt2" and palette is None and getattr(config, "colors", 512) != colors
    if is_text:
        raise ValueError(
            f"{path} has vocab_size {config.vocab_size} and the folder has no palette; an image model has vocab_size "
            f"513, or clusters in preprocessor_config.json."
        )
    resolution = int(np.sqrt(config.n_positions))
    if resolution**2 != config.n_positions:
        raise ValueError(
            f"{path} has n_positions {config.n_positions}; it must be a square number, one position per pixel."
        )
    if config.n_embd % config.n_head:
        raise ValueError(f"{path} has n_embd {config.n_embd}; it must be a multiple of n_head, {config.n_head}.")
    if config.activation_function not in ACT2FN:
        raise ValueError(
            f"{path} has activation_function {config.activation_function!r}, which transformers does not have."
        )
    return resolution
