"""The traces of a preparation that is not finished, so that a restart keeps what is complete and parts can be joined.

OUT/unfinished/plan.json                  what is being prepared; the same for all parts
OUT/unfinished/train-000000.json          a complete unit: its shards' manifest entries, and what was skipped
OUT/unfinished/part-00001-of-00007.json   a part that was begun; how long it took, when it is done
OUT/unfinished/samples.npz                the first images, for the picture of the result
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


def finished(out: Path, config: dict[str, Any]) -> bool:
    """Whether `out` is a finished set of this very configuration. Raises ValueError if it is another's or damaged."""
    if not (out / MANIFEST).is_file():
        return False
    manifest = read_json(out / MANIFEST)
    refuse_difference(out, manifest.get("config", {}) if isinstance(manifest, dict) else {}, config)
    try:
        open_shard_set(out)
    except ValueError as error:
        raise ValueError(f"{error} Delete {out} to prepare it again.") from error
    Unfinished(out).remove()
    return True


class Unfinished:
    """The folder `unfinished` of a set in preparation."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / "unfinished"
        self._plan_file = self.folder / PLAN

    def begin(self, plan: dict[str, Any]) -> None:
        """Creates the folder, or resumes in it. Raises ValueError if `out` holds anything else."""
        if not self._plan_file.is_file():
            others = self.out.is_dir() and any(child != self.folder for child in self.out.iterdir())
            if others and not self._plan_file.is_file():  # asked again: another part may have begun meanwhile
                raise ValueError(f"--out {self.out} holds other files; choose a new or empty folder.")
        begin_plan(self._plan_file, self.out, plan)

    def plan(self) -> dict[str, Any]:
        """Raises ValueError if nothing was begun here."""
        if not self._plan_file.is_file():
            raise ValueError(f"{self.out} holds no parts of a shard set; prepare them with --part and --parts first.")
        return read_json(self._plan_file)

    def begin_part(self, part: Part, max_skipped: float) -> None:
        """Notes that a part was begun, and the share of pictures that it may skip."""
        write_json(self._part_file(part), self._noted_parts().get(part, {}) | {"max_skipped": max_skipped})

    def finish_part(self, part: Part, max_skipped: float, seconds: float, pictures: int) -> None:
        """Notes that a part is done, and what its last call took to meet `pictures` of its pictures."""
        self._check_begun()
        noted = self._noted_parts().get(part, {})
        took = {"seconds": noted.get("seconds", 0) + round(seconds, 1), "pictures": noted.get("pictures", 0) + pictures}
        write_json(self._part_file(part), {"max_skipped": max_skipped} | took)

    def parts(self) -> list[Part]:
        """Those that were begun."""
        return list(self._noted_parts())

    def rates(self) -> list[tuple[float, int]]:
        """Of each part that is done: the seconds that calls took which came to their end, and the pictures they met."""
        done = [noted for noted in self._noted_parts().values() if "seconds" in noted]
        return [(noted["seconds"], noted["pictures"]) for noted in done]

    def max_skipped(self) -> float:
        """The largest share that one of the parts which are done was allowed to skip."""
        noted = list(self._noted_parts().values())
        return max(part["max_skipped"] for part in [one for one in noted if "seconds" in one] or noted)

    def _check_begun(self) -> None:
        """What comes after the parts were joined, or the folder removed, must not begin it anew."""
        if not self._plan_file.is_file():
            raise ValueError(
                f"{self.out} was joined or removed while this call was at work; it is not needed any more."
            )

    def _noted_parts(self) -> dict[Part, dict[str, Any]]:
        found: dict[Part, dict[str, Any]] = {}
        for file in sorted(self.folder.glob("part-*-of-*.json")):
            _, part, _, parts = file.stem.split("-")
            found[Part(int(part), int(parts))] = read_json(file)
        return found

    def _part_file(self, part: Part) -> Path:
        return self.folder / f"part-{part.name}.json"

    def keep(self, unit: Unit, note: dict[str, Any]) -> None:
        """Notes that a unit is complete."""
        self._check_begun()
        write_json(self._note(unit), note)

    def note(self, unit: Unit) -> dict[str, Any] | None:
        """What was noted of a unit, None if it isn't complete."""
        return read_json(self._note(unit)) if self._note(unit).is_file() else None

    def kept(self, unit: Unit, palette_sha256: str) -> dict[str, Any] | None:
        """The note of a unit that was finished with this palette, if its shards are still as they were written."""
        note = self.note(unit)
        if note is None or note["palette_sha256"] != palette_sha256:
            return None
        return note if all(map(self._is_complete, note["shards"].values())) else None

    def _is_complete(self, entry: dict[str, Any]) -> bool:
        path = self.out / entry["file"]
        return path.is_file() and file_sha256(path) == entry["sha256"]

    def keep_samples(self, samples: Samples) -> None:
        """Keeps the first images for the picture of the result."""
        with atomic_write(self.folder / "samples.npz") as temporary, temporary.open("wb") as file:
            views, tokens, labels = samples
            np.savez(file, views=views, tokens=tokens, labels=labels)

    def samples(self) -> Samples | None:
        """The kept images."""
        if not (self.folder / "samples.npz").is_file():
            return None
        with np.load(self.folder / "samples.npz", allow_pickle=False) as arrays:
            return arrays["views"], arrays["tokens"], arrays["labels"]

    def remove(self) -> None:
        """Removes the traces, and what killed processes left half-written."""
        for leftover in self.out.glob(".*.partial"):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _note(self, unit: Unit) -> Path:
        return self.folder / f"{unit.name}.json"


def begin_plan(file: Path, out: Path, plan: dict[str, Any]) -> None:
    """Writes the plan that all parts share, unless one has. Raises ValueError if that one's differs."""
    if not file.is_file():
        write_json(file, plan)
    # Read again also after writing: another part may have begun at the same moment, with other options.
    refuse_difference(out, read_json(file), plan)


def refuse_difference(out: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises ValueError naming the first key by which two configurations differ."""
    flat_theirs, flat_ours = _flat(theirs), _flat(ours)
    for key in [*flat_ours, *flat_theirs]:
        there, here = flat_theirs.get(key), flat_ours.get(key)
        if there != here and key == "source.fingerprint":
            raise ValueError(
                f"--out {out} was begun with other pictures than the source has now; choose another folder."
            )
        if there != here:
            raise ValueError(
                f"--out {out} holds a set prepared with {key.removeprefix('config.')} {there}, now it is {here}; "
                f"choose another folder."
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
