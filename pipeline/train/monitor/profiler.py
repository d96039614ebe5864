"""Profiles a few steps with torch's profiler: a trace for TensorBoard or a browser, and the share of communication."""

import logging
import time
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pipeline.config import ProfileConfig
from pipeline.distributed import Ranks
from pipeline.train.health.stop import RequestFile

logger = logging.getLogger(__name__)

PROFILE_FOLDER = "profile"
REQUEST_FILE = "PROFILE"
COMMUNICATION = ("gloo:", "ncclDevKernel")
"""Prefixes of the names of collectives: gloo's records on the host, and the kernels of NCCL."""
LONGEST = 5
"""Number of longest operations to log."""
NAME_LENGTH = 60
"""Characters of an operation's name to log; names of kernels are C++ templates of any length."""


class Profiler:
    """Starts a window at profile.first_step, or when the file PROFILE appears in the run, on all ranks."""

    def __init__(self, run: Path, config: ProfileConfig, ranks: Ranks) -> None:
        self._run, self._config, self._ranks = run, config, ranks
        self._request = RequestFile(run / REQUEST_FILE, checks=ranks.is_first)
        self._window: profile | None = None
        self._left, self._first, self._began = 0, 0, 0.0

    def requested(self) -> bool:
        """Whether rank 0 sees the file PROFILE; the loop all-reduces the answer."""
        return self._window is None and self._request.found()

    def before(self, step: int, requested: bool) -> None:
        """Starts the window before a step, if it is due or requested on any rank."""
        if self._window is not None or not (requested or (self._config.steps and step == self._config.first_step)):
            return
        if requested:
            self._request.delete()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._ranks.device.type == "cuda" else [])]
        self._window = profile(activities=kinds)
        self._left, self._first, self._began = self._config.steps or 3, step, time.perf_counter()
        self._window.start()

    def after(self, step: int) -> str | None:
        """Ends the window after its last step; returns the summary on rank 0."""
        if self._window is None:
            return None
        self._left -= 1
        return self.close(step) if self._left == 0 else None

    def close(self, step: int) -> str | None:
        """Ends the window, if one is open, after any of its steps."""
        if self._window is None:
            return None
        window, self._window = self._window, None
        window.stop()
        folder = self._run / PROFILE_FOLDER
        trace = folder / f"rank-{self._ranks.rank:05d}-step-{self._first:08d}.pt.trace.json.gz"
        try:
            folder.mkdir(exist_ok=True)
            window.export_chrome_trace(str(trace))
        except (OSError, RuntimeError) as error:  # must not end the run
            logger.warning(f"the profile was not written to {trace}: {error}")
        if not self._ranks.is_first:
            return None
        seconds = time.perf_counter() - self._began
        return f"profile of steps {self._first} to {step}: {describe(window.key_averages(), seconds)}; trace: {trace}"


def describe(events: Any, seconds: float) -> str:
    """The share of the window's time in communication, and in the longest operations.

    events: those of `key_averages()`. On an accelerator only its kernels and copies count. Operations of the host, and
    the spans that annotations such as nccl:all_reduce cover on the device, include the time of the same kernels.
    """
    kernels = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    spent = {e.key: e.self_device_time_total for e in kernels} or {e.key: _host_microseconds(e) for e in events}
    communication = sum(spent[key] for key in spent if key.startswith(COMMUNICATION))
    longest = sorted((key for key in spent if not key.startswith(COMMUNICATION)), key=lambda key: -spent[key])
    shares = ", ".join(f"{key[:NAME_LENGTH]} {spent[key] / 1e6 / seconds:.1%}" for key in longest[:LONGEST])
    return f"{communication / 1e6 / seconds:.1%} in communication; longest: {shares}"


def _host_microseconds(event: Any) -> float:
    """Of a collective's record, with all that it calls; of an operation, without the operations that it calls."""
    is_collective = event.key.startswith(COMMUNICATION)
    return float(event.cpu_time_total if is_collective else event.self_cpu_time_total)
