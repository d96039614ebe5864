"""Our weights <-> Hugging Face model folders: ImageGPT for the paper's block, GPT-2 for the stock block.

A folder is published only after transformers has loaded it and given our logits. The names of the weights are the same
on both sides. ImageGPT keeps its projections as (in, out) with a bias; ours are bias-free `nn.Linear`, (out, in).

A model of hidden colors attends both ways, and transformers would read it as one that sees only what came before. Its
folder has a `model_type` of ours, which transformers refuses, and our names and shapes.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import load_torch_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.utils import logging as transformers_logging

from data_prep.common.files import atomic_folder, read_json, write_json
from pipeline.model.gpt import build_model, fixed_settings
from pipeline.model_folder.files import WEIGHTS, WEIGHTS_INDEX, may_replace
from pipeline.model_folder.lazy_weights import Weights, fetching_model, stored_weights, write_weights

CLASSES = {"imagegpt": ImageGPTForCausalImageModeling, "gpt2": GPT2LMHeadModel}
CONFIGS = {"imagegpt": ImageGPTConfig, "gpt2": GPT2Config}
BLOCK_OF_TYPE = {"imagegpt": "igpt", "gpt2": "gpt2"}
TYPE_OF_BLOCK = {block: model_type for model_type, block in BLOCK_OF_TYPE.items()}
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
"""What GPT2Config and ImageGPTConfig both have and mean alike."""

PROJECTION = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
OLD_MASKS = re.compile(r"\.attn\.(bias|masked_bias)$")
"""Causal masks that old versions of transformers stored among the weights."""
FROM_DISK = {"transformer": "disk", "lm_head": "cpu"}
"""transformers' word for weights that are read as the model runs; not all may be."""
LOGITS_TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}


@dataclass(frozen=True)
class LoadedModel:
    """A model folder's content, ready to use."""

    model: GPT2LMHeadModel
    """fp32 on the CPU, in evaluation mode."""
    config: GPT2Config
    palette: np.ndarray | None
    """float32 (V, 3) in [-1, 1]; None where the folder has none."""
    resolution: int
    """Pixels a side."""
    block: str
    mask_probability: float | None = None
    """Of a color to be hidden, for a model of hidden colors; None for one of the next color."""


def save_model_folder(
    model: nn.Module,
    config: GPT2Config,
    palette: np.ndarray,
    folder: Path,
    *,
    weights: Weights | None = None,
    add_files: Callable[[Path], None] = lambda temporary: None,
) -> None:
    """Writes `folder`: fp32 weights, configurations, the palette (V, 3), and what `add_files` puts beside them.

    weights: those of a model that fetches them as it runs. No more than one file's are in memory then.

    transformers reads it back and must give the model's logits within 1e-4 before the folder takes its place; a model
    folder that stood there is replaced, whole by whole. Raises ValueError if the palette does not fit the model or if
    `folder` holds something else, RuntimeError if the logits differ.
    """
    folder = folder.resolve()
    if palette.shape != (config.colors, 3):
        raise ValueError(f"The palette has shape {palette.shape}; the model needs ({config.colors}, 3).")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a new folder, or a model folder to replace.")
    if not may_replace(folder):
        raise ValueError(f"{folder} is not empty and is no model folder; give a new one, or a model folder to replace.")
    model_type = MASKED_TYPE if is_masked(config) else TYPE_OF_BLOCK[config.block]
    with atomic_folder(folder) as temporary:
        _write_configs(model_type, config, palette, temporary)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        if weights is None:
            weights = {name: value.detach().to("cpu", torch.float32) for name, value in model.state_dict().items()}
        write_weights(weights, shapes, _to_imagegpt if model_type == "imagegpt" else _as_it_is, temporary)
        add_files(temporary)
        _check_logits(model, config, model_type, temporary)


def load_model_folder(folder: Path) -> LoadedModel:
    """Reads an ImageGPT folder (OpenAI's released ones too) or a GPT-2 folder over a palette.

    Raises ValueError, one sentence, if the folder is not such a model's, or is damaged or incomplete.
    """
    settings, palette = _read_settings(folder), _read_palette(folder)
    model_type = settings["model_type"]
    if model_type == MASKED_TYPE:
        return _load_masked(folder, settings, palette)
    try:
        config = CONFIGS[model_type].from_dict(settings)
    except Exception as error:  # transformers checks types with exceptions of its own
        raise ValueError(f"{folder / 'config.json'} is no {model_type} configuration: {_one_line(error)}.") from error
    resolution = _check_fits(config, palette, folder)
    theirs = _read_model(CLASSES[model_type], config, folder)
    block = BLOCK_OF_TYPE[model_type]
    ours = GPT2Config(**_shared(config), **fixed_settings(block, config.vocab_size - 1))
    state = _imported_state(theirs, block, folder)
    del theirs
    with torch.device("meta"):
        model = build_model(ours)
    model.load_state_dict(state, assign=True)
    return LoadedModel(model.eval(), ours, palette, resolution, block)


def is_masked(config: GPT2Config) -> bool:
    """Whether a model of ours predicts hidden colors, from all others."""
    return not getattr(config, "is_causal", True)


def _load_masked(folder: Path, settings: dict[str, Any], palette: np.ndarray | None) -> LoadedModel:
    try:
        config = GPT2Config.from_dict({key: value for key, value in settings.items() if key != "model_type"})
        probability = float(config.mask_probability)
        model = build_model(config)
    except Exception as error:  # transformers checks types with exceptions of its own
        raise ValueError(f"{folder / 'config.json'} is no {MASKED_TYPE} configuration: {_one_line(error)}.") from error
    resolution = _check_fits(config, palette, folder)
    try:
        load_torch_model(model, folder if (folder / WEIGHTS_INDEX).is_file() else folder / WEIGHTS, strict=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"The weights in {folder} can't be read: {_one_line(error)}.") from error
    return LoadedModel(model.eval(), config, palette, resolution, config.block, probability)


def _shared(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in SHARED_SETTINGS}


# Writing


def _write_configs(model_type: str, config: GPT2Config, palette: np.ndarray, folder: Path) -> None:
    side = int(np.sqrt(config.n_positions))
    processor = ImageGPTImageProcessorPil(
        clusters=palette.astype(np.float32).tolist(), size={"height": side, "width": side}
    )
    processor.save_pretrained(folder)
    if model_type == MASKED_TYPE:
        write_json(folder / "config.json", config.to_dict() | {"model_type": MASKED_TYPE})
        return
    settings = fixed_settings(config.block, config.colors)
    del settings["attn_implementation"]
    theirs = CONFIGS[model_type](**_shared(config), **settings | {"use_cache": True})
    theirs.architectures = [CLASSES[model_type].__name__]
    theirs.dtype = "float32"
    theirs.save_pretrained(folder)

    generation = GenerationConfig(
        bos_token_id=config.colors,
        do_sample=True,
        top_k=0,
        max_length=config.n_positions + 1,  # SOS and an image
        suppress_tokens=[config.colors] if model_type == "gpt2" else None,  # ImageGPT's head has no SOS column
    )
    generation.save_pretrained(folder)


def _as_it_is(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield name, value


def _to_imagegpt(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A weight of ours by Hugging Face's name and in its shape."""
    if PROJECTION.search(name):
        yield name.removesuffix("weight") + "bias", value.new_zeros(value.shape[0])
        value = value.t().contiguous()  # (out, in) to (in, out)
    yield name, value


def _check_logits(model: nn.Module, config: GPT2Config, model_type: str, folder: Path) -> None:
    """Raises RuntimeError unless transformers' own class gives our logits for a random image.

    No class of theirs attends both ways as the paper's block does: a model of hidden colors is read back by ours.
    """
    if model_type == MASKED_TYPE:
        theirs: nn.Module = fetching_model(config, stored_weights(folder))
    else:
        theirs_config = CONFIGS[model_type].from_pretrained(folder)
        theirs = _read_model(CLASSES[model_type], theirs_config, folder, device_map=FROM_DISK)
    weights = next(model.parameters())
    device = "cpu" if weights.is_meta else weights.device
    ours = model if weights.dtype == torch.float32 else copy.deepcopy(model).float()
    generator = torch.Generator("cpu").manual_seed(0)
    image = torch.randint(config.colors, (1, config.n_positions), generator=generator, device="cpu")  # (1, T)
    image[:, 0] = config.colors  # SOS
    was_training = ours.training
    ours.eval()
    with torch.no_grad():
        expected = ours(input_ids=image.to(device)).logits.cpu()  # (1, T, V)
        found = theirs(input_ids=image).logits
    ours.train(was_training)
    if not torch.allclose(found, expected, **LOGITS_TOLERANCE):
        difference = (found - expected).abs().max().item()
        raise RuntimeError(f"The exported model's logits differ from ours by {difference:.2g}; nothing was published.")


# Reading


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give a model folder, as `python -m pipeline export` writes it.")
    settings = read_json(path)
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    if model_type not in (*CLASSES, MASKED_TYPE):
        raise ValueError(f"{path} has model_type {model_type!r}; imagegpt, gpt2 and {MASKED_TYPE} can be read.")
    if settings.get("add_cross_attention"):
        raise ValueError(f"{path} has add_cross_attention true; only models without it can be read.")
    return settings


def _read_palette(folder: Path) -> np.ndarray | None:
    """The palette of preprocessor_config.json, float32 (V, 3); None if there is no such file or no palette in it."""
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
        raise ValueError(f"{path} has clusters that are not numbers; colors are three numbers in [-1, 1].") from error
    if palette.ndim != 2 or palette.shape[1] != 3 or not (np.abs(palette) <= 1).all():
        raise ValueError(f"{path} has clusters of shape {palette.shape}; colors are three numbers in [-1, 1].")
    return palette


def _check_fits(config: PreTrainedConfig, palette: np.ndarray | None, folder: Path) -> int:
    """The resolution. Raises ValueError if the configuration is not that of a model over a palette."""
    path, colors = folder / "config.json", config.vocab_size - 1
    if palette is not None and len(palette) != colors:
        raise ValueError(
            f"{path} has vocab_size {config.vocab_size}, but the folder's palette has {len(palette)} colors; "
            f"the vocabulary is the colors and one start token."
        )
    is_text = config.model_type == "gpt2" and palette is None and getattr(config, "colors", 512) != colors
    if is_text:
        raise ValueError(
            f"{path} has vocab_size {config.vocab_size} and the folder has no palette; a model of images has 513 "
            f"tokens, or clusters in preprocessor_config.json."
        )
    resolution = int(np.sqrt(config.n_positions))
    if resolution**2 != config.n_positions:
        raise ValueError(f"{path} has n_positions {config.n_positions}; it must be a square, one position a pixel.")
    if config.n_embd % config.n_head:
        raise ValueError(f"{path} has n_embd {config.n_embd}; it must be a multiple of n_head, {config.n_head}.")
    if config.activation_function not in ACT2FN:
        raise ValueError(f"{path} has activation_function {config.activation_function!r}, which transformers has not.")
    return resolution


def _read_model(
    kind: type[PreTrainedModel], config: PreTrainedConfig, folder: Path, device_map: dict[str, str] | None = None
) -> PreTrainedModel:
    """transformers' own model, fp32. Raises ValueError if a weight is missing, misshapen or of another model."""
    try:
        with _quiet():
            model, report = kind.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                device_map=device_map,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"The weights in {folder} can't be read: {_one_line(error)}.") from error
    unexpected = [name for name in report["unexpected_keys"] if not OLD_MASKS.search(name)]
    for problem, names in (
        ("lacks weights", report["missing_keys"]),
        ("has weights of another shape than its config.json says", [key[0] for key in report["mismatched_keys"]]),
        ("has weights that the model does not know", unexpected),
    ):
        if names:
            raise ValueError(f"{folder} {problem}, such as {min(names)}; it must be a whole {kind.__name__}.")
    return model


def _imported_state(theirs: PreTrainedModel, block: str, folder: Path) -> dict[str, torch.Tensor]:
    """The weights in our shapes. Raises ValueError if the paper's block would have to leave out a bias."""
    state: dict[str, torch.Tensor] = {}
    for name, value in theirs.state_dict().items():
        if block == "igpt" and name.endswith(".bias"):
            if value.any():
                raise ValueError(
                    f"{folder} has a bias that is not zero, {name} (largest {value.abs().max():.2g}); "
                    f"the paper's block has no biases, and Image GPT checkpoints hold zeros."
                )
            continue
        if block == "igpt" and PROJECTION.search(name):
            value = value.t().contiguous()  # (in, out) to (out, in)
        state[name] = value
    if state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr():
        state["lm_head.weight"] = state["lm_head.weight"].clone()  # tied there, not here
    return state


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings from transformers and accelerate: the errors raised here say what goes wrong."""
    former, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(former)
        if bars:
            transformers_logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
