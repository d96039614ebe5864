"""The last step: the parts of a shard set, or of a palette's histogram, become one; gaps are refused."""

import logging
from pathlib import Path
from typing import Any

from data_prep.build.parts import Part
from data_prep.build.plan import Unit, all_units
from data_prep.build.skips import SKIPPED, Skip, SkipLimit, TooManySkips, counts_by_reason, write_skips
from data_prep.build.state import Unfinished
from data_prep.common.files import write_json
from data_prep.palette.codec import load_palette, palette_sha256
from data_prep.preview import draw_result
from data_prep.shards.format import FORMAT, MANIFEST, PALETTE, VERSION
from data_prep.shards.reader import open_shard_set

logger = logging.getLogger(__name__)

PICTURES = "pictures.png"
NAMED_PARTS = 10
"""Missing parts that a sentence lists."""
NOTES = ("squared_error",)
"""What a unit's note adds to its shards' manifest entries."""


def join_shards(out: Path, max_skipped: float | None = None) -> None:
    """Writes the manifest of a shard set whose units are all whole, with skipped.jsonl and a picture of the result.

    max_skipped: the share of the pictures, and of the tars, that may be skipped; by default what the parts were
    allowed. Of the shards it is checked that they are there at their size; `verify` reads them. Raises ValueError
    naming what is missing, or if more were skipped.
    """
    if out.is_file():
        raise ValueError(f"{out} is a file without parts beside it; a palette that is joined is finished.")
    unfinished = Unfinished(out)
    if (out / MANIFEST).is_file() and not unfinished.folder.is_dir():
        logger.info(f"{out} is joined already: {', '.join(open_shard_set(out).splits)}.")
        return
    plan = unfinished.plan()
    notes = _whole_notes(unfinished, plan)
    if max_skipped is None:
        max_skipped = unfinished.max_skipped()
    if not 0 <= max_skipped <= 1:
        raise ValueError(f"--max_skipped is {max_skipped:g}; it must be between 0 and 1.")
    pieces = sum(plan["units"][split] for split in plan["streams"])
    limit = SkipLimit(max_skipped, tars_planned=pieces * plan["config"]["source"]["tars_per_shard"])
    for note in notes.values():
        limit.take(note["pictures"], note["skips"])
    try:
        limit.finish()
    except TooManySkips as error:
        raise ValueError(f"{error}.") from error
    manifest = _manifest(plan, notes, limit.skips, out)
    _draw(unfinished, manifest, out)
    write_skips(out / SKIPPED, limit.skips)
    write_json(out / MANIFEST, manifest)
    _report(out, manifest, limit.pictures, len(limit.skips), unfinished.rates())
    unfinished.remove()


def _whole_notes(unfinished: Unfinished, plan: dict[str, Any]) -> dict[Unit, dict[str, Any]]:
    """The notes of all units, in order. Raises ValueError naming the first gap and the parts that left it."""
    units = all_units(plan["units"])
    notes = {unit: unfinished.note(unit) for unit in units}
    gaps = [unit for unit, note in notes.items() if note is None]
    if gaps:
        counts = {part.count for part in unfinished.parts()}
        parts = [Part(number, count) for count in sorted(counts) for number in range(1, count + 1)]
        lacking = [part for part in parts if not set(gaps).isdisjoint(part.of(units))]
        names = ", ".join(f"{part.number} of {part.count}" for part in lacking[:NAMED_PARTS])
        more = f" and {len(lacking) - NAMED_PARTS} more" if len(lacking) > NAMED_PARTS else ""
        raise ValueError(
            f"{unfinished.out} lacks {len(gaps):,} of {len(units):,} pieces, the first {gaps[0].name}; run part {names}"
            f"{more}, then join again."
        )
    whole = {unit: note for unit, note in notes.items() if note is not None}
    for note in whole.values():
        for entry in note["shards"].values():
            path = unfinished.out / entry["file"]
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise ValueError(f"{path} is not as it was written; run its part again, then join again.")
    return whole


def _manifest(plan: dict[str, Any], notes: dict[Unit, dict[str, Any]], skips: list[Skip], out: Path) -> dict[str, Any]:
    config = plan["config"]
    palette = load_palette(out / PALETTE, config["palette"]["colors"], key="the palette")
    encoded_with = {note["palette_sha256"] for note in notes.values()}
    if encoded_with != {palette_sha256(palette)}:
        raise ValueError(
            f"{out / PALETTE} has sha256 {palette_sha256(palette)}, the parts were encoded with "
            f"{', '.join(sorted(encoded_with))}; put that palette back, or prepare the set again."
        )
    labels = 1 + max(note["largest_label"] for note in notes.values())
    classes = plan["classes"] or [str(number) for number in range(labels)]
    if labels > len(classes):
        raise ValueError(f"a picture has the label {labels - 1}, but the source names {len(classes)} classes.")
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
        "splits": _splits(notes, config["resolution"]),
    }


def _splits(notes: dict[Unit, dict[str, Any]], resolution: int) -> dict[str, Any]:
    """By split: the shards in order, their images, and the error of the stored colours."""
    splits: dict[str, Any] = {}
    for split in ("train", "valid", "test"):
        entries = [note["shards"][split] for note in notes.values() if split in note["shards"]]
        if not entries:
            continue
        images = sum(entry["images"] for entry in entries)
        error = sum(entry["squared_error"] for entry in entries)
        splits[split] = {
            "images": images,
            "palette_mean_squared_error": error / (3 * resolution**2 * images),
            "shards": [{key: value for key, value in entry.items() if key not in NOTES} for entry in entries],
        }
    if "train" not in splits:
        raise ValueError("none of the training pictures can be used; there is no shard set to write.")
    return splits


def _draw(unfinished: Unfinished, manifest: dict[str, Any], out: Path) -> None:
    samples = unfinished.samples()
    if samples is not None:
        palette = load_palette(out / PALETTE, manifest["palette"]["colors"], key="the palette")
        draw_result(*samples, manifest["classes"], palette, out / PICTURES)


def _report(out: Path, manifest: dict[str, Any], pictures: int, skipped: int, rates: list[tuple[float, int]]) -> None:
    splits, palette = manifest["splits"], manifest["palette"]
    images = sum(split["images"] for split in splits.values())
    size = sum(shard["bytes"] for split in splits.values() for shard in split["shards"])
    seconds, timed = sum(seconds for seconds, _ in rates), sum(pictures for _, pictures in rates)
    parts = f"{len(rates)} parts, {seconds:,.1f} s in all" if len(rates) > 1 else f"{seconds:,.1f} s"
    parts += "" if timed == pictures else f" (interrupted calls not counted: {timed:,} pictures)"
    rate = timed / max(seconds, 1e-9)
    lines = [
        f"{out}: finished in {parts}, {rate:,.0f} pictures/s{' a part' if len(rates) > 1 else ''}",
        f"  {pictures:,} pictures, {skipped:,} skipped; {images:,} images, {size / 1e6:,.1f} MB",
    ]
    for split, reasons in manifest["skipped"].items():
        lines.append(f"  {split:5} skipped: {', '.join(f'{count:,} {reason}' for reason, count in reasons.items())}")
    for name, split in splits.items():
        error = split["palette_mean_squared_error"]
        lines.append(f"  {name:5} {split['images']:>10,} images; mean squared color error {error:.2f} a channel")
    lines.append(f"  {len(manifest['classes'])} classes; {palette['colors']} colors, sha256 {palette['sha256']}")
    lines.append(f"  {out / PICTURES} shows some, beside what they were made from")
    logger.info("\n".join(lines))
    if "valid" not in splits and (manifest["config"]["valid_fraction"] or "valid" in manifest["skipped"]):
        logger.warning(f"{out} has no images in valid: a run on it can't validate, and a probe can't be chosen")
