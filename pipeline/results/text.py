"""Formatting of numbers and keys for readers."""

import math
from typing import Any

MISSING = "–"


def percent(fraction: float | None, error: float | None = None) -> str:
    """0.8475 as "84.8 %", followed by the error if there is one."""
    if fraction is None:
        return MISSING
    return f"{100 * fraction:.1f} %" + ("" if error is None else f" ± {100 * error:.1f}")


def number(value: Any) -> str:
    """A float with four significant digits, an integer with commas; other values unchanged."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return MISSING if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else MISSING


def words(key: str) -> str:
    """A JSON key as words: best_layer as "best layer"."""
    return key.replace("_", " ")
