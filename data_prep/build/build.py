"""The `shards` job: source -> views -> palette -> shards, distributed over processes and parts, restartable.

The bytes of the result are a function of the configuration and the source. They do not depend on the number of
workers or parts, or on interruptions. A restart reuses the complete units (data_prep/build/plan.py).
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.build.encode import Job, Outcome, encode_record
from data_prep.build.encode_stream import encode_stream
from data_prep.build.exclude import ExcludedSet, describe_excluded, open_excluded, read_excluded
from data_prep.build.merge import join_shards
from data_prep.build.parts import Part
from data_prep.build.plan import Plan, Unit, all_units, make_plan
from data_prep.build.skips import SKIPPED, Skip, SkipLimit, TooManySkips, add_counts, write_skips
from data_prep.build.state import UnfinishedSet, finished
from data_prep.common.files import read_json
from data_prep.common.progress import progress
from data_prep.common.workers import in_workers, worker_count
from data_prep.config import DataConfig
from data_prep.palette.codec import load_palette, lookup_table, palette_sha256, save_palette
from data_prep.palette.fit import fit
from data_prep.shards.format import MANIFEST, PALETTE, shard_name
from data_prep.shards.overlap import token_digests
from data_prep.shards.writer import ShardWriter, open_shard
from data_prep.sources.base import UNLABELLED, Source
from data_prep.sources.open import open_source

logger = logging.getLogger(__name__)

PACKAGES = ("numpy", "pillow", "simplejpeg", "opencv-python-headless", "faiss-cpu")
"""Packages whose versions may change the bytes of the result."""


def prepare_shards(config: DataConfig, out: Path, part: Part) -> None:
    """Prepares a shard set, or one part of it, in the folder `out`. Resumes an interrupted call.

    Raises ValueError if the configuration, the source or the contents of `out` are invalid, and OSError if it can't
    write. The manifest is then absent.
    """
    started = time.monotonic()
    if part.count > 1 and config.palette.file is None:
        raise ValueError(
            "palette.file is not set, and the parts need one palette; fit it first with `python -m data_prep palette`."
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is {out}, a file; it must be a folder.")
    excluded = open_excluded(config.exclude)
    if finished(out, identity(config, excluded)):
        logger.info(f"{out} is finished: it was prepared with this configuration{_same_source(config, out)}.")
        return
    source = open_source(config.source)
    plan = make_plan(source, config)
    unfinished = UnfinishedSet(out)
    workers = worker_count(config.workers)
    near_duplicates = read_excluded(excluded, config, workers)
    if near_duplicates is not None:
        source = replace(source, near_duplicate=near_duplicates.match)
    description = _plan_description(source, plan, excluded)
    unfinished.start(description | describe_excluded(excluded, near_duplicates))
    unfinished.start_part(part, config.max_skipped)
    palette = _palette(source, plan, out, workers)
    images = _write_units(Job(source, plan, palette, lookup_table(palette)), unfinished, part, workers)
    unfinished.finish_part(part, config.max_skipped, time.monotonic() - started, images)
    if part.count == 1:
        join_shards(out)
    else:
        logger.info(
            f"{out}: part {part.number} of {part.count} is complete; after the last: python -m data_prep join {out}"
        )


def _same_source(config: DataConfig, out: Path) -> str:
    """Raises ValueError if the source's images changed after the set was finished."""
    try:
        fingerprint = open_source(config.source).fingerprint
    except (ValueError, OSError):
        return "; its source is no longer available"
    if fingerprint != read_json(out / MANIFEST)["source"]["fingerprint"]:
        raise ValueError(
            f"{out} is finished, but the source's images have changed since; delete {out} to prepare it again, or "
            f"choose another --out."
        )
    return ", from the same images"


def identity(config: DataConfig, excluded: Sequence[ExcludedSet]) -> dict[str, Any]:
    """The configuration, with the digests of `palette.file` and of the sets in `exclude` in place of their paths."""
    values = config.to_dict()
    if config.palette.file is not None:
        given = load_palette(Path(config.palette.file), config.palette.colors)
        values["palette"]["file"] = f"sha256 {palette_sha256(given)}"
    if excluded:
        values["exclude"] = [one.identity for one in excluded]
    return values


def _plan_description(source: Source, plan: Plan, excluded: Sequence[ExcludedSet]) -> dict[str, Any]:
    """What must be equal for all parts, and what `join` needs for the manifest."""
    return {
        "config": identity(plan.config, excluded),
        "source": {"name": source.name, "kind": plan.config.source.kind, "fingerprint": source.fingerprint}
        | source.facts,
        "classes": source.classes,
        "streams": sorted(plan.streams),
        "units": plan.units,
        "made_with": {name: version(name) for name in PACKAGES},
        **({"filtered": source.filtered} if plan.config.source.where else {}),
    }


def _palette(source: Source, plan: Plan, out: Path, workers: int) -> np.ndarray:
    """The palette from `palette.file`, from an interrupted run, or newly fitted; saved in `out`."""
    wanted = plan.config.palette
    if wanted.file is None and (out / PALETTE).is_file():
        return load_palette(out / PALETTE, wanted.colors, key="the palette")
    palette = fit(source, plan, workers) if wanted.file is None else _user_palette(Path(wanted.file), wanted.colors)
    save_palette(out / PALETTE, palette)
    return palette


def _user_palette(file: Path, colors: int) -> np.ndarray:
    palette = load_palette(file, colors)
    if (palette == palette[0]).all():
        raise ValueError(f"palette.file {file} contains one color {colors} times; it must contain different colors.")
    if palette.min() >= 0:
        logger.warning(f"palette.file {file} has no value below 0; a palette must be scaled to [-1, 1], not to [0, 1]")
    return palette


def _write_units(job: Job, unfinished: UnfinishedSet, part: Part, workers: int) -> int:
    """Writes the shards of the part's units that no earlier call completed, and the result of each unit.

    Returns the number of source images that this call processed.
    """
    digest = palette_sha256(job.palette)
    units = part.of(all_units(job.plan.units))
    complete = {unit: unfinished.reusable_result(unit, digest) for unit in units}
    missing = [unit for unit, result in complete.items() if result is None]
    limit = SkipLimit(job.plan.config.max_skipped, job.plan.source_images, job.plan.tars)
    try:
        with progress("shards", job.plan.images(units), "images") as advance:
            for reused in complete.values():
                if reused is not None:
                    limit.add(reused["pictures"], reused["skips"])
                    advance(_result_images(reused))
            before = limit.images
            for result in _results(job, missing, unfinished, workers, advance):
                limit.add(result["pictures"], result["skips"])
    except TooManySkips as error:
        file = unfinished.folder / f"{part.number:05d}-{SKIPPED}"
        write_skips(file, error.skips)
        raise ValueError(f"{error}; {file} lists them.") from error
    return limit.images - before


def _result_images(result: dict[str, Any]) -> int:
    return sum(entry["images"] for entry in result["shards"].values())


def _results(
    job: Job, units: list[Unit], unfinished: UnfinishedSet, workers: int, advance: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """The result of each unit, after its shards and the result itself are saved."""
    planned = {unit: job.plan.records(unit) for unit in units if not job.plan.is_stream(unit)}
    tasks = [(unit, record) for unit, records in planned.items() for record in range(records)]
    with closing(in_workers(encode_record, job, tasks, workers)) as encoded:
        for unit, records in planned.items():
            yield _write_unit(job, unfinished, unit, _count_progress(islice(encoded, records), advance))
    streams = [unit for unit in units if job.plan.is_stream(unit)]
    with closing(in_workers(_write_stream, (job, unfinished), streams, workers)) as written:
        for result in written:
            advance(_result_images(result))
            yield result


def _count_progress(outcomes: Iterable[Outcome], advance: Callable[[int], None]) -> Iterator[Outcome]:
    for outcome in outcomes:
        yield outcome
        advance(len(outcome.labels))


def _write_stream(state: tuple[Job, UnfinishedSet], unit: Unit) -> dict[str, Any]:
    job, unfinished = state
    return _write_unit(job, unfinished, unit, encode_stream(job, unit))


def _write_unit(job: Job, unfinished: UnfinishedSet, unit: Unit, outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Writes the shards of a unit, one for each split that has images in it; then saves and returns the result."""
    errors: dict[str, int] = {}
    unlabelled: Counter[str] = Counter()
    numbers: set[int] = set()
    digests: dict[str, list[np.ndarray]] = {}
    source_images, has_samples = 0, False
    skips: list[Skip] = []
    filtered: dict[str, dict[str, int]] = {}
    with ExitStack() as open_shards:
        writers: dict[str, ShardWriter] = {}
        for outcome in outcomes:
            source_images += outcome.source_images
            skips += outcome.skips
            filtered = add_counts(filtered, outcome.filtered)
            errors[outcome.split] = errors.get(outcome.split, 0) + outcome.squared_error
            if outcome.samples is not None and outcome.split == "train" and unit.number == 0 and not has_samples:
                unfinished.save_samples(outcome.samples)
                has_samples = True
            if not len(outcome.labels):
                continue
            job.source.check_labels(outcome.split, outcome.labels)
            numbers.update(np.unique(outcome.labels).tolist())
            unlabelled[outcome.split] += int((outcome.labels == UNLABELLED).sum())
            if outcome.split not in writers:
                path = unfinished.out / shard_name(outcome.split, unit.number)
                writers[outcome.split] = open_shards.enter_context(open_shard(path))
            writers[outcome.split].add((outcome.tokens, outcome.labels))
            digests.setdefault(outcome.split, []).append(token_digests(outcome.tokens))
    shards = {
        split: writer.entry | {"squared_error": errors[split], "unlabelled": unlabelled[split]}
        for split, writer in writers.items()
    }
    labels = np.array(sorted(numbers - {UNLABELLED}), np.uint32)
    result = {"shards": shards, "pictures": source_images, "skips": skips, "filtered": filtered}
    joined = {split: np.concatenate(parts) for split, parts in digests.items()}
    unfinished.save_result(unit, result | {"palette_sha256": palette_sha256(job.palette)}, joined, labels)
    return result
