"""python -m tests.pipeline.train.health.failing_rank KIND RANK FIRST LAST -- train ...: a rank fails at some steps.

KIND: nan (its gradient), spike (its gradient is a thousand times as large), hang (it stops reading), stuck (it holds
the GIL and does not return), slow (it reads 0.1 s), frozen (the process stops), diverge (one weight changes),
unreadable (its shard), broken (a weight is NaN), full (its disk), crash (its step raises, a thread waits for ever),
memory (its step can't allocate), killed.
"""

import ctypes
import errno
import os
import runpy
import signal
import sys
import threading
import time
from typing import Any

import torch

from pipeline.checkpoint import format as checkpoints
from pipeline.train.data.batches import TrainingBatches
from pipeline.train.engine.pipeline import PipelineEngine
from pipeline.train.engine.zero import ZeroEngine

KIND, (RANK, FIRST, LAST) = sys.argv[1], map(int, sys.argv[2:5])
step = 0


def ill() -> bool:
    return int(os.environ.get("RANK", "0")) == RANK and FIRST <= step <= LAST


def parameters(engine: Any) -> list[torch.nn.Parameter]:
    return list(engine._engine.module.parameters())


def make_ill(kind: type) -> None:
    built, stepped = kind.__init__, kind.step

    def init(self: Any, *arguments: Any) -> None:
        built(self, *arguments)
        factor = {"nan": float("nan"), "spike": 1000.0}.get(KIND)
        if factor is not None:
            for parameter in parameters(self):
                parameter.register_hook(lambda gradient: gradient * factor if ill() else gradient)

    def counted(self: Any, *arguments: Any) -> Any:
        if ill() and KIND == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        if ill() and KIND == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if ill() and KIND == "crash":
            threading.Thread(target=threading.Event().wait).start()
            raise RuntimeError("NCCL error: unhandled system error")
        if ill() and KIND == "memory":
            torch.empty(1 << 60, dtype=torch.uint8)
        result = stepped(self, *arguments)
        if ill() and KIND == "diverge":
            with torch.no_grad():
                parameters(self)[-1].view(-1)[0] += 1e-3
        if ill() and KIND == "broken":
            with torch.no_grad():
                parameters(self)[-1].fill_(float("nan"))
        return result

    kind.__init__, kind.step = init, counted  # type: ignore[method-assign,misc]


make_ill(ZeroEngine)
make_ill(PipelineEngine)
read = TrainingBatches.at


def read_counted(self: TrainingBatches, position: int, global_size: int) -> Any:
    global step
    step = position // global_size + 1
    if ill() and KIND == "hang":
        time.sleep(1000)
    if ill() and KIND == "stuck":
        ctypes.PyDLL(None).sleep(1000)
    if ill() and KIND == "slow":
        time.sleep(0.1)
    if ill() and KIND == "unreadable":
        raise OSError(errno.EIO, os.strerror(errno.EIO), "the shard")
    return read(self, position, global_size)


TrainingBatches.at = read_counted  # type: ignore[method-assign]
write = checkpoints.write_rank


def write_if_well(*arguments: Any) -> Any:
    if ill() and KIND == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the disk")
    return write(*arguments)


checkpoints.write_rank = write_if_well
sys.argv = ["pipeline", *sys.argv[sys.argv.index("--") + 1 :]]
runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
