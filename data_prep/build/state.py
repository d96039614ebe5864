"""The state of an unfinished preparation, from which a restart reuses complete units, and `join` joins the parts.

OUT/unfinished/plan.json                  what is being prepared; the same for all parts
OUT/unfinished/train-000000.json          the result of a complete unit: manifest entries of its shards, and skips
OUT/unfinished/train-000000.npz           digests of its images, and the labels that occur
OUT/unfinished/part-00001-of-00007.json   a part that was started; its duration, once it is complete
OUT/unfinished/samples.npz                the first images, for the preview of the result
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.build.encode import Samples
from data_prep.build.parts import Part
from data_prep.build.plan import Unit
from data_prep.common.files import atomic_write, file_sha256, read_json, write_json
from data_prep.shards.format import MANIFEST
from data_prep.shards.reader import open_shard_set

PLAN = "plan.json"
LABELS = "labels"
"""The name of the array of labels, beside those of the splits."""


def finished(out: Path, config: dict[str, Any]) -> bool:
    """Whether `out` is a finished set with this configuration. Raises ValueError if it is damaged or has another."""
    if not (out / MANIFEST).is_file():
        return False
    manifest = read_json(out / MANIFEST)
    refuse_difference(out, manifest.get("config", {}) if isinstance(manifest, dict) else {}, config)
    try:
        open_shard_set(out)
    except ValueError as error:
        raise ValueError(f"{error} Or delete {out} to prepare it again.") from error
    UnfinishedSet(out).remove()
    return True


class UnfinishedSet:
    """The folder `unfinished` of a set in preparation: see the top of this file."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / "unfinished"
        self._plan_file = self.folder / PLAN

    def start(self, plan: dict[str, Any]) -> None:
        """Creates the folder, or resumes in it. Raises ValueError if `out` contains other files."""
        if not self._plan_file.is_file():
            others = self.out.is_dir() and any(child != self.folder for child in self.out.iterdir())
            if others and not self._plan_file.is_file():  # checked again: another part may have started meanwhile
                raise ValueError(f"--out {self.out} contains other files; choose a new or empty folder.")
        share_plan(self._plan_file, self.out, plan)

    def plan(self) -> dict[str, Any]:
        """Raises ValueError if no part was started here."""
        if not self._plan_file.is_file():
            raise ValueError(f"{self.out} has no parts of a shard set; prepare them with --part and --parts first.")
        return read_json(self._plan_file)

    def start_part(self, part: Part, max_skipped: float) -> None:
        """Records that a part was started, and the share of images that it may skip."""
        write_json(self._part_file(part), self._load_parts().get(part, {}) | {"max_skipped": max_skipped})

    def finish_part(self, part: Part, max_skipped: float, seconds: float, images: int) -> None:
        """Records that a part is complete; adds the duration of this call and the source images that it processed."""
        self._check_started()
        before = self._load_parts().get(part, {})
        total = {
            "seconds": before.get("seconds", 0) + round(seconds, 1),
            "pictures": before.get("pictures", 0) + images,
        }
        write_json(self._part_file(part), {"max_skipped": max_skipped} | total)

    def parts(self) -> list[Part]:
        """The parts that were started."""
        return list(self._load_parts())

    def timings(self) -> list[tuple[float, int]]:
        """(seconds, source images) of each complete part. Calls that were interrupted are not counted."""
        complete = [saved for saved in self._load_parts().values() if "seconds" in saved]
        return [(saved["seconds"], saved["pictures"]) for saved in complete]

    def max_skipped(self) -> float:
        """The largest max_skipped of the complete parts."""
        saved = list(self._load_parts().values())
        return max(part["max_skipped"] for part in [one for one in saved if "seconds" in one] or saved)

    def _check_started(self) -> None:
        """A call that is late, after the parts were joined or the folder was removed, must not recreate the folder."""
        if not self._plan_file.is_file():
            raise ValueError(f"{self.out} was joined or removed while this call was running; the call is not needed.")

    def _load_parts(self) -> dict[Part, dict[str, Any]]:
        found: dict[Part, dict[str, Any]] = {}
        for file in sorted(self.folder.glob("part-*-of-*.json")):
            _, part, _, parts = file.stem.split("-")
            found[Part(int(part), int(parts))] = read_json(file)
        return found

    def _part_file(self, part: Part) -> Path:
        return self.folder / f"part-{part.name}.json"

    def save_result(
        self, unit: Unit, result: dict[str, Any], digests: dict[str, np.ndarray], labels: np.ndarray
    ) -> None:
        """Records that a unit is complete.

        digests: of its images uint64 (n,), by split; labels: the different ones uint32 (m,).
        """
        self._check_started()
        with atomic_write(self._arrays_file(unit)) as temporary, temporary.open("wb") as file:
            np.savez(file, **{LABELS: labels}, **digests)  # type: ignore[arg-type]  # as keyword arguments
        write_json(self._result_file(unit), result)

    def load_result(self, unit: Unit) -> dict[str, Any] | None:
        """The result of a unit; None if it isn't complete, or if an older version wrote it."""
        complete = self._result_file(unit).is_file() and self._arrays_file(unit).is_file()
        if not complete:
            return None
        with np.load(self._arrays_file(unit), allow_pickle=False) as arrays:
            return read_json(self._result_file(unit)) if LABELS in arrays else None

    def load_labels(self, unit: Unit) -> np.ndarray:
        """The different labels of a complete unit's images: uint32 (m,)."""
        with np.load(self._arrays_file(unit), allow_pickle=False) as arrays:
            return arrays[LABELS]

    def load_digests(self, unit: Unit, split: str) -> np.ndarray:
        """The digests of a complete unit's images in a split that it has: uint64 (n,)."""
        with np.load(self._arrays_file(unit), allow_pickle=False) as arrays:
            return arrays[split]

    def reusable_result(self, unit: Unit, palette_sha256: str) -> dict[str, Any] | None:
        """The result of a unit that was prepared with this palette, if its shards are unchanged since."""
        result = self.load_result(unit)
        if result is None or result["palette_sha256"] != palette_sha256:
            return None
        return result if all(map(self._is_unchanged, result["shards"].values())) else None

    def _is_unchanged(self, entry: dict[str, Any]) -> bool:
        path = self.out / entry["file"]
        return path.is_file() and file_sha256(path) == entry["sha256"]

    def save_samples(self, samples: Samples) -> None:
        """Saves the first images for the preview of the result."""
        with atomic_write(self.folder / "samples.npz") as temporary, temporary.open("wb") as file:
            views, tokens, labels = samples
            np.savez(file, views=views, tokens=tokens, labels=labels)

    def load_samples(self) -> Samples | None:
        """The saved images; None if there are none."""
        if not (self.folder / "samples.npz").is_file():
            return None
        with np.load(self.folder / "samples.npz", allow_pickle=False) as arrays:
            return arrays["views"], arrays["tokens"], arrays["labels"]

    def remove(self) -> None:
        """Removes the folder, and temporary files of killed processes."""
        for leftover in self.out.glob(".*.partial"):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _result_file(self, unit: Unit) -> Path:
        return self.folder / f"{unit.name}.json"

    def _arrays_file(self, unit: Unit) -> Path:
        return self.folder / f"{unit.name}.npz"


def share_plan(file: Path, out: Path, plan: dict[str, Any]) -> None:
    """Writes the plan that all parts share, unless another part has. Raises ValueError if the written plan differs."""
    if not file.is_file():
        write_json(file, plan)
    # Read also after writing: another part may have started at the same moment, with other options.
    refuse_difference(out, read_json(file), plan)


def refuse_difference(out: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises ValueError naming the first key by which two configurations differ."""
    flat_theirs, flat_ours = _flat(theirs), _flat(ours)
    for key in [*flat_ours, *flat_theirs]:
        there, here = (flat.get(key, "its default") for flat in (flat_theirs, flat_ours))
        if there != here and key == "source.fingerprint":
            raise ValueError(
                f"--out {out} was started with other images than the source has now; choose another folder."
            )
        if there != here:
            raise ValueError(
                f"--out {out} was prepared with {key.removeprefix('config.')} {there}, but it is now {here}; choose "
                f"another folder."
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
