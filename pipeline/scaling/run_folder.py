"""Reads the files of a run's folder that a fit needs, and says which of them is damaged."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from data_prep.common.files import read_json
from pipeline.checkpoint.metrics_log import METRICS_FILE, Row, read_backwards
from pipeline.checkpoint.metrics_table import read_table
from pipeline.checkpoint.run_files import CONFIG_FILE, RECORD_FILE

PALETTE_FILE = "palette.npy"
T = TypeVar("T")


def steady_steps(rates: np.ndarray) -> tuple[int, int]:
    """The last step of the warm-up, and the last step up to which the learning rate has stayed at its peak.

    The rates are those that were used, not those of the schedule, which may have changed on resume: after a rate below
    the peak that is not of one rising warm-up, no step counts. rates: as in `Run`.
    """
    if not len(rates):
        return 0, 0
    steps, peak = rates[:, 0], rates[:, 1] >= rates[:, 1].max() * (1 - 1e-6)
    begin = int(peak.argmax())
    end = len(rates) if peak[begin:].all() else begin + int((~peak[begin:]).argmax())
    rises = bool((np.diff(rates[: begin + 1, 1]) > 0).all())
    return int(steps[begin]), int(steps[end - 1]) if rises else 0


def read_rates(folder: Path) -> np.ndarray:
    """Step and learning rate of each training row: float64 (n, 2)."""
    table = read_table(folder / METRICS_FILE)
    rates = np.stack([table.column("step"), table.column("learning_rate")], axis=1)
    return rates[np.isfinite(rates[:, 1])]


def read_record(folder: Path) -> dict[str, Any]:
    try:
        record = read_json(folder / RECORD_FILE)
        if not isinstance(record["shards"]["digest"], str):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / RECORD_FILE} is damaged: it has no record of a run's shard set; restore it from a copy."
        ) from error
    return record


def read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        settings = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {CONFIG_FILE}; restore it from a copy, or omit the run.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: it is not YAML; restore it from a copy.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: it has no keys and values; restore it from a copy.")
    return settings


def read_section(section: type[T], settings: dict[str, Any], key: str, folder: Path) -> T:
    """A section of config.yaml; keys of other versions are ignored."""
    known = {field.name for field in fields(section)}  # type: ignore[arg-type]
    try:
        return section(**{name: value for name, value in settings[key].items() if name in known})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged in {key} ({error}); restore it from a copy.") from error


def read_validations(folder: Path) -> Iterator[Row]:
    """Rows with a finite validation loss, newest first."""
    path = folder / METRICS_FILE
    for row in read_backwards(path, "valid_loss", path.stat().st_size if path.is_file() else 0):
        loss, images = row["valid_loss"], row.get("images")
        if isinstance(loss, float) and isinstance(images, int) and 0 < loss < np.inf and images > 0:
            yield row


def read_colors(folder: Path) -> int:
    """Colors of the run's palette."""
    try:
        return len(np.load(folder / PALETTE_FILE, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / PALETTE_FILE} can't be read; copy it from the run's shard set, whose palette it is."
        ) from error
