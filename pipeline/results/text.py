"""Formatting of numbers and keys for readers."""

import math
from typing import Any

MISSING = "–"


def percent(fraction: float | None, error: float | None = None, interval: tuple[float, float] | None = None) -> str:
    """0.8475 as "84.8 %", followed by the error if there is one, else by the interval: "84.8 % (82.4–86.9)"."""
    if fraction is None:
        return MISSING
    text = f"{100 * fraction:.1f} %"
    if error is not None:
        return f"{text} ± {100 * error:.1f}"
    return text if interval is None else f"{text} ({'–'.join(f'{100 * bound:.1f}' for bound in interval)})"


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


def image_count(count: int) -> str:
    """1 as "1 image", 1000 as "1,000 images"."""
    return f"{count:,} {'image' if count == 1 else 'images'}"
