"""`python -m pipeline.operate.preflight.allreduce ...`: a node's first accelerator, or its CPU, joins an all-reduce.

A process of its own, because neither a driver that does not answer nor a collective that waits can be called back.
It prints LOOKED once the accelerators were looked at, MET after the all-reduce, and a sentence where either went wrong.
"""

import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

LOOKED, MET = "accelerators looked at", "met"
NUMBERS = 1 << 20
"""Of the vector that is summed: 4 MB."""
IDLE = 0.95
"""Share of an accelerator's memory that is free where nothing else runs."""
SIDE = 1024
"""Of the matrices whose product an accelerator must get right."""


@dataclass(frozen=True)
class Meeting:
    """Who meets where."""

    address: str
    port: int
    rank: int
    count: int
    """Nodes that meet; 1 only looks at the accelerators."""
    accelerators: int
    """That this node should have; 0 meets on the CPU."""
    seconds: float

    def hold(self) -> tuple[bool, list[str]]:
        """Takes part, until it is over or its seconds are. Returns whether it went well, and what was printed."""
        arguments = map(str, (self.address, self.port, self.rank, self.count, self.accelerators, self.seconds))
        command = [sys.executable, "-m", "pipeline.operate.preflight.allreduce", *arguments]
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(command, stdout=said, stderr=subprocess.DEVNULL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(self.seconds)
            process.kill()  # and not waited for: a process in a driver's call may never go
            said.seek(0)
            lines = said.read().splitlines()
        return MET in lines, lines


def take_part(meeting: Meeting) -> None:
    """What the process does. Raises RuntimeError or ValueError with a sentence."""
    if meeting.accelerators:
        look_at_accelerators(meeting.accelerators)
    print(LOOKED, flush=True)
    if meeting.count > 1:
        sum_with_all(meeting)
    print(MET, flush=True)


def look_at_accelerators(expected: int) -> None:
    """Counts them, and has each multiply two matrices of small whole numbers, exact in any precision.

    Raises ValueError naming the one that is missing, in use or wrong.
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
        if free < IDLE * total:
            raise ValueError(f"accelerator {number} is in use: {(total - free) / 1e9:.1f} of {total / 1e9:.0f} GB")
        device = torch.device("cuda", number)
        if not torch.equal((left.to(device) @ right.to(device)).cpu(), product):
            raise ValueError(f"accelerator {number} multiplies wrongly")


def sum_with_all(meeting: Meeting) -> None:
    """An all-reduce over NCCL where there are accelerators, else gloo. Raises ValueError if the sum is wrong."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if meeting.accelerators else torch.device("cpu")
    timeout = timedelta(seconds=meeting.seconds)
    store = dist.TCPStore(meeting.address, meeting.port, meeting.count, meeting.rank == 0, timeout)
    backend = "nccl" if meeting.accelerators else "gloo"
    dist.init_process_group(backend, store=store, rank=meeting.rank, world_size=meeting.count, timeout=timeout)
    numbers = torch.full((NUMBERS,), float(meeting.rank + 1), device=device)
    dist.all_reduce(numbers)
    wanted = meeting.count * (meeting.count + 1) / 2
    if not bool((numbers == wanted).all()):
        raise ValueError(f"the sum over {meeting.count} nodes is wrong")
    dist.barrier()


if __name__ == "__main__":
    import os

    address, *rest, limit = sys.argv[1:]
    try:
        take_part(Meeting(address, *map(int, rest), float(limit)))  # type: ignore[call-arg]
    except Exception as error:
        print(" ".join(str(error).split()), flush=True)
        os._exit(1)
    os._exit(0)  # as it stands: the group's own end is slow, and no one waits for it
