"""The worker: runs parts one after the other in one process, and reports each line to the supervisor at once."""

import faulthandler
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, TextIO

from tests.benchmarks.accelerator.parts import Part
from tests.benchmarks.accelerator.report import Row, failed

DEVICE_LOST = 3
"""The exit code after an error that leaves the device unusable; a new worker continues."""


def work(parts: Sequence[Part], end: float, pipe: TextIO) -> int:
    """Runs the parts until `end` on the monotonic clock, which all processes share. Returns the exit code."""

    def send(kind: str, *content: Any) -> None:
        pipe.write(json.dumps([kind, *content]) + "\n")
        pipe.flush()

    for part in parts:
        left = end - time.monotonic()
        if left < part.needs:
            send("skipped", part.name)
            continue
        send("begin", part.name)
        # A thread in C, which needs no GIL: it writes all stacks and ends the process, wherever that is stuck.
        faulthandler.dump_traceback_later(max(0.1, min(part.seconds, left)), exit=True, file=sys.stderr)
        good = _run(part, send)
        faulthandler.cancel_dump_traceback_later()
        send("end", part.name)
        if not good and not device_answers():
            return DEVICE_LOST
        clear()
    return 0


def _run(part: Part, send: Any) -> bool:
    """Sends what a part yields, and a failed row for what it raises."""
    print(f"\n== {part.name}, process {os.getpid()}", file=sys.stderr, flush=True)
    since = time.monotonic()
    try:
        for found in part.run():
            now = time.monotonic()
            if isinstance(found, Row):
                send("row", *found, now - since)
                since = now
            else:
                send("table", str(found))
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        send("row", *failed(part.name, error), time.monotonic() - since)
        return False
    return True


def device_answers() -> bool:
    """Whether the device can still be used: after some errors of CUDA every later call fails."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        traceback.print_exc()
        return False
    return True


def clear() -> None:
    """Frees what a part has left: its engines, its compiled code and the memory of the device."""
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage twenty times while an engine starts: modules are excluded
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main(parts: Sequence[Part], end: float, pipe: int) -> None:
    """The worker's process, which ends without a shutdown: process groups and compile workers may hold it up."""
    faulthandler.enable()
    with os.fdopen(pipe, "w") as file:
        code = work(parts, end, file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
