"""`python -m pipeline.operate.preflight.all_reduce ...`: checks a node's accelerators, then joins an all-reduce.

It is a process of its own, because neither a call into a hanging driver nor a waiting collective can be interrupted.
It prints ACCELERATORS_OK once the accelerators are checked, ALL_REDUCE_OK after the all-reduce, and one sentence if
either fails.
"""

import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

ACCELERATORS_OK, ALL_REDUCE_OK = "accelerators ok", "all-reduce ok"
ELEMENTS = 1 << 20
"""Elements of the summed vector: 4 MB."""
FREE_MEMORY = 0.95
"""An accelerator with a smaller fraction of its memory free is in use."""
SIDE = 1024
"""Rows and columns of the matrices that each accelerator multiplies."""


@dataclass(frozen=True)
class AllReduceCheck:
    """An all-reduce between some nodes, as one of them takes part in it."""

    address: str
    """The first node, where the ranks rendezvous."""
    port: int
    rank: int
    count: int
    """Nodes that take part; with 1 only the accelerators are checked."""
    accelerators: int
    """Accelerators that this node must have; with 0 the all-reduce runs on the CPU."""
    seconds: float
    """Time limit."""

    def run(self) -> tuple[bool, list[str]]:
        """Runs the check in a process of its own. Returns whether it succeeded in time, and the lines it printed."""
        arguments = map(str, (self.address, self.port, self.rank, self.count, self.accelerators, self.seconds))
        command = [sys.executable, "-m", "pipeline.operate.preflight.all_reduce", *arguments]
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(self.seconds)
            process.kill()  # without waiting for its end: a process that hangs in a driver may never end
            output.seek(0)
            lines = output.read().splitlines()
        return ALL_REDUCE_OK in lines, lines


def take_part(check: AllReduceCheck) -> None:
    """The body of the process. Raises RuntimeError or ValueError with a sentence."""
    if check.accelerators:
        check_accelerators(check.accelerators)
    print(ACCELERATORS_OK, flush=True)
    if check.count > 1:
        check_sum(check)
    print(ALL_REDUCE_OK, flush=True)


def check_accelerators(expected: int) -> None:
    """Counts them, and has each multiply two matrices of small integers, whose product is exact in any precision.

    Raises ValueError naming the accelerator that is missing, in use or wrong.
    """
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < expected:
        raise ValueError(f"{found} of {expected} accelerators can be used")
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-4, 5, (SIDE, SIDE), generator=generator).float() for _ in range(2))
    product = left @ right
    for number in range(found):
        free, total = torch.cuda.mem_get_info(number)
        if free < FREE_MEMORY * total:
            raise ValueError(f"accelerator {number} is in use: {(total - free) / 1e9:.1f} of {total / 1e9:.0f} GB")
        device = torch.device("cuda", number)
        if not torch.equal((left.to(device) @ right.to(device)).cpu(), product):
            raise ValueError(f"accelerator {number} computes a wrong matrix product")


def check_sum(check: AllReduceCheck) -> None:
    """An all-reduce over NCCL if the nodes have accelerators, else gloo. Raises ValueError if the sum is wrong."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if check.accelerators else torch.device("cpu")
    timeout = timedelta(seconds=check.seconds)
    store = dist.TCPStore(check.address, check.port, check.count, check.rank == 0, timeout)
    backend = "nccl" if check.accelerators else "gloo"
    dist.init_process_group(backend, store=store, rank=check.rank, world_size=check.count, timeout=timeout)
    vector = torch.full((ELEMENTS,), float(check.rank + 1), device=device)
    dist.all_reduce(vector)
    expected = check.count * (check.count + 1) / 2
    if not bool((vector == expected).all()):
        raise ValueError(f"the sum over {check.count} nodes is wrong")
    dist.barrier()


if __name__ == "__main__":
    import os

    address, *rest, limit = sys.argv[1:]
    try:
        take_part(AllReduceCheck(address, *map(int, rest), float(limit)))  # type: ignore[call-arg]
    except Exception as error:
        print(" ".join(str(error).split()), flush=True)
        os._exit(1)
    os._exit(0)  # at once: destroying the process group takes time, and nothing waits for it
