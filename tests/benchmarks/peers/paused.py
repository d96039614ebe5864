"""Lets a library's own training loop take turns: it stops where a turn ends, until the next is asked for.

It runs in the peers' environments too, so it imports only the standard library.
"""

import os
import threading
import traceback
from collections.abc import Callable, Mapping

from tests.benchmarks.peers.turn import serve


class PausedLoop:
    """A training loop that calls `pause` where a turn ends, and runs from there to the next pause in the next turn."""

    def __init__(self) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._figures: Mapping[str, object] = {}

    def pause(self, figures: Mapping[str, object]) -> None:
        """From the loop: ends a turn with these figures, and waits for the next one."""
        self._figures = figures
        self._done.release()
        self._go.acquire()

    def wait(self) -> None:
        """From the loop: waits for the first turn."""
        self._go.acquire()

    def turn(self) -> Mapping[str, object]:
        """Lets the loop run to its next pause; the figures of the turn."""
        self._go.release()
        self._done.acquire()
        return self._figures


def serve_loop(run: Callable[[PausedLoop], object]) -> None:
    """Takes turns with a loop that runs in this thread, the main one, as libraries that handle signals need.

    run: trains without end. Ends the process when no more turns are asked for, or with an error.
    """
    loop = PausedLoop()

    def answer() -> None:
        serve(loop.turn)
        os._exit(0)  # the loop waits for a turn that does not come

    threading.Thread(target=answer, daemon=True).start()
    loop.wait()
    try:
        run(loop)
        raise RuntimeError("the training ended between two turns")
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # not through a library's own handlers and threads
