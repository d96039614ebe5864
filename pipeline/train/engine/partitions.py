"""What a rank of a DeepSpeed optimizer owns: flat tensors, and the fragments of parameters in them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.checkpoint.fragments import MOMENTS, Fragment, Part


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
class RankCoordinates:
    """A rank among those that share the model's state."""

    rank: int
    """Among the data-parallel ranks."""
    ranks: int
    parts: dict[str, Part]
    """Of the parameters that tensor parallelism cuts, those of this rank."""

    @property
    def writes_whole(self) -> bool:
        """Whether this rank writes the parameters that all ranks of a tensor-parallel group hold."""
        return all(part.rank == 0 for part in self.parts.values())


class ParameterNames:
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
