"""From the command to the first step: where the time goes."""

import time

import psutil


class StartClock:
    """Divides the time since this process began into phases that follow on each other."""

    def __init__(self) -> None:
        self._began = self._last = psutil.Process().create_time()
        self._seconds: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """What was done since the last mark was this phase."""
        now = time.time()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def describe(self) -> str:
        """For the console, after the first step."""
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self._seconds.items())
        return f"the first step ended {self._last - self._began:.1f} s after the command began: {phases}"
