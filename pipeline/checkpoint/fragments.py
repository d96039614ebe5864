"""An engine's partitions as named fragments of parameters: what makes a checkpoint free of topology (contract 7).

Under ZeRO a rank owns flat slices of the fp32 weights and of Adam's two moments. A fragment says which elements of
which parameter a slice holds. Each rank writes its own fragments; a rank of any other topology reads the ranges it
needs. No rank ever holds the model. The layouts are private attributes of DeepSpeed 0.19.8; tests round-trip them.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from pipeline.distributed import failing_together

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


@dataclass(frozen=True)
class Partition:
    """A flat fp32 tensor of this rank, its optimizer state, and the fragments in it."""

    weight: torch.Tensor
    state: dict[str, torch.Tensor]
    fragments: list[Fragment]

    def flat(self, state: str) -> torch.Tensor:
        """The flat tensor of one state, on the device; Adam has no moments before its first update."""
        if state == "weight":
            return self.weight
        return self.state[state] if state in self.state else torch.zeros_like(self.weight)

    def make_state(self, step: Any) -> None:
        """Gives Adam its step count, and moments (zero) where it has made none yet."""
        for moment in MOMENTS:
            if moment not in self.state:
                self.state[moment] = torch.zeros_like(self.weight)
        self.state["step"] = step


@dataclass(frozen=True)
class Place:
    """Where a rank stands among those that share the model's state."""

    rank: int
    """Among the data-parallel ranks."""
    ranks: int
    parts: dict[str, Part]
    """Of the parameters that tensor parallelism cuts, those of this rank."""

    @property
    def writes_whole(self) -> bool:
        """Whether this rank writes the parameters that all ranks of a tensor-parallel group hold."""
        return all(part.rank == 0 for part in self.parts.values())


class Names:
    """The names of an engine's parameters, and their fragments."""

    def __init__(self, model: nn.Module, parts: dict[str, Part]) -> None:
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._parts = parts

    def fragment(
        self, parameter: nn.Parameter, shape: tuple[int, ...], start: int, length: int, place: int
    ) -> Fragment:
        """shape: what this rank holds of the parameter, before ZeRO cuts it."""
        name = self._names[id(parameter)]
        part = self._parts.get(name)
        return Fragment(name, part.whole_shape(shape) if part else shape, start, length, place, part)


def partitions_of(optimizer: Any, model: nn.Module, place: Place) -> Iterator[Partition]:
    """What this rank of a DeepSpeed optimizer owns.

    model: the whole one, whose names count; layers of other pipeline stages may be without memory.
    """
    names = Names(model, place.parts)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _stage_3(optimizer, names)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return _linked(optimizer, optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, names)
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return _linked(optimizer, optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, names)
    return _unpartitioned(optimizer, names, place.rank, place.ranks)


def _stage_3(optimizer: Any, names: Names) -> Iterator[Partition]:
    """ZeRO-3: every parameter is cut over the ranks, the last rank's cut padded."""
    for number, (group, flat) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        fragments = []
        for parameter in group:
            _, place, cut = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = cut * optimizer._get_param_partition_rank(parameter)
            length = min(cut, parameter.ds_numel - start)
            if length > 0:
                fragments.append(names.fragment(parameter, tuple(parameter.ds_shape), start, length, place))
        with _in_memory(optimizer, number):
            yield Partition(flat.data, optimizer.optimizer.state[flat], fragments)


@contextmanager
def _in_memory(optimizer: Any, number: int) -> Iterator[None]:
    """Reads a partition of ZeRO-3 that lies on NVMe, and writes it back afterwards."""
    away = optimizer._swappable_optimizer_subgroup(number)
    if away:
        optimizer._optimizer_states_and_gradient_swap_in(number)
    yield
    if away:
        optimizer._optimizer_states_and_gradient_swap_out(number)


def _linked(optimizer: Any, groups: Any, flats: Any, names: Names) -> Iterator[Partition]:
    """ZeRO-1 and 2: a group's parameters lie end to end and the whole is cut over the ranks."""
    for group, flat in zip(groups, flats, strict=True):
        fragments = []
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                inside, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                shape = tuple(parameter.shape)
                fragments.append(names.fragment(parameter, shape, inside.start, here.numel, here.start))
        yield Partition(flat.data, optimizer.optimizer.state[flat], fragments)


def _unpartitioned(optimizer: Any, names: Names, rank: int, ranks: int) -> Iterator[Partition]:
    """ZeRO-0: every rank holds everything and writes its share of each parameter."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            first, last = parameter.numel() * rank // ranks, parameter.numel() * (rank + 1) // ranks
            share = names.fragment(parameter, tuple(parameter.shape), first, last - first, first)
            state = _Flattened(optimizer.state[parameter], parameter.shape)
            yield Partition(parameter.data.view(-1), state, [share] if last > first else [])


class _Flattened(dict[str, torch.Tensor]):
    """Optimizer state of a whole parameter, seen flat; what is set is set in the optimizer too."""

    def __init__(self, state: dict[str, torch.Tensor], shape: torch.Size) -> None:
        super().__init__({key: value.view(-1) if value.dim() else value for key, value in state.items()})
        self._state, self._shape = state, shape

    def __setitem__(self, key: str, value: torch.Tensor) -> None:
        super().__setitem__(key, value)
        self._state[key] = value.view(self._shape) if value.dim() else value


Tensors = dict[str, torch.Tensor]


def snapshot(
    optimizer: Any, model: nn.Module, place: Place, earlier: Tensors | None = None
) -> tuple[Tensors, list[dict[str, Any]]]:
    """Copies of this rank's fragments on the host, and their index for the file's header. As for `partitions_of`.

    earlier: those of a snapshot that is no longer needed; they are written over, which is much faster than new memory.
    """
    earlier = earlier or {}
    tensors: Tensors = {}
    index = []
    for partition in partitions_of(optimizer, model, place):
        for fragment in partition.fragments:
            if fragment.part is None and not place.writes_whole:
                continue
            for state in STATES:
                flat = partition.flat(state).detach()
                cut = flat.narrow(0, fragment.place, fragment.length)
                key = fragment.key(state)
                tensors[key] = earlier[key].copy_(cut) if key in earlier else _host_copy(cut)
            index.append(
                {
                    "name": fragment.name,
                    "shape": list(fragment.shape),
                    "start": fragment.start,
                    "length": fragment.length,
                    "step": float(partition.state["step"]) if "step" in partition.state else 0.0,
                    "part": asdict(fragment.part) if fragment.part else None,
                }
            )
    return tensors, index


@dataclass(frozen=True)
class Stored:
    """A fragment in a checkpoint's file."""

    fragment: Fragment
    file: int
    step: float


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """fp32 on the host, in pinned memory where an accelerator copies to it."""
    copy = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor)


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
        for number, file in enumerate(self._files):
            for entry in json.loads(file.metadata()["index"]):
                fragment = Fragment.from_entry(entry)
                pieces = self._stored.setdefault(fragment.name, {}).setdefault(fragment.part, [])
                pieces.append(Stored(fragment, number, entry["step"]))
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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape."""
        return {name: next(iter(by_part.values()))[0].fragment.shape for name, by_part in self._stored.items()}

    @property
    def optimizer_step(self) -> float:
        """How many updates Adam has made."""
        steps = {piece.step for by_part in self._stored.values() for pieces in by_part.values() for piece in pieces}
        if len(steps) != 1:
            raise ValueError(f"{self._folder}: the ranks saved different steps of the optimizer, {sorted(steps)}.")
        return steps.pop()

    def read(self, name: str, state: str = "weight") -> torch.Tensor:
        """One whole parameter, or one of its moments: fp32, in its shape."""
        shape = self._shape(name)
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
        if self._stored.get(wanted.name) is None or self._shape(wanted.name) != wanted.shape:
            found = self._shape(wanted.name) if wanted.name in self._stored else "missing"
            raise ValueError(f"{self._folder}: {wanted.name} is {found}; this model needs {wanted.shape}.")
        if wanted.part in self._stored[wanted.name]:
            self._fill_alike(target, wanted, state)
            return
        whole = self.read(wanted.name, state)
        own = wanted.part.of(whole) if wanted.part else whole
        target.copy_(own.reshape(-1)[wanted.start : wanted.start + wanted.length])

    def _shape(self, name: str) -> tuple[int, ...]:
        return next(iter(self._stored[name].values()))[0].fragment.shape

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


@torch.no_grad()
def restore(optimizer: Any, model: nn.Module, place: Place, reader: FragmentReader) -> None:
    """Fills a rank's weights and moments from a checkpoint of any topology. Arguments as for `partitions_of`.

    Raises ValueError if the checkpoint's parameters are not the model's.
    """
    names = {name for name, _ in model.named_parameters()}
    if names != reader.shapes.keys():
        odd = sorted(names ^ reader.shapes.keys())
        raise ValueError(f"The checkpoint and the model differ in their parameters: {', '.join(odd[:3])}.")
    whole = isinstance(optimizer, torch.optim.Optimizer)
    step = reader.optimizer_step
    with failing_together():
        for partition in partitions_of(optimizer, model, replace(place, rank=0, ranks=1) if whole else place):
            partition.make_state(_step_count(optimizer, step, partition.weight.device))
            for state in STATES:
                flat = partition.flat(state)
                for fragment in partition.fragments:
                    reader.fill(flat.narrow(0, fragment.place, fragment.length), fragment, state)
    _refresh_low_precision(optimizer)


def _step_count(optimizer: Any, step: float, device: torch.device) -> Any:
    """As each Adam keeps it: DeepSpeed's as a number, torch's fused one as a tensor on the device."""
    if hasattr(getattr(optimizer, "optimizer", optimizer), "ds_opt_adam"):
        return int(step)
    return torch.tensor(step, dtype=torch.float32, device=device)


def _refresh_low_precision(optimizer: Any) -> None:
    """The weights that the forward pass reads, made anew from the fp32 ones."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            with _in_memory(optimizer, number):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
