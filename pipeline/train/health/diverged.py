"""The error of a run that can't continue."""

from pipeline.rank_errors import reported_on_all_ranks


class Diverged(RuntimeError):
    """Training can't continue: non-finite values, or ranks that no longer train the same model. All ranks raise it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        reported_on_all_ranks(self)
