"""Reads the weights of a model folder in our names and shapes, by rows: no process needs the complete model.

The names are the same on both sides. ImageGPT stores projections as (in, out) with a bias; ours are `nn.Linear` without
bias, (out, in), and our attention always divides by the square root of the head width, which ImageGPT folders may have
in the queries' weights instead.
"""

import json
import pickle
import re
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from pipeline.checkpoint.fragments import Fragment
from pipeline.model.gpt import build_model
from pipeline.weights.folder_settings import FolderSettings, one_line

QUERIES_KEYS_VALUES = ".attn.c_attn.weight"
PROJECTION = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
OLD_MASKS = re.compile(r"\.attn\.(bias|masked_bias)$")
"""Causal masks that old versions of transformers stored with the weights."""
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""In the order in which they are looked for; each may be split into several files that an index lists."""
CLASS_NAMES = {"imagegpt": "ImageGPTForCausalImageModeling", "gpt2": "GPT2LMHeadModel"}


class FolderReader:
    """The weights of a model folder; a StateReader without moments."""

    optimizer_step = 0.0
    has_average = False

    def __init__(self, settings: FolderSettings) -> None:
        """Raises ValueError, one sentence, if weights are missing, unexpected, of a wrong shape, or can't be read.

        Raises it too for a bias that is not zero where the paper's block has none.
        """
        self._settings, self._folder = settings, settings.folder
        self._is_imagegpt = settings.model_type == "imagegpt"
        with torch.device("meta"):
            parameters = build_model(settings.config).named_parameters()
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
        """The shape of every parameter."""
        self._tensors = {name: tensor for name, tensor in self._open().items() if not OLD_MASKS.search(name)}
        if settings.ties_head and "transformer.wte.weight" in self._tensors:
            self._tensors.setdefault("lm_head.weight", self._tensors["transformer.wte.weight"])
        biases = {name for name in self._tensors if self._is_imagegpt and self._is_absent_bias(name)}
        self._check_names(biases)
        for name in sorted(biases):
            self._check_zero(name)

    def read(self, name: str, state: str = "weight") -> torch.Tensor:
        """A complete parameter: fp32, in its shape. Raises ValueError if it has NaN or Inf."""
        return self._rows(name, 0, self.shapes[name][0])

    def fill(self, target: torch.Tensor, wanted: Fragment, state: str) -> None:
        """Reads the elements of `wanted` into `target`, (wanted.length,); of the file only the rows that have them.

        The part of a parameter that tensor parallelism splits is cut from the complete parameter.
        """
        if wanted.part is not None:
            target.copy_(wanted.of(self.read(wanted.name)))
            return
        row = prod(wanted.shape[1:])
        first, last = wanted.start // row, -(-(wanted.start + wanted.length) // row)
        rows = self._rows(wanted.name, first, last).reshape(-1)
        target.copy_(rows[wanted.start - first * row :][: wanted.length])

    def _rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of our parameter, fp32, in memory of their own."""
        try:
            if self._is_transposed(name):
                value = self._tensors[name][:, first:last].to(torch.float32).t().contiguous()
            else:
                value = self._tensors[name][first:last].to(torch.float32, copy=True)
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from error
        check_finite(name, value, self._folder)
        if self._settings.scales_queries and name.endswith(QUERIES_KEYS_VALUES):
            return scaled_queries(value, self._settings.config, 0.5, first)
        return value

    def _is_transposed(self, name: str) -> bool:
        return self._is_imagegpt and PROJECTION.search(name) is not None

    def _is_absent_bias(self, name: str) -> bool:
        weight = f"{name.removesuffix('bias')}weight"
        return name.endswith(".bias") and self._is_transposed(weight) and weight in self.shapes

    def _open(self) -> dict[str, Any]:
        """The stored tensors by name: safetensors' slices, or tensors that are mapped into memory."""
        try:
            for name in WEIGHT_FILES:
                index = self._folder / f"{name}.index.json"
                if index.is_file():
                    names = _listed_files(index)
                elif (self._folder / name).is_file():
                    names = [name]
                else:
                    continue
                return {key: value for file in names for key, value in _open_file(self._folder / file).items()}
        except (OSError, RuntimeError, SafetensorError, ValueError, pickle.UnpicklingError) as error:
            raise self._unreadable(error) from error
        raise ValueError(f"The weights in {self._folder} can't be read: it has neither {' nor '.join(WEIGHT_FILES)}.")

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"The weights in {self._folder} can't be read: {one_line(error)}.")

    def _check_names(self, biases: set[str]) -> None:
        stored = {name: self._shape_of(name) for name in self._tensors.keys() - biases}
        expected = {name: shape[::-1] if self._is_transposed(name) else shape for name, shape in self.shapes.items()}
        kind = CLASS_NAMES.get(self._settings.model_type, "masked model of this pipeline")
        for problem, names in (
            ("lacks weights", expected.keys() - stored.keys()),
            (
                "has weights whose shapes differ from its config.json",
                {name for name in expected.keys() & stored.keys() if expected[name] != stored[name]},
            ),
            ("has unexpected weights", stored.keys() - expected.keys()),
        ):
            if names:
                raise ValueError(f"{self._folder} {problem}, such as {min(names)}; it must be a complete {kind}.")

    def _shape_of(self, name: str) -> tuple[int, ...]:
        tensor = self._tensors[name]
        return tuple(tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape())

    def _check_zero(self, name: str) -> None:
        value = self._tensors[name][:]
        check_finite(name, value, self._folder)
        if value.any():
            raise ValueError(
                f"{self._folder} has a bias that is not zero, {name} (largest {value.abs().max():.2g}); "
                f"the paper's block has no biases, and in Image GPT checkpoints they are zero."
            )


def _open_file(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        tensors = safe_open(str(file), framework="pt")
        return {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    # Files of torch before 1.6 are no archives, and can't be mapped.
    stored = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    if not isinstance(stored, dict) or not all(isinstance(value, torch.Tensor) for value in stored.values()):
        raise ValueError(f"{file.name} has other things than weights; it must have tensors by their names")
    return stored


def _listed_files(index: Path) -> list[str]:
    content = json.loads(index.read_text())
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise ValueError(f"{index.name} has no weight_map, which must have the file of each weight by its name")
    return sorted(set(listed.values()))


def scaled_queries(value: torch.Tensor, config: PreTrainedConfig, power: float, first: int = 0) -> torch.Tensor:
    """Rows of the weight (3D, D) of queries, keys and values, with the queries times a power of the head width.

    first: the number of the first of these rows; the queries are the first D of the weight.
    """
    queries = min(max(config.n_embd - first, 0), len(value))
    return torch.cat([value[:queries] * (config.n_embd // config.n_head) ** power, value[queries:]])


def check_finite(name: str, value: torch.Tensor, where: object) -> None:
    """Raises ValueError that names the weight if a value is NaN or Inf. `where`: the folder or model that has it."""
    finite = torch.isfinite(value)
    if not finite.all():
        raise ValueError(
            f"{where} has NaN or Inf in {int((~finite).sum()):,} of {value.numel():,} values of {name}; a model needs "
            f"finite weights: export another checkpoint, or restore a copy."
        )
