"""The side of a script that is measured: takes a turn whenever it is asked to, and says what the turn cost.

It runs in the peers' environments too, so it imports only the standard library, and psutil where there is one.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping

ANSWERS = "BENCHMARK_ANSWERS"
"""Environment variable: the file descriptor of the pipe for answers."""


def serve(turn: Callable[[], Mapping[str, object] | float]) -> None:
    """Takes turns until standard input ends: a line asks for one, and a line of JSON in the pipe ANSWERS answers.

    turn: returns the work that it did, in the table's unit, or figures by name, of which `work` is one. The answer
    holds these, `seconds` on the clock, `cpu_seconds` and the peak of `megabytes`, each of this process and all that it
    started. Standard output is not the pipe, because libraries write to it.
    """
    answers = os.fdopen(int(os.environ[ANSWERS]), "w")
    os.set_inheritable(answers.fileno(), False)
    _answer(answers, {"ready": True})
    for _ in sys.stdin:
        began, used = time.perf_counter(), cpu_seconds()
        done = turn()
        cost = {"seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - used, "megabytes": _megabytes()}
        _answer(answers, cost | dict(done if isinstance(done, Mapping) else {"work": float(done)}))


def _answer(answers: object, figures: Mapping[str, object]) -> None:
    print(json.dumps(figures), file=answers, flush=True)  # type: ignore[call-overload]


def cpu_seconds() -> float:
    """Of this process, of those that it started and waited for, and of those that still run."""
    waited_for = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + waited_for.ru_utime + waited_for.ru_stime
    try:
        import psutil

        for child in psutil.Process().children(recursive=True):
            try:
                total += sum(child.cpu_times()[:4])
            except psutil.Error:
                continue  # it ended meanwhile, and its parent counts it
    except ImportError:
        pass
    return total


def _megabytes() -> float:
    """The largest resident set among this process and those that it waited for."""
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(own, children) / 1024
