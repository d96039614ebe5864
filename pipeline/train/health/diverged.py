"""The error of a run that can't continue."""

from data_prep.common.exit_codes import Failed
from pipeline.rank_errors import reported_on_all_ranks


class Diverged(Failed):
    """Training can't continue: values are NaN or Inf, or replicas differ. All ranks raise it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        reported_on_all_ranks(self)
