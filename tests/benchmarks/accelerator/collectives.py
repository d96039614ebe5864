"""Every collective that a run uses, at world size 1: NCCL on CUDA, gloo on CPU."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from pipeline import distributed
from tests.benchmarks.accelerator.common import CUDA, DEVICE, start_alone
from tests.benchmarks.accelerator.report import Row, equal

ELEMENTS = 1 << 10


def check_collectives() -> Iterator[Row]:
    """The group's backend, then each collective in the types that a run sends."""
    ranks = start_alone()
    yield equal("collectives: backend", dist.get_backend(), "nccl" if CUDA else "gloo")
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for name, collective in COLLECTIVES.items():
            values = torch.arange(ELEMENTS, device=DEVICE).to(dtype)
            yield equal(f"collectives: {name} {str(dtype)[6:]}", torch.equal(collective(values.clone()), values), True)
    dist.barrier()
    yield equal("collectives: barrier", "passed", "passed")
    yield equal("collectives: all_reduce_max", distributed.all_reduce_max([1.0, 2.0]), [1.0, 2.0])
    yield equal("collectives: gather", distributed.gather({"rank": 0}), [{"rank": 0}])
    yield equal("collectives: from_first", distributed.from_first(lambda: "said"), "said")
    yield equal("collectives: mean_over_ranks", distributed.mean_over_ranks(torch.ones(1, device=DEVICE)).item(), 1.0)
    with distributed.raise_on_all_ranks():
        pass
    yield equal("collectives: a side group of gloo", _side_group(), 1.0)
    yield equal("collectives: ranks", ranks.count, 1)


def _all_reduce(values: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(values)
    return values


def _broadcast(values: torch.Tensor) -> torch.Tensor:
    dist.broadcast(values, src=0)
    return values


def _all_gather(values: torch.Tensor) -> torch.Tensor:
    found = torch.empty_like(values)
    dist.all_gather_into_tensor(found, values)
    return found


def _reduce_scatter(values: torch.Tensor) -> torch.Tensor:
    found = torch.empty_like(values)
    dist.reduce_scatter_tensor(found, values)
    return found


def _reduce(values: torch.Tensor) -> torch.Tensor:
    dist.reduce(values, dst=0)
    return values


def _side_group() -> float:
    """A gloo group beside NCCL's, on which flags of ranks travel without the device."""
    values = torch.ones(1)
    dist.all_reduce(values, group=dist.new_group(backend="gloo"))
    return values.item()


COLLECTIVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "all_reduce": _all_reduce,
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "reduce": _reduce,
}
