"""The `palette` command: fits a palette at once, or counts colors in parts whose sum `join` fits it to.

PALETTE.parts/plan.json               what is being counted; the same for all parts
PALETTE.parts/00001-of-00004.npz      the colors in one part, and the number of pixels of each
"""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep.build.build import identity
from data_prep.build.exclude import describe_excluded, open_excluded, read_excluded
from data_prep.build.parts import Part
from data_prep.build.plan import make_plan
from data_prep.build.state import PLAN, share_plan
from data_prep.common.files import atomic_write, read_json
from data_prep.common.workers import worker_count
from data_prep.config import DataConfig
from data_prep.palette.codec import CODES, palette_sha256, save_palette
from data_prep.palette.fit import count_chunks, fit_chunks, fit_histogram
from data_prep.sources.open import open_source

logger = logging.getLogger(__name__)


def prepare_palette(config: DataConfig, out: Path, part: Part) -> None:
    """Fits a palette to the training images and writes it as .npy. `shards` would fit the same palette.

    With several parts, each part writes the histogram of its share to PALETTE.parts, for `join_palette`.
    """
    if config.palette.file is not None:
        raise ValueError(f"palette.file is {config.palette.file!r}; remove it to fit a palette.")
    if out.exists():
        raise ValueError(
            f"--out is {str(out)!r}, which already exists and is not overwritten; delete it, or choose another file."
        )
    source = open_source(config.source)
    plan = make_plan(source, config)
    workers = worker_count(config.workers)
    excluded = open_excluded(config.exclude)
    near_duplicates = read_excluded(excluded, config, workers)
    if near_duplicates is not None:
        source = replace(source, near_duplicate=near_duplicates.match)
    out.parent.mkdir(parents=True, exist_ok=True)
    if part.count > 1:
        compared = {"config": identity(config, excluded), "source": {"fingerprint": source.fingerprint}}
        described = compared | {"parts": part.count} | describe_excluded(excluded, near_duplicates)
        share_plan(_folder(out) / PLAN, _folder(out), described)
    histogram, skipped = count_chunks(source, plan, part.of(fit_chunks(plan)), workers)
    if part.count == 1:
        _save(out, fit_histogram(histogram, config, skipped))
        return
    _save_histogram(_histogram_file(out, part), histogram)
    if skipped.reasons and not histogram.any():
        logger.warning(f"{out}: part {part.number} has no usable training image; {skipped}")
    logger.info(
        f"{out}: part {part.number} of {part.count} is complete; after the last: python -m data_prep join {out}"
    )


def has_parts(out: Path) -> bool:
    """Whether there are parts of the palette `out`."""
    return _folder(out).is_dir()


def join_palette(out: Path) -> None:
    """Fits the palette to the sum of the parts. Raises ValueError naming the parts that are missing."""
    described = read_json(_folder(out) / PLAN)
    if out.exists():
        raise ValueError(f"{out} already exists and is not overwritten; delete it, then join again.")
    parts = described["parts"]
    files = [_histogram_file(out, Part(number, parts)) for number in range(1, parts + 1)]
    missing = [str(number) for number, file in enumerate(files, 1) if not file.is_file()]
    if missing:
        raise ValueError(f"{out} is missing part {', '.join(missing)} of {parts}; run them, then join again.")
    histogram = np.zeros(CODES, np.int64)
    for file in files:
        with np.load(file, allow_pickle=False) as arrays:
            histogram[arrays["codes"]] += arrays["counts"]
    without = {key: value for key, value in described["config"].items() if not key.startswith("exclude")}
    _save(out, fit_histogram(histogram, DataConfig.from_dict(without)))  # the colors are counted, so none is excluded
    shutil.rmtree(_folder(out))


def _folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def _histogram_file(out: Path, part: Part) -> Path:
    return _folder(out) / f"{part.name}.npz"


def _save_histogram(file: Path, histogram: np.ndarray) -> None:
    codes = np.flatnonzero(histogram).astype(np.uint32)
    with atomic_write(file) as temporary, temporary.open("wb") as opened:
        np.savez_compressed(opened, codes=codes, counts=histogram[codes])


def _save(out: Path, palette: np.ndarray) -> None:
    save_palette(out, palette)
    logger.info(f"{out}: {len(palette)} colors, sha256 {palette_sha256(palette)}")
