"""Models and files whose weights are never all in memory: weights are fetched as modules run, and written one by one.

A model of 1.4 billion parameters takes 5.5 GB in fp32, one of 6.8 billion 27 GB; a login node may have less.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.model.gpt import build_model
from pipeline.weights.folder_reader import check_finite
from pipeline.weights.model_files import WEIGHTS_INDEX

Weights = Mapping[str, torch.Tensor]
"""fp32 tensors on the CPU, by name; each may be read from disk on access."""
Convert = Callable[[str, torch.Tensor], Iterator[tuple[str, torch.Tensor]]]
"""Converts one of our weights to the stored form: one or more named tensors."""
FILE_SIZE = "5GB"
"""Larger models are split into several files; one file at a time is in memory."""


def fetching_model(config: GPT2Config, weights: Weights) -> GPT2LMHeadModel:
    """A model in evaluation mode on the CPU without weights: each module fetches its own while it runs."""
    from accelerate import cpu_offload

    with torch.device("meta"):
        model = build_model(config)
    return cpu_offload(model.eval(), torch.device("cpu"), state_dict=weights)


def stored_weights(folder: Path) -> Weights:
    """The weights in a folder's safetensors, read from disk on each access."""
    from accelerate.utils import OffloadedWeightsLoader

    index: dict[str, dict[str, str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            index |= {name: {"safetensors_file": str(file)} for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    return OffloadedWeightsLoader(index=index)


def write_weights(weights: Weights, shapes: Mapping[str, torch.Size], convert: Convert, folder: Path) -> None:
    """Writes model.safetensors, or several files with an index, in the format of transformers.

    shapes: the shapes of the weights, in order. Raises OSError if a file can't be written, as on a full disk, and
    ValueError if a weight has NaN or Inf.
    """
    origin: dict[str, str] = {}
    planned: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        for stored, tensor in convert(name, torch.empty(shape, dtype=torch.float32, device="meta")):
            origin[stored], planned[stored] = name, tensor
    split = split_state_dict_into_shards_factory(
        planned,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=FILE_SIZE,
    )
    for file, names in split.filename_to_tensors.items():
        content: dict[str, torch.Tensor] = {}
        for source in dict.fromkeys(origin[name] for name in names):
            weight = weights[source]
            check_finite(source, weight, "The model")
            content |= {name: tensor for name, tensor in convert(source, weight) if name in names}
        try:
            save_file(content, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{folder / file} can't be written: {' '.join(str(error).split()).rstrip('.')}.") from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
