"""The side that measures: runs ours and the peers' scripts as processes, and lets them take turns one after the other.

Each script is a process with the same threads and the same data, which it gets as arguments. It prepares what it needs,
takes one turn to warm up, which is not counted, and then some that are, alternately with the others. While one works,
the others wait, but all prepare and warm up at the same time, because nothing of that is measured. A script that can't
be started, or fails, is named with its error.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from tempfile import TemporaryFile
from typing import IO, Any

from tests.benchmarks.peers.install import ERROR, FOLDER, ROOT
from tests.benchmarks.peers.turn import ANSWERS

TURNS = 5
SLOW_TURNS = 3
"""Of what takes many seconds, so that all parts end within a quarter of an hour."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")
HEAD = "| work | unit | ours | beside | its figure | times as good |\n|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Script:
    """One of those that are compared."""

    name: str
    """As the table names it."""
    module: str
    """`python -m MODULE ARGUMENTS` takes the turns, with turn.serve()."""
    arguments: Sequence[object] = ()
    environment: str | None = None
    """The line of tests/benchmarks/requirements.txt in whose virtual environment it runs; None: in ours."""
    variables: tuple[tuple[str, str], ...] = ()
    """Of the environment, beside those that pin the threads."""
    is_reference: bool = False
    """Not a library to use instead of ours: it shows what a part of the work takes at best."""


@dataclass
class Measured:
    """What one script's turns gave: lists, by the name of the figure, or the error with which it failed."""

    script: Script
    turns: dict[str, list[Any]] = field(default_factory=dict)
    error: str | None = None

    def rates(self, per: str = "seconds") -> list[float]:
        """Work a second of each turn; per: `seconds` on the clock, or `cpu_seconds`."""
        return [work / seconds for work, seconds in zip(self.turns["work"], self.turns[per], strict=True)]


def compare(
    *scripts: Script, turns: int = TURNS, threads: int = 1, seconds: float = 1_800, warm_up: bool = True
) -> list[Measured]:
    """Runs the scripts in turns, and gives their figures in the same order. seconds: the limit of a turn.

    warm_up: False for turns that start a process anew, which nothing can warm up.
    """
    measured = [Measured(script) for script in scripts]
    processes = [_Process(script, threads) for script in scripts]
    pairs = list(zip(processes, measured, strict=True))
    try:
        for process, result in pairs:
            _attempt(result, process, process.answer, seconds)
        if warm_up:
            for process, result in pairs:
                _attempt(result, process, process.ask)
            for process, result in pairs:
                _attempt(result, process, process.answer, seconds)
        for _ in range(turns):
            for process, result in pairs:
                for name, figure in (_attempt(result, process, process.turn, seconds) or {}).items():
                    result.turns.setdefault(name, []).append(figure)
    finally:
        for process in processes:
            process.close()
    return measured


def _attempt(result: Measured, process: "_Process", action: Callable[..., Any], *arguments: Any) -> Any:
    """What an action of the process gives; None if the script has failed, now or before."""
    if result.error is not None:
        return None
    try:
        return action(*arguments)
    except ScriptError as error:
        result.error, result.turns = str(error), {}
        process.close()  # one that took too long would compute on during the others' turns
        return None


class ScriptError(Exception):
    """What a script failed with: the last line that it wrote."""


class _Process:
    """A script that runs."""

    def __init__(self, script: Script, threads: int) -> None:
        self._errors: IO[str] = TemporaryFile("w+")  # noqa: SIM115
        self._process: subprocess.Popen[str] | None = None
        python, self._problem = _python(script.environment)
        if self._problem is not None:
            return
        variables = {**os.environ, **dict.fromkeys(THREADS, str(threads)), "TOKENIZERS_PARALLELISM": "false"}
        variables |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **dict(script.variables)}
        reading, writing = os.pipe()
        self._answers = os.fdopen(reading)
        self._process = subprocess.Popen(
            [python, "-m", script.module, *map(str, script.arguments)],
            cwd=ROOT,
            env={**variables, ANSWERS: str(writing)},
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            text=True,
            start_new_session=True,
            pass_fds=(writing,),
        )
        os.close(writing)

    def ask(self) -> None:
        """Has it begin a turn."""
        assert self._process is not None and self._process.stdin is not None
        try:
            print(file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise ScriptError(self._last_error()) from None

    def turn(self, seconds: float) -> dict[str, Any]:
        """Has it take a turn; its figures."""
        self.ask()
        return self.answer(seconds)

    def answer(self, seconds: float) -> dict[str, Any]:
        """Waits until it is ready for its first turn, or for the figures of a turn."""
        if self._problem is not None:
            raise ScriptError(self._problem)
        if not _readable(self._answers, seconds):
            raise ScriptError(f"it took more than {seconds:g} s")
        line = self._answers.readline()
        if not line:
            raise ScriptError(self._last_error())
        return json.loads(line)

    def _last_error(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return lines[-1] if lines else f"it ended with code {code}"

    def close(self) -> None:
        """Ends the script and what it started."""
        if self._process is None or self._errors.closed:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._errors.close()
        self._answers.close()


def _readable(stream: IO[str], seconds: float) -> bool:
    """Whether a line comes within some seconds; an answer is one line, so nothing is left in the buffer."""
    return bool(select([stream], [], [], seconds)[0])


def _python(environment: str | None) -> tuple[Path | str, str | None]:
    """The interpreter of a peer's environment, and why it can't be used."""
    if environment is None:
        return sys.executable, None
    folder = FOLDER / environment
    if (folder / ERROR).exists():
        return "", f"not installed: {(folder / ERROR).read_text().strip()}"
    if not (folder / "bin/python").exists():
        return "", f"{folder.relative_to(ROOT)} does not exist; `make peers` creates it"
    return folder / "bin/python", None


def values(one: Measured, figure: str = "rate") -> list[float]:
    """The figure of each turn, or `rate` and `cpu_rate`; empty if the script failed, or does not have it."""
    if one.error is not None:
        return []
    if figure in one.turns or figure not in ("rate", "cpu_rate") or "work" not in one.turns:
        return one.turns.get(figure, [])
    return one.rates("seconds" if figure == "rate" else "cpu_seconds")


def shown(value: float) -> str:
    """Four significant digits, without an exponent."""
    return f"{float(f'{value:.4g}'):,.12g}"


def spread(values: Sequence[float]) -> str:
    """The median, and the smallest and largest value."""
    return f"{shown(statistics.median(values))} ({shown(min(values))} to {shown(max(values))})"


def lines(work: str, unit: str, measured: Sequence[Measured], per: str = "seconds") -> Iterator[str]:
    """A line of the table for each peer; the first of `measured` is ours. Rates: more is better."""
    yield from _lines(work, unit, measured, [one.rates(per) if one.error is None else [] for one in measured], True)


def lines_of(
    work: str, unit: str, measured: Sequence[Measured], figure: str, *, more_is_better: bool = False
) -> Iterator[str]:
    """As lines(), of a figure as it stands, such as seconds to the first batch."""
    yield from _lines(work, unit, measured, [one.turns.get(figure, []) for one in measured], more_is_better)


def _lines(
    work: str, unit: str, measured: Sequence[Measured], values: Sequence[list[float]], more_is_better: bool
) -> Iterator[str]:
    ours, own = measured[0], values[0]
    own_cell = f"fails: {cell(ours.error)}" if ours.error else spread(own)
    for peer, theirs in zip(measured[1:], values[1:], strict=True):
        name = f"{peer.script.name}{' (reference)' * peer.script.is_reference}"
        if peer.error is not None:
            yield f"| {work} | {unit} | {own_cell} | {name} | fails: {cell(peer.error)} | |"
            continue
        times = _times(own, theirs, more_is_better) if own else None
        ratio = "" if times is None else f"{times:.2f}{', behind' * (times < 1 and not peer.script.is_reference)}"
        yield f"| {work} | {unit} | {own_cell} | {name} | {spread(theirs)} | {ratio} |"


def _times(own: Sequence[float], theirs: Sequence[float], more_is_better: bool) -> float:
    """How many times as good ours is."""
    ratio = statistics.median(own) / statistics.median(theirs)
    return ratio if more_is_better else 1 / ratio


def cell(text: str) -> str:
    """A text for a cell of a table."""
    return " ".join(text.split()).replace("|", "/")
