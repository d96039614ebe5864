"""Signs that a run is not well: requests to stop, numbers that are none or jump, copies that differ, slow ranks."""

import signal
from collections import Counter, deque
from collections.abc import Iterable
from math import nan, sqrt
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

from data_prep.common.command_line import SAID_BY_OTHERS
from pipeline.config import HealthConfig
from pipeline.distributed import Ranks, gather
from pipeline.train.engine.base import Engine, StepResult, are_finite

STOP_FILE = "STOP"
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
SLOW = 1.5
"""Times the median of its peers' own time a step, and a rank is called slow."""
SLOW_STEPS = 50
"""Steps between two comparisons."""


class StopRequests:
    """Remembers a signal (USR1, TERM, INT) or a STOP file in the run, until the loop asks at a step boundary.

    A second Ctrl-C does not wait.
    """

    def __init__(self, run: Path) -> None:
        self._file = run / STOP_FILE
        self._signalled = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True

    def pending(self) -> bool:
        """True once this process was asked to stop."""
        return self._signalled or self._file.exists()

    def honour(self) -> None:
        """Takes the STOP file away, so that the run can be started again."""
        self._file.unlink(missing_ok=True)


class Diverged(RuntimeError):
    """Training can't go on: numbers that are none, or ranks that no longer train the same model. All ranks raise it."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        setattr(self, SAID_BY_OTHERS, True)


class ReplicasDiffer(Diverged):
    """Ranks that should hold the same weights do not."""


class Judge:
    """Decides which steps are applied, alike on all ranks: they see the same losses and gradient norms."""

    def __init__(self, config: HealthConfig, rows: Iterable[dict[str, Any]] = ()) -> None:
        """rows: of the last steps of metrics.jsonl, so that a resumed run decides as one that went on."""
        self._config = config
        self._window: deque[tuple[float, float]] = deque(maxlen=config.spike_window)
        self._reason: str | None = None
        self.skipped_in_a_row = 0
        self.weights_doubtful = False
        """Whether the last step's loss or gradients were no numbers: the weights may be none either."""
        for row in rows:
            self._count(row["applied"], *(nan if row[key] is None else row[key] for key in ("loss", "grad_norm")))

    def accept(self, loss: float, grad_norm: float) -> bool:
        """Whether the update of such a step is to be made."""
        if not are_finite(loss, grad_norm):
            self._reason = "not finite"
        elif self._is_spike(loss, grad_norm):
            self._reason = "a spike"
        return self._reason is None or (self._reason == "a spike" and not self._config.skip_spikes)

    def verdict(self, result: StepResult) -> str | None:
        """What was wrong with the step that `accept` was asked about last, or None."""
        reason, self._reason = self._reason, None
        self._count(result.applied, result.loss, result.grad_norm)
        return reason if result.applied else reason or "not finite"

    @property
    def exhausted(self) -> bool:
        """Whether health.max_skipped steps in a row were not applied."""
        return self.skipped_in_a_row >= self._config.max_skipped

    def _count(self, applied: bool, loss: float, grad_norm: float) -> None:
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        self.weights_doubtful = not applied and not are_finite(loss, grad_norm)
        if applied:
            self._window.append((loss, grad_norm))

    def _is_spike(self, loss: float, grad_norm: float) -> bool:
        """Either is beyond spike_sigmas standard deviations of the window, which must be full."""
        if not self._config.spike_sigmas or len(self._window) < self._config.spike_window:
            return False
        return any(
            value > mean + self._config.spike_sigmas * deviation
            for value, (mean, deviation) in zip(
                (loss, grad_norm), map(_mean_and_deviation, zip(*self._window, strict=True)), strict=True
            )
        )


def _mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    numbers = list(values)
    mean = sum(numbers) / len(numbers)
    return mean, sqrt(sum((number - mean) ** 2 for number in numbers) / len(numbers))


def check_replicas(engine: Engine, step: int) -> None:
    """Compares the weights of ranks that should hold the same. Raises ReplicasDiffer on every rank, naming the odd.

    Every rank calls it. Under ZeRO-1 and 2 each update gathers the weights anew, so what is found there is what went
    wrong since the last update.
    """
    holdings = gather(engine.digests())
    for replica in dict.fromkeys(name for held in holdings for name in held):
        digests = {rank: held[replica] for rank, held in enumerate(holdings) if replica in held}
        (usual, times), *others = Counter(digests.values()).most_common()
        if others:
            odd = [rank for rank, digest in digests.items() if digest != usual]
            standing = "from the others" if times > len(odd) else f"from {len(digests) - len(odd)} others"
            raise ReplicasDiffer(
                f"at step {step} the weights of ranks {', '.join(map(str, odd))} differ {standing}, though all should "
                f"hold the same: a device or its memory fails, or a collective went wrong; nothing was saved since, "
                f"and the last checkpoint is from before step {step}."
            )


class SlowRanks:
    """Names ranks that compute or read much longer than those that do the same work."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._steps, self._waited = ranks, 0, 0.0

    def look(self, engine: Engine, waited: float) -> str | None:
        """After each step, on all ranks; `waited`: seconds for data. Now and then a sentence, if a rank is slow."""
        self._steps, self._waited = self._steps + 1, self._waited + waited
        if self._steps < SLOW_STEPS:
            return None
        own = gather((engine.work, engine.forward_seconds(), self._waited))
        steps, self._steps, self._waited = self._steps, 0, 0.0
        slow = []
        for rank, (work, forward, waiting) in enumerate(own):
            peers = [their[1] + their[2] for other, their in enumerate(own) if their[0] == work and other != rank]
            if peers and forward + waiting > SLOW * median(peers):
                slow.append(
                    f"rank {rank} took {(forward + waiting) / steps:.3f} s a step ({waiting / steps:.3f} s waiting for "
                    f"data), its peers' median is {median(peers) / steps:.3f} s"
                )
        return f"slow over the last {steps} steps: {'; '.join(slow)}" if slow else None
