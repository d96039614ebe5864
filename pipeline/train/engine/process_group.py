"""Starts DeepSpeed's process group."""

import logging
import os
import socket
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.distributed import Ranks
from pipeline.train.engine.deepspeed_internals import skip_shared_memory_collective

START_TIMEOUT = timedelta(minutes=10)
"""How long ranks wait at the rendezvous for missing ranks."""


def start_group(ranks: Ranks, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Starts DeepSpeed's process group: NCCL on CUDA, gloo on CPU. Neither needs a compiler.

    timeout: of a collective, in this group and in the groups that DeepSpeed creates. It must be longer than the
    watchdog's limit, so that the watchdog reports the missing ranks first.
    """
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone | {"MASTER_PORT": str(_free_port())} | dict(os.environ))
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.handlers.clear()  # its records go through this project's handler
    logger.propagate = True
    logger.setLevel(logging.getLogger().level)
    skip_shared_memory_collective()
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=START_TIMEOUT, verbose=False)
    dist.distributed_c10d._set_pg_timeout(timeout)
    # DeepSpeed creates groups without a timeout; NCCL's default of ten minutes is shorter than the watchdog's limit.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
