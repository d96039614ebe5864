"""Starts DeepSpeed's process group."""

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from pipeline.distributed import Ranks, bind_to_close_cpus, integer_variable, set_group_timeout, use_host_group
from pipeline.rank_errors import RankUnreachable
from pipeline.train.engine.deepspeed_internals import read_free_memory_from_cuda, skip_shared_memory_collective
from pipeline.train.engine.rendezvous import START_TIMEOUT, Members, default_interrupt, wait_for_ranks

logger = logging.getLogger(__name__)

HEARTBEAT = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"
LONGEST_HEARTBEAT = 2_000_000
"""Seconds, 23 days; torch converts them to milliseconds in 32 bits."""
LOCAL_NAMES = ("localhost", "127.0.0.1")
DOCUMENTATION_ADDRESS = "192.0.2.1"
"""An address that is never assigned (RFC 5737): the route to it is the default route."""


def start_group(
    ranks: Ranks, timeout: timedelta = timedelta(minutes=30), of_deepspeeds: timedelta = timedelta(minutes=30)
) -> Members:
    """Starts DeepSpeed's process group, NCCL on CUDA, gloo on CPU, and a group of the hosts. None needs a compiler.

    timeout: of a collective in these two groups; `set_group_timeout` changes it. of_deepspeeds: of one in the groups
    that DeepSpeed creates later. While the watchdog runs, both must be longer than its limits, so that it reports the
    missing ranks first. Until all ranks are connected, signals have their default effect. Raises RankUnreachable.
    """
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | dict(os.environ))
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.utils import logger as deepspeeds_logger

    deepspeeds_logger.handlers.clear()  # its records go through this project's handler
    deepspeeds_logger.propagate = True
    deepspeeds_logger.setLevel(logging.getLogger().level)
    if ranks.device.type == "cpu":
        skip_shared_memory_collective()
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
        bind_to_close_cpus(ranks.device)
        read_free_memory_from_cuda()
    choose_gloo_interface(os.environ["MASTER_ADDR"] if ranks.count > 1 else "127.0.0.1")
    with default_interrupt():
        members = wait_for_ranks(ranks)
        with reporting_connections():
            connect(ranks, members)
            deepspeed.init_distributed(verbose=False)
            # DeepSpeed creates groups without a timeout; NCCL's default is shorter than the watchdog's limit.
            dist.distributed_c10d.default_pg_timeout = of_deepspeeds
            dist.distributed_c10d.default_pg_nccl_timeout = of_deepspeeds
            use_host_group(dist.new_group(backend="gloo", timeout=START_TIMEOUT))  # it connects all hosts
            set_group_timeout(timeout)
    return members


def connect(ranks: Ranks, members: Members) -> None:
    """Starts the default process group on the members' store, as DeepSpeed would on a store of its own."""
    if dist.is_initialized():
        return
    cuda = ranks.device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=members.store,
        rank=ranks.rank,
        world_size=ranks.count,
        timeout=START_TIMEOUT,
        device_id=ranks.device if cuda and ranks.count > 1 else None,
    )


@contextmanager
def reporting_connections() -> Iterator[None]:
    """Raises RankUnreachable, one sentence, if gloo can't connect the ranks."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error).lower():
            raise
        reason = str(error).partition("\n")[0].rstrip(". ")
        interface = os.environ.get("GLOO_SOCKET_IFNAME")
        raise RankUnreachable(
            f"the ranks could not connect to each other ({reason}); GLOO_SOCKET_IFNAME is {interface or 'not set'}: it "
            f"must be a network interface on which all machines reach each other, and all ranks must still be running."
        ) from error


def choose_gloo_interface(master: str) -> None:
    """Sets gloo's network interface to that which leads to rank 0, unless a user has set one.

    gloo would take the address of this machine's own name, which many distributions map to 127.0.1.1: other machines
    can't reach that. On rank 0 `master` may be that name; then the default route decides.
    """
    for target in () if master in LOCAL_NAMES else (master, DOCUMENTATION_ADDRESS):
        if interface := interface_towards(target):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            return


def interface_towards(host: str) -> str | None:
    """The network interface that leads to another machine; None without a route, or if it is this machine alone."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((host, 9))  # sends nothing
        own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if not own.startswith("127.") and any(address.address == own for address in addresses):
                return name
    return None


def set_heartbeat_timeout(timeout: timedelta, ranks: Ranks) -> None:
    """Makes torch's NCCL monitor wait as long as a collective may; call it on CUDA before `start_group`.

    The monitor aborts a process whose NCCL thread hangs in a call of CUDA, by default after 480 s: long before the
    watchdog has reported which rank is behind. A user's own value is kept. Raises ValueError if it is not an integer.

    torch's other variables keep their defaults. An error of NCCL, such as a lost rank, ends the process after a minute
    (TORCH_NCCL_ASYNC_ERROR_HANDLING is 3, and 1 under torchrun, which also aborts the communicators): that is not a
    hang, and the lost rank has the cause in its log. A collective that takes too long ends it too, after `timeout`.
    Both first write torch's flight recorder to a file (TORCH_NCCL_DUMP_ON_TIMEOUT). TORCH_NCCL_BLOCKING_WAIT stays off:
    with it the host would wait for each collective.
    """
    needed = min(int(timeout.total_seconds()), LONGEST_HEARTBEAT)
    os.environ.setdefault(HEARTBEAT, str(needed))
    if integer_variable(HEARTBEAT, needed) < needed and ranks.is_first:
        logger.warning(
            f"{HEARTBEAT} is {os.environ[HEARTBEAT]}; torch may end a rank that hangs before the watchdog reports "
            f"which rank is behind: unset it, or set it to {needed} or more"
        )
