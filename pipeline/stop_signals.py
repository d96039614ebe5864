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

    SIGHUP, a closed terminal, stays ignored if it was ignored, as by nohup. Signals that the parent process had
    blocked are unblocked: a blocked signal never arrives, and the job would be killed when its time is over.
    """
    former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, earlier in former.items():
        stays_ignored = number == signal.SIGHUP and earlier == signal.SIG_IGN
        signal.signal(number, signal.SIG_IGN if stays_ignored else handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return former
