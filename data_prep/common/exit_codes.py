"""The exit codes of every command, which the job scripts read."""

FINISHED = 0
FAILED = 1
USER_ERROR = 2
"""Invalid input; the same command would fail again."""
STOPPED = 75
"""EX_TEMPFAIL: stopped on request, wants a requeue."""
INTERRUPTED = 130
"""By Ctrl-C, as shells have it."""
