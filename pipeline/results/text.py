"""Numbers and keys as a reader wants them."""

import math
from typing import Any

MISSING = "–"


def percent(fraction: float | None, error: float | None = None) -> str:
    """0.8475 as "84.8 %", with the error after it where there is one."""
    if fraction is None:
        return MISSING
    return f"{100 * fraction:.1f} %" + ("" if error is None else f" ± {100 * error:.1f}")


def number(value: Any) -> str:
    """A number with four digits, an integer with commas; other values as they are."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return MISSING if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else MISSING


def words(key: str) -> str:
    """A key of JSON as words: best_layer as "best layer"."""
    return key.replace("_", " ")
