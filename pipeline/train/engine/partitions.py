"""What a rank of a DeepSpeed optimizer owns, as named fragments: the private attributes of DeepSpeed 0.19.8."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from pipeline.checkpoint.fragments import MOMENTS, STATES, Fragment, FragmentReader, Part, Tensors
from pipeline.distributed import raise_on_all_ranks


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


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """fp32 on the host, in pinned memory where an accelerator copies to it."""
    copy = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor)


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
    with raise_on_all_ranks():
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
