"""The exit codes of all commands; the job scripts read them."""

FINISHED = 0
FAILED = 1
USER_ERROR = 2
"""Invalid input; the same command would fail again."""
STOPPED = 75
"""EX_TEMPFAIL: stopped on request; run the same command again to resume."""
INTERRUPTED = 130
"""By Ctrl-C, as in shells."""


class Failed(RuntimeError):
    """A failure that its message explains: a command prints that alone, without a traceback, and exits with FAILED."""
