"""The error of a run that can't continue."""

from data_prep.common.command_line import SAID_BY_OTHERS


class Diverged(RuntimeError):
    """Training can't continue: non-finite values, or ranks that no longer train the same model. All ranks raise it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        setattr(self, SAID_BY_OTHERS, True)
