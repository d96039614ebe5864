"""The job: source -> views -> palette -> shards, spread over processes and parts, and restartable.

The bytes of the result are a function of the configuration and the source: the number of workers and parts, and
where an earlier run was cut off, do not matter. What a restart keeps is complete units (data_prep/build/plan.py).
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.build.encode import Job, Outcome, encode_record
from data_prep.build.encode_stream import encode_stream
from data_prep.build.merge import join_shards
from data_prep.build.parts import Part
from data_prep.build.plan import Plan, Unit, all_units, make_plan
from data_prep.build.skips import SKIPPED, Skip, SkipLimit, TooManySkips, write_skips
from data_prep.build.state import Unfinished, finished
from data_prep.common.files import read_json
from data_prep.common.progress import progress
from data_prep.common.workers import in_workers, worker_count
from data_prep.config import DataConfig
from data_prep.palette.codec import load_palette, lookup_table, palette_sha256, save_palette
from data_prep.palette.fit import fit
from data_prep.shards.format import MANIFEST, PALETTE, shard_name
from data_prep.shards.writer import ShardWriter, open_shard
from data_prep.sources.base import Source
from data_prep.sources.open import open_source

logger = logging.getLogger(__name__)

READERS = ("numpy", "pillow", "simplejpeg", "opencv-python-headless", "faiss-cpu")
"""Packages on whose versions the bytes may depend."""


def prepare_shards(config: DataConfig, out: Path, part: Part) -> None:
    """Prepares a shard set in the folder `out`, or a part of it, or finishes what an interrupted call began there.

    Raises ValueError naming what is wrong with the configuration, the source or what lies in `out`, and
    OSError where it can't write; the manifest is then absent.
    """
    started = time.monotonic()
    if part.count > 1 and config.palette.file is None:
        raise ValueError(
            "palette.file is not set; parts share one palette: fit it first with `python -m data_prep palette`."
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is {out}, which is a file; it must be a folder.")
    if finished(out, identity(config)):
        logger.info(f"{out} is finished: it was prepared with this configuration{_same_source(config, out)}.")
        return
    source = open_source(config.source)
    plan = make_plan(source, config)
    unfinished = Unfinished(out)
    unfinished.begin(_described(source, plan))
    unfinished.begin_part(part, config.max_skipped)
    workers = worker_count(config.workers)
    palette = _palette(source, plan, out, workers)
    pictures = _write_units(Job(source, plan, palette, lookup_table(palette)), unfinished, part, workers)
    unfinished.finish_part(part, config.max_skipped, time.monotonic() - started, pictures)
    if part.count == 1:
        join_shards(out)
    else:
        logger.info(f"{out}: part {part.number} of {part.count} is done. When all are: python -m data_prep join {out}")


def _same_source(config: DataConfig, out: Path) -> str:
    """Raises ValueError if the source of a finished set has other pictures now."""
    try:
        fingerprint = open_source(config.source).fingerprint
    except (ValueError, OSError):
        return "; its source can't be opened any more"
    if fingerprint != read_json(out / MANIFEST)["source"]["fingerprint"]:
        raise ValueError(
            f"{out} is finished, but the source has other pictures now; delete it to prepare them, or choose another "
            f"--out."
        )
    return ", from these pictures"


def identity(config: DataConfig) -> dict[str, Any]:
    """The configuration, with the digest of a given palette in place of its path."""
    values = config.to_dict()
    if config.palette.file is not None:
        given = load_palette(Path(config.palette.file), config.palette.colors)
        values["palette"]["file"] = f"sha256 {palette_sha256(given)}"
    return values


def _described(source: Source, plan: Plan) -> dict[str, Any]:
    """What all parts must agree on, and the joining step needs to know."""
    return {
        "config": identity(plan.config),
        "source": {"name": source.name, "kind": plan.config.source.kind, "fingerprint": source.fingerprint}
        | source.facts,
        "classes": source.classes,
        "streams": sorted(plan.pieces),
        "units": plan.units,
        "made_with": {name: version(name) for name in READERS},
    }


def _palette(source: Source, plan: Plan, out: Path, workers: int) -> np.ndarray:
    """The given palette, that of an interrupted run, or a new one; kept in `out`."""
    wanted = plan.config.palette
    if wanted.file is None and (out / PALETTE).is_file():
        return load_palette(out / PALETTE, wanted.colors, key="the palette")
    palette = fit(source, plan, workers) if wanted.file is None else _given_palette(Path(wanted.file), wanted.colors)
    save_palette(out / PALETTE, palette)
    return palette


def _given_palette(file: Path, colors: int) -> np.ndarray:
    palette = load_palette(file, colors)
    if (palette == palette[0]).all():
        raise ValueError(f"palette.file {file} has one colour, {colors} times; it must hold different colours.")
    if palette.min() >= 0:
        logger.info(f"palette.file {file} has no number below 0; a palette is scaled to [-1, 1], not to [0, 1]")
    return palette


def _write_units(job: Job, unfinished: Unfinished, part: Part, workers: int) -> int:
    """Writes the shards of the part's units that no earlier call finished, and a note of each unit.

    Returns how many pictures were met now.
    """
    digest = palette_sha256(job.palette)
    units = part.of(all_units(job.plan.units))
    kept = {unit: unfinished.kept(unit, digest) for unit in units}
    missing = [unit for unit, note in kept.items() if note is None]
    limit = SkipLimit(job.plan.config.max_skipped, job.plan.pictures, job.plan.tars)
    try:
        with progress("shards", job.plan.images(units), "images") as advance:
            for note in kept.values():
                if note is not None:
                    limit.add(note["pictures"], note["skips"])
                    advance(_note_images(note))
            before = limit.pictures
            for note in _notes(job, missing, unfinished, workers, advance):
                limit.add(note["pictures"], note["skips"])
    except TooManySkips as error:
        file = unfinished.folder / f"{part.number:05d}-{SKIPPED}"
        write_skips(file, error.skips)
        raise ValueError(f"{error}; {file} lists them.") from error
    return limit.pictures - before


def _note_images(note: dict[str, Any]) -> int:
    return sum(entry["images"] for entry in note["shards"].values())


def _notes(
    job: Job, units: list[Unit], unfinished: Unfinished, workers: int, advance: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """The note of each unit, once its shards are written and it is kept."""
    planned = {unit: job.plan.records(unit) for unit in units if not job.plan.is_stream(unit)}
    tasks = [(unit, record) for unit, records in planned.items() for record in range(records)]
    with closing(in_workers(encode_record, job, tasks, workers)) as encoded:
        for unit, records in planned.items():
            yield _write_unit(job, unfinished, unit, _advancing(islice(encoded, records), advance))
    pieces = [unit for unit in units if job.plan.is_stream(unit)]
    with closing(in_workers(_write_piece, (job, unfinished), pieces, workers)) as written:
        for note in written:
            advance(_note_images(note))
            yield note


def _advancing(outcomes: Iterable[Outcome], advance: Callable[[int], None]) -> Iterator[Outcome]:
    for outcome in outcomes:
        yield outcome
        advance(len(outcome.labels))


def _write_piece(state: tuple[Job, Unfinished], unit: Unit) -> dict[str, Any]:
    job, unfinished = state
    return _write_unit(job, unfinished, unit, encode_stream(job, unit))


def _write_unit(job: Job, unfinished: Unfinished, unit: Unit, outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Writes a unit's shards, one a split that it has images of, then its note, which it returns."""
    errors: dict[str, int] = {}
    pictures, largest_label, shown = 0, -1, False
    skips: list[Skip] = []
    with ExitStack() as open_shards:
        writers: dict[str, ShardWriter] = {}
        for outcome in outcomes:
            pictures += outcome.pictures
            skips += outcome.skips
            errors[outcome.split] = errors.get(outcome.split, 0) + outcome.squared_error
            if outcome.samples is not None and outcome.split == "train" and unit.number == 0 and not shown:
                unfinished.keep_samples(outcome.samples)
                shown = True
            if not len(outcome.labels):
                continue
            job.source.check_labels(outcome.split, outcome.labels)
            largest_label = max(largest_label, int(outcome.labels.max()))
            if outcome.split not in writers:
                path = unfinished.out / shard_name(outcome.split, unit.number)
                writers[outcome.split] = open_shards.enter_context(open_shard(path))
            writers[outcome.split].add((outcome.tokens, outcome.labels))
    shards = {split: writer.entry | {"squared_error": errors[split]} for split, writer in writers.items()}
    note = {"shards": shards, "pictures": pictures, "skips": skips, "largest_label": largest_label}
    unfinished.keep(unit, note | {"palette_sha256": palette_sha256(job.palette)})
    return note
