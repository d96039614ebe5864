"""An all-reduce between nodes, and the check of their accelerators, as one node takes part in it.

Each accelerator has a process of its own, as in training, so that the all-reduce uses every network card that training
will use; and because neither a call into a hanging driver nor a waiting collective can be interrupted.
"""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass

ACCELERATOR_OK, ALL_REDUCE_OK = "accelerator ok", "all-reduce ok"
"""What a process prints once its accelerator is checked, and after the all-reduce; one sentence if either fails."""


@dataclass(frozen=True)
class Outcome:
    """How an all-reduce ended on a node."""

    succeeded: bool
    """Whether all processes of the node had the right sum in time."""
    accelerator_fault: str | None
    """A sentence if an accelerator of the node is missing, in use or faulty."""
    message: str | None = None
    """What a process that failed printed last: the error of NCCL, gloo or an accelerator."""


@dataclass(frozen=True)
class AllReduceCheck:
    """An all-reduce between some nodes, as one of them takes part in it."""

    address: str
    """The first node, where the ranks rendezvous."""
    port: int
    rank: int
    """The node's number among those that take part."""
    count: int
    """Nodes that take part."""
    accelerators: int
    """Accelerators that each node must have; with 0 a node takes part with one process on its CPU."""
    seconds: float
    """Time limit."""

    @property
    def processes(self) -> int:
        """Processes of each node."""
        return max(1, self.accelerators)

    def run(self) -> Outcome:
        """Runs this node's processes until all have ended, one has failed, or the time is over."""
        fields = (self.address, self.port, self.rank, self.count, self.accelerators, self.seconds)
        command = [sys.executable, "-m", "pipeline.operate.preflight.all_reduce_rank", *map(str, fields)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # they share the node's CPUs
        with ExitStack() as files:
            outputs = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(self.processes)]
            started = [
                subprocess.Popen([*command, str(number)], stdout=output, stderr=subprocess.DEVNULL, env=environment)
                for number, output in enumerate(outputs)
            ]
            codes = _await(started, self.seconds)
            for output in outputs:
                output.seek(0)
            lines = [output.read().splitlines() for output in outputs]
        succeeded = all(ALL_REDUCE_OK in printed for printed in lines)
        message = next((printed[-1] for code, printed in zip(codes, lines, strict=True) if code and printed), None)
        return Outcome(succeeded, self._accelerator_fault(codes, lines) if self.accelerators else None, message)

    def _accelerator_fault(self, codes: list[int | None], lines: list[list[str]]) -> str | None:
        unchecked = [number for number, printed in enumerate(lines) if ACCELERATOR_OK not in printed]
        for number in unchecked:
            if codes[number] is not None:
                return lines[number][-1] if lines[number] else f"the check of accelerator {number} crashed"
        if unchecked and not any(codes):  # no other failure ended the checks before their time
            return f"accelerator {', '.join(map(str, unchecked))} does not answer within {self.seconds:g} s"
        return None


def _await(processes: list[subprocess.Popen[bytes]], seconds: float) -> list[int | None]:
    """Waits for all to end or one to fail, kills the others, and returns the exit codes; None of those it killed."""
    end = time.monotonic() + seconds
    codes = [process.poll() for process in processes]
    while None in codes and not any(codes) and time.monotonic() < end:
        time.sleep(0.1)
        codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()  # without waiting for its end: a process that hangs in a driver may never end
    return codes
