"""Times a module's forward passes."""

from time import perf_counter
from typing import Any

import torch
from torch import nn


class ForwardTimer:
    """Sums the time of a module's forward passes; on an accelerator with events, without synchronizing."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._cuda, self._seconds, self._began = device.type == "cuda", 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def read(self) -> float:
        """Seconds since the last call; on an accelerator the last forward pass must have ended."""
        seconds = self._seconds + sum(first.elapsed_time(last) / 1000 for first, last in self._events)
        self._seconds, self._events = 0.0, []
        return seconds

    def _begin(self, *_: Any) -> None:
        if self._cuda:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events.append(pair)
            pair[0].record()
        else:
            self._began = perf_counter()

    def _end(self, *_: Any) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += perf_counter() - self._began
