"""The content of a checkpoint: named fragments of parameters, which do not depend on the topology.

Under ZeRO a rank owns flat slices of the fp32 weights and of Adam's two moments. A fragment records which elements of
which parameter are in a slice. Each rank writes its own fragments; a rank of any other topology reads the ranges that
it needs. No rank ever has the complete model in memory. deepspeed_internals.py finds a rank's slices in DeepSpeed.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = ("weight", *MOMENTS)
"""The fp32 weight and Adam's first and second moment."""
EMA = "ema"
"""A further state in runs with ema.decay: the exponential moving average of the weight."""


@dataclass(frozen=True)
class Part:
    """A rank's part of a parameter that tensor parallelism splits.

    The parameter (transposed, if `transposed`) consists of `matrices` equal blocks along `dimension`. Each block is
    split evenly over the ranks.
    """

    dimension: int
    matrices: int
    rank: int
    ranks: int
    transposed: bool

    def shape(self, full: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape, from the parameter's full shape."""
        shape = list(reversed(full) if self.transposed else full)
        shape[self.dimension] //= self.ranks
        return tuple(shape)

    def full_shape(self, part: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's full shape, from the part's shape."""
        shape = list(part)
        shape[self.dimension] *= self.ranks
        return tuple(reversed(shape) if self.transposed else shape)

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The part as a view of the complete parameter: (.., matrices, size / ranks, ..)."""
        view = parameter.T if self.transposed else parameter
        blocks = view.unflatten(self.dimension, (self.matrices, -1))
        return blocks.chunk(self.ranks, self.dimension + 1)[self.rank]


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + length) of the flattened parameter `name`, or of a part of it, at `offset` in a
    partition."""

    name: str
    shape: tuple[int, ...]
    """The parameter's full shape."""
    start: int
    length: int
    offset: int
    part: Part | None = None

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> "Fragment":
        """From an entry of a file's index, which has no offset in a partition."""
        part = Part(**entry["part"]) if entry.get("part") else None
        return cls(entry["name"], tuple(entry["shape"]), entry["start"], entry["length"], 0, part)

    def key(self, state: str) -> str:
        """The name of this fragment's tensor in a checkpoint file."""
        return f"{self.name}@{self.start}.{state}"

    @property
    def full_length(self) -> int:
        """Number of elements of the parameter, or of the part."""
        return prod(self.shape) // (self.part.ranks if self.part else 1)


Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Stored:
    """A fragment in a file of a checkpoint."""

    fragment: Fragment
    file: int
    step: float


class FragmentReader:
    """The fragments of a checkpoint's rank files, read by parameter and range.

    mapped: True reads through memory maps, and of a fragment only the elements that are needed; False reads complete
    fragments, and keeps none in memory. Raises ValueError naming the folder and the parameter if its fragments leave a
    gap or overlap.
    """

    def __init__(self, files: list[Path], *, mapped: bool = True) -> None:
        backend = "mmap" if mapped else "pread"
        self._files = [safe_open(str(file), framework="pt", backend=backend) for file in files]
        self._folder = files[0].parent
        self._stored: dict[str, dict[Part | None, list[Stored]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """The shape of every parameter."""
        self.has_average = True
        """Whether there is a moving average of the weights."""
        for number, file in enumerate(self._files):
            keys = set(file.keys())
            for entry in json.loads(file.metadata()["index"]):
                fragment = Fragment.from_entry(entry)
                self.has_average = self.has_average and fragment.key(EMA) in keys
                fragments = self._stored.setdefault(fragment.name, {}).setdefault(fragment.part, [])
                fragments.append(Stored(fragment, number, entry["step"]))
                self.shapes[fragment.name] = fragment.shape
        for name, by_part in self._stored.items():
            expected = max((part.ranks for part in by_part if part), default=1)
            if len(by_part) != expected:
                raise ValueError(f"{self._folder}: {name} has {len(by_part)} of {expected} parts.")
            for stored in by_part.values():
                stored.sort(key=lambda one: one.fragment.start)
                self._check_cover(name, [one.fragment for one in stored])

    def _check_cover(self, name: str, fragments: list[Fragment]) -> None:
        end = 0
        for fragment in fragments:
            if fragment.start != end:
                raise ValueError(f"{self._folder}: the fragments of {name} leave a gap or overlap at element {end}.")
            end += fragment.length
        if end != fragments[0].full_length:
            raise ValueError(f"{self._folder}: {name} has {end} of {fragments[0].full_length} elements.")

    @property
    def optimizer_step(self) -> float:
        """Number of updates that Adam has made."""
        steps = {one.step for by_part in self._stored.values() for stored in by_part.values() for one in stored}
        if len(steps) != 1:
            raise ValueError(f"{self._folder}: the ranks saved different steps of the optimizer, {sorted(steps)}.")
        return steps.pop()

    def read(self, name: str, state: str = "weight") -> torch.Tensor:
        """A complete parameter, one of its moments, or its average (EMA): fp32, in its shape."""
        shape = self.shapes[name]
        parameter = torch.empty(shape)
        for part in self._stored[name]:
            wanted = Fragment(name, shape, 0, prod(shape) // (part.ranks if part else 1), 0, part)
            flat = torch.empty(wanted.length)
            self._fill_same_part(flat, wanted, state)
            if part is None:
                return flat.view(shape)
            view = part.of(parameter)
            view.copy_(flat.view(view.shape))
        return parameter

    def fill(self, target: torch.Tensor, wanted: Fragment, state: str) -> None:
        """Reads the elements of `wanted` into `target`, (wanted.length,). Raises ValueError if the shapes differ.

        A parameter that is split differently than it was saved is assembled first: one parameter, never the model.
        """
        found = self.shapes.get(wanted.name, "missing")
        if found != wanted.shape:
            raise ValueError(f"{self._folder}: {wanted.name} is {found}; this model needs {wanted.shape}.")
        if wanted.part in self._stored[wanted.name]:
            self._fill_same_part(target, wanted, state)
            return
        parameter = self.read(wanted.name, state)
        own = wanted.part.of(parameter) if wanted.part else parameter
        target.copy_(own.reshape(-1)[wanted.start : wanted.start + wanted.length])

    def _fill_same_part(self, target: torch.Tensor, wanted: Fragment, state: str) -> None:
        """Reads from fragments of the same part, or of the complete parameter."""
        for one in self._stored[wanted.name][wanted.part]:
            fragment = one.fragment
            first = max(wanted.start, fragment.start)
            last = min(wanted.start + wanted.length, fragment.start + fragment.length)
            if first < last:
                stored = self._files[one.file].get_slice(fragment.key(state))
                cut = stored[first - fragment.start : last - fragment.start]
                target[first - wanted.start : last - wanted.start].copy_(cut)
