"""Checks of single configuration values; each raises ValueError with one sentence."""

from math import inf
from typing import Any


def require_at_least(key: str, value: float, least: float) -> None:
    """Raises ValueError naming the key if `value` is below `least`."""
    if not value >= least:
        raise ValueError(f"{key} is {value}; it must be at least {least}.")


def require_minimums(section: str, config: object, **minimums: float) -> None:
    """Raises ValueError naming the key of the first field below its minimum; None is not checked."""
    for name, least in minimums.items():
        value: Any = getattr(config, name)
        if value is not None:
            require_at_least(f"{section}.{name}", value, least)


def require_positive(key: str, value: float) -> None:
    """Raises ValueError naming the key if `value` is not above zero, or is infinite."""
    if not 0 < value < inf:
        raise ValueError(f"{key} is {value}; it must be above 0, and finite.")
