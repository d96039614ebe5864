"""python -m pipeline.operate.preflight.all_reduce_rank: one process of an all-reduce, which checks one accelerator.

Its arguments are the fields of AllReduceCheck, and the number of the accelerator.
"""

import os
import shutil
import subprocess
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.distributed import pci_address, select_mig_instance
from pipeline.operate.preflight.all_reduce import ACCELERATOR_OK, ALL_REDUCE_OK, AllReduceCheck

ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Elements of the summed vector: 4 MB; 64 MB, which NCCL divides among all network cards."""
USED_FRACTION, CONTEXT_BYTES = 0.05, 1e9
"""More used memory is that of another program; CUDA itself takes up to 1 GB, also of a small MIG instance."""
SIDE = 1024
"""Rows and columns of the matrices that each accelerator multiplies."""
MEMORY_ERRORS = ("nvidia-smi", "--query-gpu=ecc.errors.uncorrected.volatile.total", "--format=csv,noheader")
SMI_SECONDS = 60.0


def take_part(check: AllReduceCheck, number: int) -> None:
    """The body of a process: the node's accelerator `number`. Raises an error with a sentence."""
    device = select_accelerator(number, check.accelerators) if check.accelerators else torch.device("cpu")
    if check.accelerators:
        check_accelerator(device, number)
    print(ACCELERATOR_OK, flush=True)
    if check.count * check.processes > 1:
        check_sum(check, number, device)
    print(ALL_REDUCE_OK, flush=True)


def select_accelerator(number: int, expected: int) -> torch.device:
    """The accelerator that a rank of this local rank would use. Raises ValueError if fewer than expected are there."""
    listed = select_mig_instance(number)
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = listed if listed and visible else visible
    if found < expected:
        raise ValueError(f"{found} of {expected} accelerators can be used")
    device = torch.device("cuda", number % visible)
    torch.cuda.set_device(device)
    return device


def check_accelerator(device: torch.device, number: int) -> None:
    """Has it multiply two matrices of small integers, whose product is exact in any precision.

    Raises ValueError if it is in use, has memory errors, or the product is wrong.
    """
    free, total = torch.cuda.mem_get_info(device)
    if total - free > max(USED_FRACTION * total, CONTEXT_BYTES):
        raise ValueError(f"accelerator {number} is in use: {(total - free) / 1e9:.1f} of {total / 1e9:.0f} GB")
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-4, 5, (SIDE, SIDE), generator=generator).float() for _ in range(2))
    if not torch.equal((left.to(device) @ right.to(device)).cpu(), left @ right):
        raise ValueError(f"accelerator {number} computes a wrong matrix product")
    if errors := memory_errors(pci_address(device)):
        raise ValueError(f"accelerator {number} ({pci_address(device)}) has {errors} uncorrected memory errors")


def memory_errors(address: str) -> int:
    """Uncorrected memory errors of the GPU at a PCI address; 0 if nvidia-smi is not there or does not count them.

    Neither nvidia-smi's numbers nor its UUIDs are always those of CUDA_VISIBLE_DEVICES; the address is the same.
    """
    if shutil.which(MEMORY_ERRORS[0]) is None:
        return 0
    query = [*MEMORY_ERRORS, f"--id={address}"]
    counted = subprocess.run(query, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout.strip()
    return int(counted) if counted.isdecimal() else 0


def check_sum(check: AllReduceCheck, number: int, device: torch.device) -> None:
    """An all-reduce between all processes, over NCCL or gloo. Raises ValueError if the sum is wrong."""
    rank, ranks = check.rank * check.processes + number, check.count * check.processes
    timeout = timedelta(seconds=check.seconds)
    store = dist.TCPStore(check.address, check.port, ranks, rank == 0, timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    vector = torch.full((ELEMENTS[device.type],), float(rank + 1), device=device)
    dist.all_reduce(vector)
    if not bool((vector == ranks * (ranks + 1) / 2).all()):
        raise ValueError(f"the sum over {ranks} ranks is wrong")
    # A process that exits while another still receives from it breaks that one's all-reduce: each waits until all have
    # the sum. Rank 0 holds the store, so it also waits until no other rank needs it.
    for stage in ("summed", "done"):
        store.set(f"{stage} {rank}", "")
        if stage == "summed" or rank == 0:
            store.wait([f"{stage} {other}" for other in range(ranks)], timeout)


if __name__ == "__main__":
    address, *numbers, limit, own = sys.argv[1:]
    try:
        take_part(AllReduceCheck(address, *map(int, numbers), float(limit)), int(own))  # type: ignore[call-arg]
    except Exception as error:
        print(" ".join(str(error).split()), flush=True)
        os._exit(1)
    os._exit(0)  # at once: destroying the process group takes time, and nothing waits for it
