"""Measures the phases between the start of the command and the first step."""

import time

import psutil


class StartClock:
    """Divides the time since the start of this process into consecutive phases."""

    def __init__(self) -> None:
        self._began = self._last = psutil.Process().create_time()
        self._seconds: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """Ends a phase that started at the last mark."""
        now = time.time()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def describe(self) -> str:
        """The phases in one line, for the log after the first step."""
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self._seconds.items())
        return f"the first step ended {self._last - self._began:.1f} s after the command started ({phases})"
