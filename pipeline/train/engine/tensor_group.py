"""The collectives of tensor and sequence parallelism, with their gradients, over a group of neighboring ranks.

Sources: Megatron-LM (Shoeybi et al. 2019) and sequence parallelism (Korthikanti et al. 2022). Every rank of a group
computes embeddings and head over all positions. Norms, residuals and dropout it computes over all positions too, or
with sequence parallelism over its own.

| operation | forward | backward |
|---|---|---|
| `column` | gathers positions, if they are split; product | product; the input's gradient is summed (and split) |
| `row` | product, summed over ranks (and split) | gathers positions, if they are split; product |
| `split_positions` | this rank's positions | gathers positions |
| `gather_positions` | gathers positions | this rank's positions: every rank has the same gradient |
| `shared` | nothing | sums the gradient: each rank has that of its positions |

They are operators of torch, because torch.compile would break its graphs at other functions. In the backward pass of
`column`, on CUDA, the gather overlaps with the product for the inputs, and the sum with the product for the weight.

Letters in shape comments: B images, T positions, P a rank's positions, I inputs, O outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

POSITIONS = 1
"""The dimension of positions."""


@dataclass
class TensorGroup:
    """The ranks over which the blocks' matrices are split, as seen by one of them."""

    rank: int
    """This process's rank in the group."""
    size: int
    process_group: Any
    splits_positions: bool
    """Whether norms and residuals are computed on a rank's own positions: sequence parallelism."""
    key: int = field(init=False)
    """By which the operators find the group: their arguments may not be groups."""

    def __post_init__(self) -> None:
        self.key = len(_groups)
        _groups.append(self)

    @contextmanager
    def complete_positions(self, positions: int | None = None) -> Iterator[None]:
        """In this context positions are not split: for decoding one by one, or for a number that can't be divided.

        positions: nothing changes if it can be divided; None: of any number.
        """
        earlier = self.splits_positions
        self.splits_positions = earlier and positions is not None and positions % self.size == 0
        try:
            yield
        finally:
            self.splits_positions = earlier

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values over the ranks' positions, in place; unchanged where every rank has all positions."""
        if self.splits_positions:
            dist.all_reduce(values, group=self.process_group)
            values /= self.size
        return values


_groups: list[TensorGroup] = []
"""By key."""


def column(inputs: Tensor, weight: Tensor, bias: Tensor | None, group: TensorGroup) -> Tensor:
    """The product with a matrix that is split by outputs: (B, T, I) or, if split, (B, P, I) to (B, T, O)."""
    return _column(inputs, weight, bias, group.key, group.splits_positions)


def row(inputs: Tensor, weight: Tensor, bias: Tensor | None, group: TensorGroup) -> Tensor:
    """The product with a matrix that is split by inputs: (B, T, I) to (B, T, O) or, if split, (B, P, O).

    bias: (O,), the same on every rank; it is added after the sum.
    """
    return _row(inputs, weight, bias, group.key, group.splits_positions)


def split_positions(states: Tensor, group: TensorGroup) -> Tensor:
    """This rank's positions, (B, P, I) of (B, T, I), if positions are split."""
    return _split(states, group.key) if group.splits_positions else states


def gather_positions(states: Tensor, group: TensorGroup) -> Tensor:
    """All positions, (B, T, I) from (B, P, I), if positions are split."""
    return _gather(states, group.key) if group.splits_positions else states


def shared(parameter: Tensor, group: TensorGroup) -> Tensor:
    """A parameter that every rank applies to its own positions, if they are split."""
    return _shared(parameter, group.key) if group.splits_positions else parameter


class _Gathering:
    """An all-gather of positions that has started: (B, P, I) to (B, T, I)."""

    def __init__(self, states: Tensor, key: int) -> None:
        size = _groups[key].size
        self._parts = states.new_empty(size, *states.shape)  # (ranks, B, P, I)
        flat, own = self._parts.view(-1), states.contiguous().view(-1)  # gloo compares shapes
        self._work = dist.all_gather_into_tensor(flat, own, group=_groups[key].process_group, async_op=True)

    def wait(self) -> Tensor:
        self._work.wait()
        return self._parts.transpose(0, 1).flatten(POSITIONS, POSITIONS + 1)


class _Sum:
    """A sum over the ranks that has started, of (B, T, I); if split, its own positions (B, P, I)."""

    def __init__(self, states: Tensor, key: int, split: bool) -> None:
        group, self._sum = _groups[key], states.contiguous()
        if split:
            parts = states.unflatten(POSITIONS, (group.size, -1)).transpose(0, 1).contiguous()  # (ranks, B, P, I)
            self._sum = torch.empty_like(parts[0])
            flat, own = parts.view(-1), self._sum.view(-1)
            self._work = dist.reduce_scatter_tensor(own, flat, group=group.process_group, async_op=True)
        else:
            self._work = dist.all_reduce(self._sum, group=group.process_group, async_op=True)

    def wait(self) -> Tensor:
        self._work.wait()
        return self._sum


def _own(states: Tensor, key: int) -> Tensor:
    """This rank's positions, copied."""
    own = states.chunk(_groups[key].size, POSITIONS)[_groups[key].rank]
    return own.clone(memory_format=torch.contiguous_format)


def _weight_gradient(gradient: Tensor, inputs: Tensor) -> Tensor:
    """(O, I)."""
    return gradient.flatten(0, -2).t() @ inputs.flatten(0, -2)


def _bias_gradient(gradient: Tensor, has_bias: bool) -> Tensor:
    """(O,), or empty."""
    return gradient.flatten(0, -2).sum(0) if has_bias else gradient.new_empty(0)


def _changed(states: Tensor, positions: int, features: int) -> Tensor:
    """An uninitialized tensor of other sizes, for torch.compile."""
    return states.new_empty(*states.shape[:POSITIONS], positions, features)


@torch.library.custom_op("pipeline_tensor::column", mutates_args=())
def _column(inputs: Tensor, weight: Tensor, bias: Tensor | None, key: int, split: bool) -> Tensor:
    return functional.linear(_Gathering(inputs, key).wait() if split else inputs, weight, bias)


@_column.register_fake
def _(inputs: Tensor, weight: Tensor, bias: Tensor | None, key: int, split: bool) -> Tensor:
    return _changed(inputs, inputs.shape[POSITIONS] * (_groups[key].size if split else 1), weight.shape[0])


@torch.library.custom_op("pipeline_tensor::column_backward", mutates_args=())
def _column_backward(
    gradient: Tensor, inputs: Tensor, weight: Tensor, has_bias: bool, key: int, split: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of inputs, weight and bias; without a bias the last is empty.

    The gathered positions were not saved: they are gathered again.
    """
    gathering = _Gathering(inputs, key) if split else None
    products = gradient @ weight
    complete = gathering.wait() if gathering else inputs
    of_inputs = _Sum(products, key, split)
    of_weight, of_bias = _weight_gradient(gradient, complete), _bias_gradient(gradient, has_bias)
    return of_inputs.wait(), of_weight, of_bias  # waiting only now lets the message overlap with the products


@_column_backward.register_fake
def _(
    gradient: Tensor, inputs: Tensor, weight: Tensor, has_bias: bool, key: int, split: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(inputs), torch.empty_like(weight), weight.new_empty(weight.shape[0] if has_bias else 0)


@torch.library.custom_op("pipeline_tensor::row", mutates_args=())
def _row(inputs: Tensor, weight: Tensor, bias: Tensor | None, key: int, split: bool) -> Tensor:
    summed = _Sum(functional.linear(inputs, weight), key, split).wait()
    return summed if bias is None else summed + bias


@_row.register_fake
def _(inputs: Tensor, weight: Tensor, bias: Tensor | None, key: int, split: bool) -> Tensor:
    return _changed(inputs, inputs.shape[POSITIONS] // (_groups[key].size if split else 1), weight.shape[0])


@torch.library.custom_op("pipeline_tensor::row_backward", mutates_args=())
def _row_backward(
    gradient: Tensor, inputs: Tensor, weight: Tensor, has_bias: bool, key: int, split: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same: of all positions, so that the bias's gradient is the same on every rank."""
    complete = _Gathering(gradient, key).wait() if split else gradient
    return complete @ weight, _weight_gradient(complete, inputs), _bias_gradient(complete, has_bias)


@_row_backward.register_fake
def _(
    gradient: Tensor, inputs: Tensor, weight: Tensor, has_bias: bool, key: int, split: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(inputs), torch.empty_like(weight), weight.new_empty(weight.shape[0] if has_bias else 0)


@torch.library.custom_op("pipeline_tensor::gather", mutates_args=())
def _gather(states: Tensor, key: int) -> Tensor:
    return _Gathering(states, key).wait()


@_gather.register_fake
def _(states: Tensor, key: int) -> Tensor:
    return _changed(states, states.shape[POSITIONS] * _groups[key].size, states.shape[-1])


@torch.library.custom_op("pipeline_tensor::split", mutates_args=())
def _split(states: Tensor, key: int) -> Tensor:
    return _own(states, key)


@_split.register_fake
def _(states: Tensor, key: int) -> Tensor:
    return _changed(states, states.shape[POSITIONS] // _groups[key].size, states.shape[-1])


@torch.library.custom_op("pipeline_tensor::shared", mutates_args=())
def _shared(parameter: Tensor, key: int) -> Tensor:
    return parameter.clone()


@_shared.register_fake
def _(parameter: Tensor, key: int) -> Tensor:
    return torch.empty_like(parameter)


@torch.library.custom_op("pipeline_tensor::sum", mutates_args=())
def _total(gradient: Tensor, key: int) -> Tensor:
    total = gradient.clone()
    dist.all_reduce(total, group=_groups[key].process_group)
    return total


@_total.register_fake
def _(gradient: Tensor, key: int) -> Tensor:
    return torch.empty_like(gradient)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    states, weight, bias, ctx.key, ctx.split = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(states, weight)


def _column_gradients(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    options = (context.has_bias, context.key, context.split)
    of_inputs, of_weight, of_bias = _column_backward(gradient, *context.saved_tensors, *options)
    return of_inputs, of_weight, of_bias if context.has_bias else None, None, None


def _row_gradients(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    options = (context.has_bias, context.key, context.split)
    of_inputs, of_weight, of_bias = _row_backward(gradient, *context.saved_tensors, *options)
    return of_inputs, of_weight, of_bias if context.has_bias else None, None, None


def _save_key(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.key = inputs[1]


_column.register_autograd(_column_gradients, setup_context=_save)
_row.register_autograd(_row_gradients, setup_context=_save)
_split.register_autograd(lambda context, gradient: (_gather(gradient, context.key), None), setup_context=_save_key)
_gather.register_autograd(lambda context, gradient: (_split(gradient, context.key), None), setup_context=_save_key)
_shared.register_autograd(lambda context, gradient: (_total(gradient, context.key), None), setup_context=_save_key)
