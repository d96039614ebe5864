"""An engine's partitions as named fragments of parameters: what makes a checkpoint free of topology.

Under ZeRO a rank owns flat slices of the fp32 weights and of Adam's two moments. A fragment says which elements of
which parameter a slice holds. Each rank writes its own fragments; a rank of any other topology reads the ranges it
needs. No rank ever holds the model. Where DeepSpeed keeps a rank's slices, deepspeed_internals.py knows.
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


@dataclass(frozen=True)
class Part:
    """What a rank holds of a parameter that tensor parallelism cuts.

    The parameter, transposed if so, is `matrices` equal blocks along `dimension`; of each the rank has an equal part.
    """

    dimension: int
    matrices: int
    rank: int
    ranks: int
    transposed: bool

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape, for that of the whole parameter."""
        shape = list(reversed(whole) if self.transposed else whole)
        shape[self.dimension] //= self.ranks
        return tuple(shape)

    def whole_shape(self, part: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's shape, for that of the part."""
        shape = list(part)
        shape[self.dimension] *= self.ranks
        return tuple(reversed(shape) if self.transposed else shape)

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The part as a view of the whole: (.., matrices, size / ranks, ..)."""
        view = whole.T if self.transposed else whole
        blocks = view.unflatten(self.dimension, (self.matrices, -1))
        return blocks.chunk(self.ranks, self.dimension + 1)[self.rank]


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + length) of the flattened parameter `name`, or of a part of it, at `place` in a
    partition."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    length: int
    place: int
    part: Part | None = None

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> "Fragment":
        """From an entry of a file's index, where its place in a partition no longer counts."""
        part = Part(**entry["part"]) if entry.get("part") else None
        return cls(entry["name"], tuple(entry["shape"]), entry["start"], entry["length"], 0, part)

    def key(self, state: str) -> str:
        """The name of this fragment's tensor in a checkpoint file."""
        return f"{self.name}@{self.start}.{state}"

    @property
    def whole_length(self) -> int:
        """Elements of the parameter, or of the part."""
        return prod(self.shape) // (self.part.ranks if self.part else 1)


Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Stored:
    """A fragment in a checkpoint's file."""

    fragment: Fragment
    file: int
    step: float


class FragmentReader:
    """The fragments of a checkpoint's rank files, read by parameter and range.

    mapped: through memory maps, which read no more of a fragment than is wanted; else fragments are read whole, and
    nothing of them stays resident. Raises ValueError naming the folder and the parameter if its fragments leave a gap
    or overlap.
    """

    def __init__(self, files: list[Path], *, mapped: bool = True) -> None:
        backend = "mmap" if mapped else "pread"
        self._files = [safe_open(str(file), framework="pt", backend=backend) for file in files]
        self._folder = files[0].parent
        self._stored: dict[str, dict[Part | None, list[Stored]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Every parameter's shape."""
        for number, file in enumerate(self._files):
            for entry in json.loads(file.metadata()["index"]):
                fragment = Fragment.from_entry(entry)
                pieces = self._stored.setdefault(fragment.name, {}).setdefault(fragment.part, [])
                pieces.append(Stored(fragment, number, entry["step"]))
                self.shapes[fragment.name] = fragment.shape
        for name, by_part in self._stored.items():
            expected = max((part.ranks for part in by_part if part), default=1)
            if len(by_part) != expected:
                raise ValueError(f"{self._folder}: {name} has {len(by_part)} of its {expected} parts.")
            for pieces in by_part.values():
                pieces.sort(key=lambda piece: piece.fragment.start)
                self._check_cover(name, [piece.fragment for piece in pieces])

    def _check_cover(self, name: str, fragments: list[Fragment]) -> None:
        end = 0
        for fragment in fragments:
            if fragment.start != end:
                raise ValueError(f"{self._folder}: the fragments of {name} leave a gap or overlap at element {end}.")
            end += fragment.length
        if end != fragments[0].whole_length:
            raise ValueError(f"{self._folder}: {name} has {end} of {fragments[0].whole_length} elements.")

    @property
    def optimizer_step(self) -> float:
        """How many updates Adam has made."""
        steps = {piece.step for by_part in self._stored.values() for pieces in by_part.values() for piece in pieces}
        if len(steps) != 1:
            raise ValueError(f"{self._folder}: the ranks saved different steps of the optimizer, {sorted(steps)}.")
        return steps.pop()

    def read(self, name: str, state: str = "weight") -> torch.Tensor:
        """One whole parameter, or one of its moments: fp32, in its shape."""
        shape = self.shapes[name]
        whole = torch.empty(shape)
        for part in self._stored[name]:
            wanted = Fragment(name, shape, 0, prod(shape) // (part.ranks if part else 1), 0, part)
            flat = torch.empty(wanted.length)
            self._fill_alike(flat, wanted, state)
            if part is None:
                return flat.view(shape)
            view = part.of(whole)
            view.copy_(flat.view(view.shape))
        return whole

    def fill(self, target: torch.Tensor, wanted: Fragment, state: str) -> None:
        """Writes the wanted elements into `target`, (wanted.length,). Raises ValueError if it is another model's.

        A parameter that is cut otherwise than it was saved is put together first: one, never the model.
        """
        found = self.shapes.get(wanted.name, "missing")
        if found != wanted.shape:
            raise ValueError(f"{self._folder}: {wanted.name} is {found}; this model needs {wanted.shape}.")
        if wanted.part in self._stored[wanted.name]:
            self._fill_alike(target, wanted, state)
            return
        whole = self.read(wanted.name, state)
        own = wanted.part.of(whole) if wanted.part else whole
        target.copy_(own.reshape(-1)[wanted.start : wanted.start + wanted.length])

    def _fill_alike(self, target: torch.Tensor, wanted: Fragment, state: str) -> None:
        """From fragments of the same part, or of the whole parameter."""
        for piece in self._stored[wanted.name][wanted.part]:
            fragment = piece.fragment
            first = max(wanted.start, fragment.start)
            last = min(wanted.start + wanted.length, fragment.start + fragment.length)
            if first < last:
                stored = self._files[piece.file].get_slice(fragment.key(state))
                cut = stored[first - fragment.start : last - fragment.start]
                target[first - wanted.start : last - wanted.start].copy_(cut)
