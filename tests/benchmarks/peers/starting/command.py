"""A turn that starts a command anew: to a line that it prints, or to its end.

python -m tests.benchmarks.peers.starting.command JSON

JSON has `first`, a list of commands that are run once before the first turn, as to train a checkpoint; `command`, what
a turn starts; and `until`, a regular expression of the line that ends the turn, or null for the command's end.
`{python}` is the interpreter of the environment.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

from tests.benchmarks.peers.turn import serve


def started(words: list[str]) -> subprocess.Popen[str]:
    """The command in a process group of its own, standard output and error together."""
    return subprocess.Popen(
        [word.replace("{python}", sys.executable) for word in words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def turn(command: list[str], until: str | None) -> dict[str, Any]:
    """The seconds from the start to that line; then the command is killed. Its last line is the error, if it ends."""
    began, last = time.perf_counter(), ""
    process = started(command)
    assert process.stdout is not None
    for line in process.stdout:
        if until is not None and re.search(until, line):
            seconds = time.perf_counter() - began
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"work": 1.0, "first_step": seconds}
        last = line.strip() or last
    if process.wait() or until is not None:
        raise RuntimeError(last)
    return {"work": 1.0, "first_step": time.perf_counter() - began}


def main() -> None:
    """Takes turns."""
    order = json.loads(sys.argv[1])
    for command in order["first"]:
        process = started(command)
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError((output.strip().splitlines() or [""])[-1])
    serve(lambda: turn(order["command"], order["until"]))


if __name__ == "__main__":
    main()
