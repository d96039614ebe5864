"""The ranks of a run: this process's rank, and collectives over small values and errors."""

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from pipeline.rank_errors import reported_on_all_ranks

T = TypeVar("T")

SLURM_VARIABLES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
"""torchrun's variables, which DeepSpeed reads, and SLURM's for a job step (the shell of salloc is a step of one task).

The batch script sets MASTER_ADDR and MASTER_PORT.
"""
PCI_DEVICES = Path("/sys/bus/pci/devices")
"""Where Linux lists PCI devices, with the CPUs that are close to each."""
MOST_THREADS = 8
"""A rank on a GPU has no use for more CPUs than this: if so many are close, it keeps to those."""
_host_group: dist.ProcessGroup | None = None
"""The group of `use_host_group`."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank among the ranks of the run."""

    rank: int
    count: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True on rank 0, which logs and writes for all."""
        return self.rank == 0


def describe_ranks() -> Ranks:
    """Reads the variables of torchrun or srun; without either, a single rank. Starts no process group.

    Raises ValueError if the launcher's variables are incomplete or contradict each other.
    """
    if "RANK" not in os.environ and integer_variable("SLURM_STEP_NUM_TASKS", 1) > 1:
        for ours, slurms in SLURM_VARIABLES.items():
            os.environ[ours] = os.environ[slurms]
    rank, count = integer_variable("RANK", 0), integer_variable("WORLD_SIZE", 1)
    _check_rank(rank, count)
    local_rank = integer_variable("LOCAL_RANK", 0)
    number = select_device(local_rank)
    if count > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ValueError(f"{name} is not set; with {count} ranks it must be set, to rank 0's address or port.")
        if not 0 < integer_variable("MASTER_PORT", 0) < 1 << 16:
            raise ValueError(f"MASTER_PORT is {os.environ['MASTER_PORT']}; it must be a port, 1 to 65535.")
    device = torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")
    return Ranks(rank, count, local_rank, device)


def _check_rank(rank: int, count: int) -> None:
    """Raises ValueError if there can be no such rank; the variables may be left over from another program."""
    if count > 1 and "RANK" not in os.environ:
        raise ValueError(f"RANK is not set, and WORLD_SIZE is {count}; set RANK, or unset both to train on one rank.")
    if rank >= count:
        raise ValueError(
            f"RANK is {rank}; with {count} ranks (WORLD_SIZE) it must be below {count}. Unset both to train on one "
            f"rank."
        )


def ranks_per_node() -> int | None:
    """As the launcher says: torchrun, or SLURM for the first node of a job step; None if neither does."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return integer_variable("LOCAL_WORLD_SIZE", 1)
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))  # such as 4(x2)
    return int(tasks[0]) if tasks else None


def integer_variable(name: str, default: int) -> int:
    """The value of an environment variable. Raises ValueError if it is not an integer of 0 or more."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r}; it must be an integer of 0 or more.")
    return int(text)


def select_device(local_rank: int) -> int:
    """The number of the GPU that this rank uses: a task that sees one GPU only sees it as number 0.

    A launcher's LOCAL_RANK, which DeepSpeed and accelerate read, is set to it. Without a launcher it stays unset:
    accelerate takes a process with LOCAL_RANK for one of several ranks, and fails without their other variables.
    """
    select_mig_instance(local_rank)
    number = local_rank % torch.cuda.device_count() if torch.cuda.is_available() else 0
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        os.environ["LOCAL_RANK"] = str(number)
    return number


def select_mig_instance(local_rank: int) -> int:
    """Leaves this rank its own one of the MIG instances that CUDA_VISIBLE_DEVICES lists. Returns how many it lists.

    CUDA shows a process only the first listed instance, so all ranks of a node would use the same one. Call it before
    CUDA is initialized, which reads the variable. GPUs, listed by index or by UUID, are left to CUDA.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if not listed[0].startswith("MIG-"):
        return 0
    os.environ["CUDA_VISIBLE_DEVICES"] = listed[local_rank % len(listed)]
    return len(listed)


def pci_address(device: torch.device) -> str:
    """The address of a GPU as Linux and nvidia-smi write it, whatever CUDA_VISIBLE_DEVICES is: 0000:3b:00.0."""
    found: Any = torch.cuda.get_device_properties(device)
    return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


def bind_to_close_cpus(device: torch.device) -> None:
    """Keeps this process's threads on the CPUs close to its GPU: a copy across NUMA nodes takes about twice as long.

    Under srun and torchrun alike, each rank does it itself, within the CPUs that its launcher left it.
    """
    if device.type != "cuda":
        return
    threads = torch.get_num_threads()
    if cpus := close_cpus(pci_address(device), os.sched_getaffinity(0), min(threads, MOST_THREADS)):
        for thread in Path("/proc/self/task").iterdir():  # some exist already, and new ones copy their parent's
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), cpus)
        torch.set_num_threads(min(threads, len(cpus)))


def close_cpus(address: str, allowed: set[int], wanted: int) -> set[int]:
    """Those of the allowed CPUs that are close to the PCI device; none if unknown, or if they are fewer than wanted."""
    try:
        ranges = (PCI_DEVICES / address / "local_cpulist").read_text().strip().split(",")
    except OSError:  # a container may hide it
        return set()
    ends = [(int(first), int(last or first)) for first, _, last in (each.partition("-") for each in ranges if each)]
    close = allowed & {cpu for first, last in ends for cpu in range(first, last + 1)}
    return close if len(close) >= wanted else set()


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise mean over all ranks, computed in place; the same bits on every rank."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def use_host_group(group: dist.ProcessGroup) -> None:
    """Makes the collectives below exchange small values from host to host in `group` (gloo, all ranks).

    In the default group they would wait for all work of the accelerator. That group is used until this is called.
    """
    global _host_group
    _host_group = group


def set_group_timeout(timeout: timedelta) -> None:
    """How long a later collective may take, in the default group and in that of `use_host_group`."""
    for group in {None, _host_group}:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def all_reduce_max(values: list[float]) -> list[float]:
    """The maximum of each value over all ranks; for a flag, 1.0 if it is true on any rank."""
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=_host_group)
    return largest.tolist()


def from_first(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 and broadcasts its result (a small picklable object).

    If it raises ValueError or OSError, every rank raises it. Without a process group, this process is the only rank.
    """
    result, failure = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = work()
        except (ValueError, OSError) as error:
            failure = error
    if dist.is_initialized():
        outcome: list[Any] = [result, failure and _picklable(failure)]
        dist.broadcast_object_list(outcome, src=0, group=_host_group)
        result, sent = outcome
        failure = failure or sent  # rank 0 raises the original error, with its traceback
    if failure is not None:
        raise reported_on_all_ranks(failure)
    return cast(T, result)


def _picklable(error: ValueError | OSError) -> ValueError | OSError:
    """A copy of an error for the other ranks: its message, and an OSError's number and file.

    Not every error can be pickled: urllib's HTTPError can't.
    """
    if isinstance(error, OSError) and isinstance(error.errno, int) and error.strerror:
        return OSError(error.errno, str(error.strerror), None if error.filename is None else str(error.filename))
    return OSError(str(error)) if isinstance(error, OSError) else ValueError(str(error))


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank (a small picklable object)."""
    box: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(box, value, group=_host_group)
    return box


def exchange(sent: list[np.ndarray | None], expected: dict[int, tuple[int, ...]]) -> dict[int, np.ndarray]:
    """Sends an array to each of the first ranks, and returns those that this rank was sent, by sender; all call it.

    sent: float32, one for each receiver in rank order, None for nothing; expected: the shapes by sender.
    """
    ranks = dist.get_world_size()
    given = [np.empty(0, np.float32) if array is None else array.ravel() for array in sent]
    given += [np.empty(0, np.float32)] * (ranks - len(given))
    sizes = [math.prod(expected[rank]) if rank in expected else 0 for rank in range(ranks)]
    received = torch.empty(sum(sizes), dtype=torch.float32)
    outgoing = torch.from_numpy(np.concatenate(given))
    dist.all_to_all_single(received, outgoing, sizes, list(map(len, given)), group=_host_group)
    parts = received.split(sizes)
    return {rank: parts[rank].view(shape).numpy() for rank, shape in expected.items()}


def first_message(message: str | None) -> str | None:
    """The message of the lowest rank that has one, on every rank; None if none has."""
    return next((found for found in gather(message) if found is not None), None)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """If the body raises ValueError or OSError on any rank, every rank raises.

    Otherwise the other ranks would wait for the failed one until their collective times out. The body must not call
    collectives. A rank without an error raises ValueError with the message of the lowest rank that failed.
    """
    failure: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        failure = error
    message = first_message(None if failure is None else str(failure))
    if failure is None and message is not None:
        failure = ValueError(message)
    if failure is not None:
        raise reported_on_all_ranks(failure)


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """The result of work on this rank, or its error."""

    result: T | None = None
    error: Exception | None = None

    def value(self, failed: bool) -> T:
        """The result. failed: whether the work failed on any rank, as all know; then every rank raises ValueError.

        A cheaper `raise_on_all_ranks` for every step: ranks exchange their messages only after an error.
        """
        if failed:
            with raise_on_all_ranks():
                if isinstance(self.error, ValueError | OSError):
                    raise self.error
                if self.error is not None:
                    raise ValueError(repr(self.error)) from self.error
        return cast(T, self.result)


def attempt(work: Callable[[], T]) -> Attempt[T]:
    """Runs `work`; an error of any kind is kept, because the other ranks must not wait for this one."""
    try:
        return Attempt(work())
    except Exception as error:
        return Attempt(error=error)
