"""Conversion between our weights and Hugging Face model folders: ImageGPT (the paper's block) or GPT-2 (stock block).

A folder appears only after transformers has loaded it and computed the same logits. The names of the weights are the
same on both sides. ImageGPT stores projections as (in, out) with a bias; ours are `nn.Linear` without bias, (out, in).
Its attention divides by the square root of the head width, but transformers before 5.21 rounds the root down, which is
wrong unless the width is a square. So our ImageGPT folders have `scale_attn_weights: false` and the scale in the
queries' weights: every version computes the same. A folder of either kind is read as a model that scales.

A masked model has bidirectional attention, but transformers would load it as a causal model. Its folder therefore has
our own `model_type`, which transformers refuses, and our names and shapes.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
from pipeline.model.gpt import build_model
from pipeline.model.gpt_config import fixed_settings
from pipeline.model_folder.files import WEIGHTS, WEIGHTS_INDEX, may_replace
from pipeline.model_folder.lazy_weights import Weights, check_finite, fetching_model, stored_weights, write_weights

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
"""Settings with the same meaning in GPT2Config and ImageGPTConfig."""

QUERIES_KEYS_VALUES = ".attn.c_attn.weight"
PROJECTION = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
OLD_MASKS = re.compile(r"\.attn\.(bias|masked_bias)$")
"""Causal masks that old versions of transformers stored with the weights."""
FROM_DISK = {"transformer": "disk", "lm_head": "cpu"}
"""A device map of transformers: the trunk's weights are read from disk as the model runs."""
LOGITS_TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model folder."""

    model: GPT2LMHeadModel
    """fp32 on the CPU, in evaluation mode."""
    config: GPT2Config
    palette: np.ndarray | None
    """float32 (V, 3) in [-1, 1]; None if the folder has none."""
    resolution: int
    """Side of the images in pixels."""
    block: str
    mask_probability: float | None = None
    """Probability that a pixel is masked, for a masked model; None for a model of the next color."""


def save_model_folder(
    model: nn.Module,
    config: GPT2Config,
    palette: np.ndarray,
    folder: Path,
    *,
    weights: Weights | None = None,
    add_files: Callable[[Path], None] = lambda temporary: None,
) -> None:
    """Writes `folder`: fp32 weights, configurations, the palette (V, 3), and the files of `add_files`.

    weights: the weights of a model that fetches them as it runs; then only one file's weights are in memory at a time.

    Before the folder appears, transformers loads it and must compute the model's logits within 1e-4. An existing model
    folder is replaced atomically. Raises ValueError if the palette does not fit the model, if a weight has NaN or Inf,
    or if `folder` has other content, RuntimeError if the logits differ.
    """
    folder = folder.resolve()
    if palette.shape != (config.colors, 3):
        raise ValueError(f"The palette has shape {palette.shape}; the model needs ({config.colors}, 3).")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a new folder, or a model folder to replace.")
    if not may_replace(folder):
        raise ValueError(f"{folder} has other files; give a new folder, or a model folder to replace.")
    model_type = MASKED_TYPE if is_masked(config) else TYPE_OF_BLOCK[config.block]
    with atomic_folder(folder) as temporary:
        _write_configs(model_type, config, palette, temporary)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        if weights is None:
            weights = {name: value.detach().to("cpu", torch.float32) for name, value in model.state_dict().items()}
        convert = partial(_to_imagegpt, config) if model_type == "imagegpt" else _unchanged
        write_weights(weights, shapes, convert, temporary)
        add_files(temporary)
        _check_logits(model, config, model_type, temporary)


def load_model_folder(folder: Path) -> LoadedModel:
    """Loads an ImageGPT folder (the released OpenAI models too), a GPT-2 folder with a palette, or a masked model.

    Raises ValueError, one sentence, if the folder has another model, or is damaged or incomplete.
    """
    settings, palette = _read_settings(folder), _read_palette(folder)
    model_type = settings["model_type"]
    if model_type == MASKED_TYPE:
        return _load_masked(folder, settings, palette)
    try:
        config = CONFIGS[model_type].from_dict(settings)
    except Exception as error:  # transformers raises exceptions of its own for wrong types
        raise ValueError(
            f"{folder / 'config.json'} is not a valid {model_type} configuration: {_one_line(error)}."
        ) from error
    resolution = _check_fits(config, palette, folder)
    theirs = _read_model(CLASSES[model_type], config, folder)
    block = BLOCK_OF_TYPE[model_type]
    ours = GPT2Config(**_shared(config), **fixed_settings(block, config.vocab_size - 1))
    if block == "igpt":
        ours.scale_attn_weights = True  # _imported_state takes the scale out of the queries' weights
    state = _imported_state(theirs, block, folder)
    del theirs
    with torch.device("meta"):
        model = build_model(ours)
    model.load_state_dict(state, assign=True)
    return LoadedModel(model.eval(), ours, palette, resolution, block)


def is_masked(config: GPT2Config) -> bool:
    """Whether a model predicts masked pixels from all other pixels."""
    return not getattr(config, "is_causal", True)


def _load_masked(folder: Path, settings: dict[str, Any], palette: np.ndarray | None) -> LoadedModel:
    try:
        config = GPT2Config.from_dict({key: value for key, value in settings.items() if key != "model_type"})
        probability = float(config.mask_probability)
        model = build_model(config)
    except Exception as error:  # transformers raises exceptions of its own for wrong types
        raise ValueError(
            f"{folder / 'config.json'} is not a valid {MASKED_TYPE} configuration: {_one_line(error)}."
        ) from error
    resolution = _check_fits(config, palette, folder)
    try:
        load_torch_model(model, folder if (folder / WEIGHTS_INDEX).is_file() else folder / WEIGHTS, strict=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"The weights in {folder} can't be read: {_one_line(error)}.") from error
    for name, value in model.state_dict().items():
        check_finite(name, value, folder)
    return LoadedModel(model.eval(), config, palette, resolution, config.block, probability)


def _shared(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in SHARED_SETTINGS}


# Writing


def _write_configs(model_type: str, config: GPT2Config, palette: np.ndarray, folder: Path) -> None:
    side = int(np.sqrt(config.n_positions))
    processor = ImageGPTImageProcessorPil(
        clusters=palette.astype(np.float32).tolist(), size={"height": side, "width": side}, do_convert_rgb=True
    )
    processor.save_pretrained(folder)
    if model_type == MASKED_TYPE:
        write_json(folder / "config.json", config.to_dict() | {"model_type": MASKED_TYPE})
        return
    settings = fixed_settings(config.block, config.colors)
    del settings["attn_implementation"]
    theirs = CONFIGS[model_type](**_shared(config), **settings | {"use_cache": True})
    if model_type == "imagegpt":
        theirs.scale_attn_weights = False
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


def _unchanged(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield name, value


def _to_imagegpt(config: GPT2Config, name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """One of our weights with the name and the shape of ImageGPT, and queries that need no scale."""
    if name.endswith(QUERIES_KEYS_VALUES) and config.scale_attn_weights:
        value = _scaled_queries(value, config, -0.5)
    if PROJECTION.search(name):
        yield name.removesuffix("weight") + "bias", value.new_zeros(value.shape[0])
        value = value.t().contiguous()  # (out, in) to (in, out)
    yield name, value


def _scaled_queries(value: torch.Tensor, config: PreTrainedConfig, power: float) -> torch.Tensor:
    """The weight (3D, D) of queries, keys and values, with the queries times a power of the head width."""
    queries, others = value.split([config.n_embd, 2 * config.n_embd])
    return torch.cat([queries * (config.n_embd // config.n_head) ** power, others])


def _check_logits(model: nn.Module, config: GPT2Config, model_type: str, folder: Path) -> None:
    """Raises RuntimeError unless transformers' class computes our logits for a random image.

    transformers has no class with bidirectional attention, so a masked model is loaded with our class instead.
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
        raise RuntimeError(f"The exported model's logits differ from ours by {difference:.2g}; nothing was written.")


# Reading


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give a model folder that `python -m pipeline export` wrote.")
    settings = read_json(path)
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    if model_type not in (*CLASSES, MASKED_TYPE):
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


def _read_model(
    kind: type[PreTrainedModel], config: PreTrainedConfig, folder: Path, device_map: dict[str, str] | None = None
) -> PreTrainedModel:
    """Loads transformers' model in fp32. Raises ValueError if a weight is missing, unexpected, or of a wrong shape."""
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
        ("has weights whose shapes differ from its config.json", [key[0] for key in report["mismatched_keys"]]),
        ("has unexpected weights", unexpected),
    ):
        if names:
            raise ValueError(f"{folder} {problem}, such as {min(names)}; it must be a complete {kind.__name__}.")
    return model


def _imported_state(theirs: PreTrainedModel, block: str, folder: Path) -> dict[str, torch.Tensor]:
    """The weights in our shapes. Raises ValueError for NaN and Inf, and if a bias of the paper's block is not zero."""
    state: dict[str, torch.Tensor] = {}
    for name, value in theirs.state_dict().items():
        check_finite(name, value, folder)
        if block == "igpt" and name.endswith(".bias"):
            if value.any():
                raise ValueError(
                    f"{folder} has a bias that is not zero, {name} (largest {value.abs().max():.2g}); "
                    f"the paper's block has no biases, and in Image GPT checkpoints they are zero."
                )
            continue
        if block == "igpt" and PROJECTION.search(name):
            value = value.t().contiguous()  # (in, out) to (out, in)
        if block == "igpt" and name.endswith(QUERIES_KEYS_VALUES) and not theirs.config.scale_attn_weights:
            value = _scaled_queries(value, theirs.config, 0.5)
        state[name] = value
    if state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr():
        state["lm_head.weight"] = state["lm_head.weight"].clone()  # tied in transformers, not in our model
    return state


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses progress bars and warnings of transformers and accelerate; the errors raised here are complete."""
    previous, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(previous)
        if bars:
            transformers_logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
