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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    ImageGPTForCausalImageModeling,
    ImageGPTImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from data_prep.common.files import atomic_folder, write_json
from pipeline.model.gpt import build_model
from pipeline.model.gpt_config import fixed_settings
from pipeline.model_folder.lazy_weights import Weights, fetching_model, stored_weights, write_weights
from pipeline.weights.folder_reader import OLD_MASKS, PROJECTION, QUERIES_KEYS_VALUES, FolderReader, scaled_queries
from pipeline.weights.folder_settings import (
    BLOCK_OF_TYPE,
    CONFIGS,
    MASKED_TYPE,
    one_line,
    read_folder_settings,
    shared_settings,
)
from pipeline.weights.model_files import may_replace

CLASSES = {"imagegpt": ImageGPTForCausalImageModeling, "gpt2": GPT2LMHeadModel}
TYPE_OF_BLOCK = {block: model_type for model_type, block in BLOCK_OF_TYPE.items()}
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
    stored = read_folder_settings(folder)
    weights = FolderReader(stored)
    with torch.device("meta"):
        model = build_model(stored.config)
    model.load_state_dict({name: weights.read(name) for name in weights.shapes}, assign=True)
    block = stored.config.block
    return LoadedModel(model.eval(), stored.config, stored.palette, stored.resolution, block, stored.mask_probability)


def is_masked(config: GPT2Config) -> bool:
    """Whether a model predicts masked pixels from all other pixels."""
    return not getattr(config, "is_causal", True)


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
    theirs = CONFIGS[model_type](**shared_settings(config), **settings | {"use_cache": True})
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
        value = scaled_queries(value, config, -0.5)
    if PROJECTION.search(name):
        yield name.removesuffix("weight") + "bias", value.new_zeros(value.shape[0])
        value = value.t().contiguous()  # (out, in) to (in, out)
    yield name, value


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
        raise ValueError(f"The weights in {folder} can't be read: {one_line(error)}.") from error
    unexpected = [name for name in report["unexpected_keys"] if not OLD_MASKS.search(name)]
    for problem, names in (
        ("lacks weights", report["missing_keys"]),
        ("has weights whose shapes differ from its config.json", [key[0] for key in report["mismatched_keys"]]),
        ("has unexpected weights", unexpected),
    ):
        if names:
            raise ValueError(f"{folder} {problem}, such as {min(names)}; it must be a complete {kind.__name__}.")
    return model


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
