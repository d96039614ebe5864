"""The signals that ask a process to save its work and stop."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_INTERRUPT_SECONDS = 1.0
"""A Ctrl-C so soon after another signal is the same request: torchrun repeats what its ranks got from the terminal."""


def handle_stop_signals(handler: Callable[[int, FrameType | None], Any]) -> dict[signal.Signals, Any]:
    """Makes `handler` handle STOP_SIGNALS; returns the handlers before it.

    SIGHUP, a closed terminal, is left ignored if it was ignored, as by nohup. Signals that the parent process had
    blocked are unblocked: a blocked signal never arrives, and the job would be killed when its time is over.
    """
    numbers = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    former = {number: signal.signal(number, handler) for number in numbers}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    return former
