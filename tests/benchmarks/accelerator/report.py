"""The lines of a check: ok|FAIL|info, name, value, limit and seconds, separated by two spaces or more."""

from collections.abc import Iterable
from typing import NamedTuple

WIDTHS = (4, 64, 20, 12)
"""Columns of state, name, value and limit."""


class Row(NamedTuple):
    """The result of one check."""

    good: bool
    name: str
    value: str
    limit: str = "-"
    """What the value was compared with; "-" if it is only reported."""

    def line(self, seconds: float) -> str:
        """The row as one line; seconds: those it took."""
        state = "FAIL" if not self.good else "info" if self.limit == "-" else "ok"
        fields = (state, self.name, *map(one_line, (self.value, self.limit)))
        cells = [text.ljust(width) for text, width in zip(fields, WIDTHS, strict=True)]
        return "  ".join([*cells, f"{seconds:.1f}"])


def one_line(text: str) -> str:
    """Without line breaks and double spaces; "-" for nothing."""
    return " ".join(text.split()) or "-"


def at_most(name: str, value: float, limit: float) -> Row:
    """Good if the value is not above the limit; NaN is not good."""
    return Row(bool(value <= limit), name, f"{value:.3g}", f"<= {limit:g}")


def equal(name: str, value: object, wanted: object) -> Row:
    """Good if both are equal."""
    return Row(bool(value == wanted), name, str(value), f"== {wanted}")


def known(name: str, value: object) -> Row:
    """A value that is only reported."""
    return Row(True, name, f"{value:.4g}" if isinstance(value, float) else str(value))


def failed(name: str, error: BaseException | str) -> Row:
    """A check that raised, or did not end."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return Row(False, name, one_line(text)[:200])


def summary(lines: Iterable[str], not_run: list[str]) -> str:
    """The last line: how many checks are ok, and what was not run."""
    states = [line.split(maxsplit=1)[0] for line in lines]
    skipped = f"; not run for lack of time: {', '.join(not_run)}" if not_run else ""
    return f"{states.count('ok')} ok, {states.count('FAIL')} FAIL{skipped}"
