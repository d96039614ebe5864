"""Run by test_restarts.py: COUNT, then the arguments of `evaluate`. It is killed after COUNT cached values; 0: never.

Prints a line for each value that it computed.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from pipeline.evaluate.cache import TaskCache
from pipeline.evaluate.command import evaluate

if __name__ == "__main__":
    count, done = int(sys.argv[1]), 0
    get_or_compute = TaskCache.get_or_compute

    def counted(cache: TaskCache, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        def recorded() -> dict[str, Any]:
            global done
            value = work()
            done += 1
            print(f"did {cache.folder.parent.name} {name}", flush=True)
            return value

        before = done
        value = get_or_compute(cache, name, recorded)
        if done > before and done == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    TaskCache.get_or_compute = counted  # type: ignore[method-assign]
    sys.exit(evaluate(sys.argv[2:]))
