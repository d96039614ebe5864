"""How the ranks of a run come together in DeepSpeed's process group."""

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
"""How long the ranks that are there wait for one that is not."""


def start_group(ranks: Ranks, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Starts DeepSpeed's process group: NCCL on CUDA, gloo on CPU, no compiler needed for either.

    timeout: of a collective, in this group and in those that DeepSpeed makes; so long that the watchdog is there
    first and reports who is missing.
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
    # DeepSpeed makes groups without a timeout: NCCL's own ten minutes would end before the watchdog's.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
