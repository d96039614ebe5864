"""The job: source -> views -> palette -> shards, spread over processes and restartable.

The bytes of the result are a function of the configuration and the source: the number of workers, and where
an earlier run was cut off, do not matter. Workers make records; what a restart keeps is whole shards.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from data_prep.config import DataConfig
from data_prep.files import write_json
from data_prep.palette import (
    CODES,
    color_codes,
    decode,
    encode,
    fit_palette,
    load_palette,
    lookup_table,
    palette_sha256,
    save_palette,
)
from data_prep.parallel import in_workers, worker_count
from data_prep.plan import SplitPlan, open_plan, open_views, plan_splits
from data_prep.progress import progress
from data_prep.shards import FORMAT, MANIFEST, PALETTE, VERSION, Record, shard_name, write_shard
from data_prep.sources import open_source
from data_prep.sources.base import Source
from data_prep.unfinished import Unfinished, finished
from data_prep.views import Views

FIT_PIXELS = 1 << 26
"""The palette is fitted to at most this many pixels: 65,536 pictures at 32x32."""
FIT_CHUNK = 512
"""Pictures whose colours a worker counts at a time."""


def prepare_palette(config: DataConfig, out: Path) -> None:
    """Fits a palette to the training pictures and writes it as .npy; `shards` would fit the same."""
    if config.palette.file is not None:
        raise ValueError(f"palette.file is {config.palette.file!r}; leave it out to fit a palette.")
    workers = worker_count(config.workers)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=".palette-") as folder:
        _, views, plans = open_plan(config, Path(folder), workers)
        palette = fit(views["train"], plans["train"], config, workers)
    save_palette(out, palette)
    print(f"{out}: {len(palette)} colours, sha256 {palette_sha256(palette)}")


def fit(views: Views, plan: SplitPlan, config: DataConfig, workers: int) -> np.ndarray:
    """The palette of the first FIT_PIXELS of the (shuffled) training images: float32 (V, 3)."""
    images = min(len(plan.pictures), max(1, FIT_PIXELS // config.resolution**2))
    chunks = [slice(start, min(start + FIT_CHUNK, images)) for start in range(0, images, FIT_CHUNK)]
    histogram = np.zeros(CODES, np.int64)
    counted = in_workers(_count_colors, (views, plan), chunks, workers)
    with progress("palette", images) as advance, closing(counted):
        for chunk, (codes, counts) in zip(chunks, counted, strict=True):
            histogram[codes] += counts
            advance(chunk.stop - chunk.start)
    distinct = int(np.count_nonzero(histogram))
    if distinct < config.palette.colors:
        print(f"palette: the pictures have {distinct} colours; the other {config.palette.colors - distinct} go unused")
    return fit_palette(histogram, config.palette.colors, config.seed)


def _count_colors(state: tuple[Views, SplitPlan], chunk: slice) -> tuple[np.ndarray, np.ndarray]:
    views, plan = state
    pixels = cut(views, plan.pictures[chunk], plan.views[chunk])
    return np.unique(color_codes(pixels), return_counts=True)


def cut(views: Views, pictures: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The given views of the given pictures: uint8 (B, R, R, 3)."""
    return np.stack([views.view(int(index), int(number)) for index, number in zip(pictures, numbers, strict=True)])


def prepare_shards(config: DataConfig, out: Path) -> None:
    """Prepares a shard set in the folder `out`, or finishes what an interrupted call began there.

    Raises ValueError naming what is wrong with the configuration, the source or what lies in `out`, and
    OSError where it can't write; the manifest is then absent.
    """
    started = time.monotonic()
    if finished(out, _identity(config)):
        print(f"{out} is finished: it was prepared with this configuration. Delete it to prepare a changed source.")
        return
    workers = worker_count(config.workers)
    source = open_source(config.source)
    unfinished = Unfinished(out)
    unfinished.begin(_identity(config) | {"pictures": source.fingerprint})
    views = open_views(source, config, unfinished.folder, workers)
    plans = plan_splits({split: len(found) for split, found in views.items()}, config)
    palette = _palette(views["train"], plans["train"], config, out, workers)
    job = Encoding(views, plans, palette, lookup_table(palette))
    entries = _write_shards(job, out, unfinished, workers)
    manifest = _manifest(config, source, views, plans, palette, entries)
    write_json(out / MANIFEST, manifest)
    unfinished.remove()
    _report(out, manifest, sum(len(found) for found in views.values()), time.monotonic() - started)


def _identity(config: DataConfig) -> dict[str, Any]:
    """The configuration, with the digest of a given palette in place of its path."""
    identity = config.to_dict()
    if config.palette.file is not None:
        given = load_palette(Path(config.palette.file), config.palette.colors)
        identity["palette"]["file"] = f"sha256 {palette_sha256(given)}"
    return identity


def _palette(views: Views, plan: SplitPlan, config: DataConfig, out: Path, workers: int) -> np.ndarray:
    """The given palette, that of an interrupted run, or a new one; kept in `out`."""
    if config.palette.file is None and (out / PALETTE).is_file():
        return load_palette(out / PALETTE, config.palette.colors, key="the palette")
    if config.palette.file is None:
        palette = fit(views, plan, config, workers)
    else:
        palette = load_palette(Path(config.palette.file), config.palette.colors)
    save_palette(out / PALETTE, palette)
    return palette


@dataclass(frozen=True)
class Encoding:
    """What a worker needs to make records."""

    views: Mapping[str, Views]
    plans: Mapping[str, SplitPlan]
    palette: np.ndarray
    table: np.ndarray


def _encode_record(job: Encoding, task: tuple[str, int, int]) -> tuple[Record, int]:
    """One record, and the squared error of its colours summed over all channels of all pixels."""
    split, shard, record = task
    plan = job.plans[split]
    pictures, numbers = plan.records(shard)[record]
    views = job.views[plan.source_split]
    pixels = cut(views, pictures, numbers)  # (B, R, R, 3)
    tokens = encode(pixels, job.table)  # (B, T)
    difference = pixels.astype(np.int32) - decode(tokens, job.palette, pixels.shape[1])
    return (tokens, views.labels[pictures]), int(np.square(difference).sum(dtype=np.int64))


def _write_shards(job: Encoding, out: Path, unfinished: Unfinished, workers: int) -> dict[str, list[dict[str, Any]]]:
    """The manifest entries of all shards, by split, with their squared error; workers make the records.

    A shard that an earlier run finished with this palette stays as it is.
    """
    digest = palette_sha256(job.palette)
    shards = [(split, number) for split, plan in job.plans.items() for number in range(plan.shards)]
    entries = {shard: unfinished.kept(shard_name(*shard), digest) for shard in shards}
    missing = [shard for shard, entry in entries.items() if entry is None]
    tasks = [(*shard, n) for shard in missing for n in range(len(job.plans[shard[0]].records(shard[1])))]
    images = sum(len(plan.pictures) for plan in job.plans.values())
    with (
        progress("shards", images) as advance,
        closing(in_workers(_encode_record, job, tasks, workers)) as encoded,
    ):
        advance(sum(one["images"] for one in entries.values() if one))
        for split, number in missing:
            errors: list[int] = []
            records = _counted(islice(encoded, len(job.plans[split].records(number))), errors, advance)
            entry = write_shard(out / shard_name(split, number), records)
            entry |= {"squared_error": sum(errors), "palette_sha256": digest}
            unfinished.keep(entry)
            entries[split, number] = entry
    found: dict[str, list[dict[str, Any]]] = {split: [] for split in job.plans}
    for (split, _), one in entries.items():
        assert one is not None
        found[split].append(one)
    return found


def _counted(
    encoded: Iterable[tuple[Record, int]], errors: list[int], advance: Callable[[int], None]
) -> Iterator[Record]:
    for record, error in encoded:
        errors.append(error)
        yield record
        advance(len(record[1]))


def _manifest(
    config: DataConfig,
    source: Source,
    views: Mapping[str, Views],
    plans: Mapping[str, SplitPlan],
    palette: np.ndarray,
    entries: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    labels = max(int(found.labels.max()) for found in views.values())
    notes = ("squared_error", "palette_sha256")
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": {"name": source.name, "kind": config.source.kind, "fingerprint": source.fingerprint},
        "config": _identity(config),
        "made_with": {name: version(name) for name in ("numpy", "pillow", "opencv-python-headless", "faiss-cpu")},
        "resolution": config.resolution,
        "views": {"train": config.views.train},
        "classes": source.classes or [str(number) for number in range(labels + 1)],
        "palette": {"file": PALETTE, "colors": len(palette), "sha256": palette_sha256(palette)},
        "splits": {
            split: {
                "images": len(plans[split].pictures),
                "palette_mean_squared_error": sum(entry["squared_error"] for entry in found)
                / (3 * config.resolution**2 * len(plans[split].pictures)),
                "shards": [{key: value for key, value in entry.items() if key not in notes} for entry in found],
            }
            for split, found in entries.items()
        },
    }


def _report(out: Path, manifest: dict[str, Any], pictures: int, seconds: float) -> None:
    splits = manifest["splits"]
    images = sum(split["images"] for split in splits.values())
    size = sum(shard["bytes"] for split in splits.values() for shard in split["shards"])
    resolution, palette = manifest["resolution"], manifest["palette"]
    print(f"{out}: finished in {seconds:.1f} s, {images / seconds:,.0f} images/s")
    print(f"  {images:,} images of {pictures:,} pictures, {resolution}x{resolution}, {size / 1e6:,.1f} MB")
    for name, split in splits.items():
        error = split["palette_mean_squared_error"]
        print(f"  {name:5} {split['images']:>10,} images; mean squared error of the colours {error:.2f} a channel")
    print(f"  {len(manifest['classes'])} classes; {palette['colors']} colours, sha256 {palette['sha256']}")
