"""The last step of a shard set: checks that all units are complete and writes the manifest."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.build.parts import Part
from data_prep.build.plan import Unit, all_units
from data_prep.build.skips import (
    NEAR_DUPLICATE,
    SKIPPED,
    Skip,
    SkipLimit,
    TooManySkips,
    add_counts,
    count_skips,
    counts_by_reason,
    write_skips,
)
from data_prep.build.state import UnfinishedSet
from data_prep.common.files import write_json
from data_prep.palette.codec import load_palette, palette_sha256
from data_prep.preview import draw_result
from data_prep.shards.format import FORMAT, MANIFEST, PALETTE, VERSION
from data_prep.shards.overlap import Overlap
from data_prep.shards.reader import open_shard_set
from data_prep.sources.base import MAX_CLASSES
from data_prep.sources.where import quoted

logger = logging.getLogger(__name__)

PREVIEW = "pictures.png"
MAX_LISTED_PARTS = 10
"""Missing parts that an error message lists."""
RESULT_ONLY_KEYS = ("squared_error", "unlabelled")
"""Keys of a shard's entry in a unit's result that do not go into the manifest."""


def join_shards(out: Path, max_skipped: float | None = None) -> None:
    """Writes the manifest of a shard set whose units are all complete, with skipped.jsonl and a preview.

    max_skipped: the largest share of the images, and of the tars, that may be skipped; default: the parts' own. Only
    the presence and size of the shards are checked; `verify` reads them. Raises ValueError naming what is missing, or
    if more were skipped.
    """
    if out.is_file():
        raise ValueError(f"{out} is a file without {out.name}.parts next to it; if it is a palette, it is finished.")
    unfinished = UnfinishedSet(out)
    if (out / MANIFEST).is_file() and not unfinished.folder.is_dir():
        logger.info(f"{out} is already joined: it has the splits {', '.join(open_shard_set(out).splits)}.")
        return
    plan = unfinished.plan()
    results = _complete_results(unfinished, plan)
    if max_skipped is None:
        max_skipped = unfinished.max_skipped()
    if not 0 <= max_skipped <= 1:
        raise ValueError(f"--max_skipped is {max_skipped:g}; it must be between 0 and 1.")
    streams = sum(plan["units"][split] for split in plan["streams"])
    limit = SkipLimit(max_skipped, tars_planned=streams * plan["config"]["source"]["tars_per_shard"])
    for result in results.values():
        limit.count(result["pictures"], result["skips"])
    try:
        limit.finish()
    except TooManySkips as error:
        raise ValueError(f"{error}.") from error
    labels = _labels(unfinished, plan)
    manifest = _manifest(plan, results, limit.skips, out, labels)
    _draw(unfinished, manifest, out)
    write_skips(out / SKIPPED, limit.skips)
    write_json(out / MANIFEST, manifest)
    _report(out, manifest, results, limit, unfinished.timings(), len(labels))
    unfinished.remove()


def _complete_results(unfinished: UnfinishedSet, plan: dict[str, Any]) -> dict[Unit, dict[str, Any]]:
    """The results of all units, in order. Raises ValueError naming the first missing unit and the parts to run."""
    units = all_units(plan["units"])
    found = {unit: unfinished.load_result(unit) for unit in units}
    missing = [unit for unit, result in found.items() if result is None]
    if missing:
        counts = {part.count for part in unfinished.parts()}
        parts = [Part(number, count) for count in sorted(counts) for number in range(1, count + 1)]
        incomplete = [part for part in parts if not set(missing).isdisjoint(part.of(units))]
        names = ", ".join(f"{part.number} of {part.count}" for part in incomplete[:MAX_LISTED_PARTS])
        more = f" and {len(incomplete) - MAX_LISTED_PARTS} more" if len(incomplete) > MAX_LISTED_PARTS else ""
        raise ValueError(
            f"{unfinished.out} is missing {len(missing):,} of {len(units):,} work items, the first is "
            f"{missing[0].name}; run part {names}{more}, then join again."
        )
    complete = {unit: result for unit, result in found.items() if result is not None}
    for result in complete.values():
        for entry in result["shards"].values():
            path = unfinished.out / entry["file"]
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise ValueError(
                    f"{path} is missing or has changed since it was written; run its part again, then join again."
                )
    return complete


def _manifest(
    plan: dict[str, Any], results: dict[Unit, dict[str, Any]], skips: list[Skip], out: Path, labels: np.ndarray
) -> dict[str, Any]:
    """labels: those that occur (m,), sorted."""
    config = plan["config"]
    palette = load_palette(out / PALETTE, config["palette"]["colors"], key="the palette")
    encoded_with = {result["palette_sha256"] for result in results.values()}
    if encoded_with != {palette_sha256(palette)}:
        raise ValueError(
            f"{out / PALETTE} has sha256 {palette_sha256(palette)}, but the parts were encoded with "
            f"{', '.join(sorted(encoded_with))}; restore that palette, or prepare the set again."
        )
    classes = classes_of(plan["classes"], labels)
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": plan["source"],
        "config": config,
        "made_with": plan["made_with"],
        "resolution": config["resolution"],
        "views": config["views"],
        "classes": classes,
        "palette": {"file": PALETTE, "colors": len(palette), "sha256": palette_sha256(palette)},
        "skipped": counts_by_reason(skips),
        **({"excluded": plan["excluded"]} if "excluded" in plan else {}),
        **({"filtered": _filtered(plan, results)} if "filtered" in plan else {}),
        "splits": _splits(results, config["resolution"], skips, _images_in_train(results, UnfinishedSet(out))),
    }


def _filtered(plan: dict[str, Any], results: dict[Unit, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """By split of the source and reason: the images that source.where excludes.

    Raises ValueError if it is all images of a split.
    """
    filtered = add_counts(plan["filtered"], *(result["filtered"] for result in results.values()))
    empty = next((split for split in filtered if not _has_images(split, results)), None)
    if empty is not None:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in filtered[empty].items())
        raise ValueError(
            f"source.where {quoted(plan['config']['source']['where'])} leaves no image of {empty} that can be used "
            f"({counts}); change it."
        )
    return filtered


def _has_images(split: str, results: dict[Unit, dict[str, Any]]) -> bool:
    """Whether images of a split of the source are stored; those of valid may be in train."""
    if split == "train":
        return any("train" in result["shards"] for result in results.values())
    own = [result for unit, result in results.items() if unit.split == split]
    return not own or any(result["shards"] for result in own)


def classes_of(named: list[str], labels: np.ndarray) -> list[str]:
    """The classes that the source names, or the numbers up to the largest label. Raises ValueError for other labels."""
    largest = int(labels.max(initial=-1))
    if named and largest >= len(named):
        raise ValueError(f"an image has the label {largest}, but the source names {len(named)} classes.")
    return named or [str(number) for number in range(1 + largest)]


def _labels(unfinished: UnfinishedSet, plan: dict[str, Any]) -> np.ndarray:
    """The labels that occur: int64 (m,), sorted."""
    occurs = np.zeros(max(MAX_CLASSES, len(plan["classes"])), bool)
    for unit in all_units(plan["units"]):
        occurs[unfinished.load_labels(unit)] = True
    return np.flatnonzero(occurs)


def _images_in_train(results: dict[Unit, dict[str, Any]], unfinished: UnfinishedSet) -> dict[str, int]:
    """By split, `train` excepted: the number of images that are also in train."""
    if not any(split != "train" for result in results.values() for split in result["shards"]):
        return {}  # the digests of train need not be read
    overlap = Overlap()
    for split in ("valid", "test", "train"):
        for unit, result in results.items():
            if split in result["shards"]:
                overlap.add(split, unfinished.load_digests(unit, split))
    return overlap.counts()


def _splits(
    results: dict[Unit, dict[str, Any]], resolution: int, skips: list[Skip], images_in_train: dict[str, int]
) -> dict[str, Any]:
    """By split: the shards in order, the numbers of images, and the error of the palette colors."""
    splits: dict[str, Any] = {}
    for split in ("train", "valid", "test"):
        entries = [result["shards"][split] for result in results.values() if split in result["shards"]]
        if not entries:
            continue
        images = sum(entry["images"] for entry in entries)
        error = sum(entry["squared_error"] for entry in entries)
        splits[split] = {
            "images": images,
            **({"images_in_train": images_in_train[split]} if split in images_in_train else {}),
            "palette_mean_squared_error": error / (3 * resolution**2 * images),
            "shards": [
                {key: value for key, value in entry.items() if key not in RESULT_ONLY_KEYS} for entry in entries
            ],
        }
    if "train" not in splits:
        found = str(count_skips(one for one in skips if one["split"] == "train")) or "the source has none"
        raise ValueError(f"no training image can be used, so the shard set would be empty; {found}.")
    return splits


def _draw(unfinished: UnfinishedSet, manifest: dict[str, Any], out: Path) -> None:
    samples = unfinished.load_samples()
    if samples is not None:
        palette = load_palette(out / PALETTE, manifest["palette"]["colors"], key="the palette")
        draw_result(*samples, manifest["classes"], palette, out / PREVIEW)


def _report(
    out: Path,
    manifest: dict[str, Any],
    results: dict[Unit, dict[str, Any]],
    limit: SkipLimit,
    timings: list[tuple[float, int]],
    labels: int,
) -> None:
    """labels: how many different ones occur."""
    splits, palette = manifest["splits"], manifest["palette"]
    near_duplicates = sum(one["reason"] == NEAR_DUPLICATE for one in limit.skips)
    source_images, skipped = limit.images, len(limit.skips) - near_duplicates
    found = f", {near_duplicates:,} near-duplicates of excluded images" if "excluded" in manifest else ""
    filtered = sum(sum(reasons.values()) for reasons in manifest.get("filtered", {}).values())
    kept = f", after {filtered:,} that source.where excludes" if "filtered" in manifest else ""
    images = sum(split["images"] for split in splits.values())
    size = sum(shard["bytes"] for split in splits.values() for shard in split["shards"])
    seconds, timed = sum(seconds for seconds, _ in timings), sum(count for _, count in timings)
    parts = f"{len(timings)} parts, {seconds:,.1f} s in total" if len(timings) > 1 else f"{seconds:,.1f} s"
    parts += "" if timed == source_images else f" (timed on {timed:,} images: interrupted calls are not counted)"
    throughput = timed / max(seconds, 1e-9)
    lines = [
        f"{out}: finished in {parts}, {throughput:,.0f} images/s{' per part' if len(timings) > 1 else ''}",
        f"  {source_images:,} source images{kept}, {skipped:,} skipped{found}; {images:,} images stored, "
        f"{size / 1e6:,.1f} MB",
    ]
    for key in ("skipped", "filtered"):
        for split, reasons in manifest.get(key, {}).items():
            lines.append(f"  {split:5} {key}: {', '.join(f'{count:,} {reason}' for reason, count in reasons.items())}")
    for name, split in splits.items():
        error = split["palette_mean_squared_error"]
        unlabelled = sum(result["shards"].get(name, {}).get("unlabelled", 0) for result in results.values())
        without = f", {unlabelled:,} unlabelled" if unlabelled else ""
        in_train = f"; {split['images_in_train']:,} of them also in train" if name != "train" else ""
        error_text = f"mean squared color error {error:.2f} per channel"
        lines.append(f"  {name:5} {split['images']:>10,} images{without}; {error_text}{in_train}")
    classes = len(manifest["classes"])
    of_classes = f"{classes:,} classes" if labels == classes else f"{labels:,} of {classes:,} classes have images"
    lines.append(f"  {of_classes}; {palette['colors']} colors, sha256 {palette['sha256']}")
    lines.append(f"  {out / PREVIEW} shows some images next to their source")
    logger.info("\n".join(lines))
    if not labels:
        read_from = f" (labels are read from {manifest['source']['label']})" if "label" in manifest["source"] else ""
        logger.warning(f"{out} has no labels{read_from}: classifiers can't be trained or tested on it")
    for name, split in splits.items():
        if split.get("images_in_train") and not (name == "valid" and manifest["config"]["fold_valid"]):
            logger.warning(
                f"{out}: {split['images_in_train']:,} of {split['images']:,} images of {name} are also in train (equal "
                f"tokens), so results on {name} include training images"
            )
    if "valid" not in splits and (manifest["config"]["valid_fraction"] or "valid" in manifest["skipped"]):
        logger.warning(f"{out} has no images in valid: training can't validate on it, and probes can't select a layer")
