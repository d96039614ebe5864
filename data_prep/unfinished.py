"""The traces of a preparation that is not finished, so that a restart keeps what is whole.

OUT/unfinished/plan.json            what is being prepared
OUT/unfinished/train-000000.json    the manifest entry of a shard that is whole
"""

import shutil
from pathlib import Path
from typing import Any

from data_prep.files import file_sha256, read_json, write_json
from data_prep.shards import MANIFEST, open_shard_set


def finished(out: Path, config: dict[str, Any]) -> bool:
    """Whether `out` is a finished set of this very configuration. Raises ValueError if it is another's or damaged."""
    if not (out / MANIFEST).is_file():
        return False
    manifest = read_json(out / MANIFEST)
    _refuse_difference(out, manifest.get("config", {}) if isinstance(manifest, dict) else {}, config)
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

    def begin(self, plan: dict[str, Any]) -> None:
        """Creates the folder, or goes on in it. Raises ValueError if `out` holds anything else."""
        plan_file = self.folder / "plan.json"
        if plan_file.is_file():
            _refuse_difference(self.out, read_json(plan_file), plan)
            for leftover in [*self.out.glob(".*.partial"), *self.folder.glob(".*.partial")]:
                leftover.unlink(missing_ok=True)
            return
        if self.out.is_dir() and any(child != self.folder for child in self.out.iterdir()):
            raise ValueError(f"--out {self.out} holds other files; choose a new or empty folder.")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(plan_file, plan)

    def keep(self, entry: dict[str, Any]) -> None:
        """Notes that a shard is whole."""
        write_json(self._note(entry["file"]), entry)

    def kept(self, file: str, palette_sha256: str) -> dict[str, Any] | None:
        """The entry of a shard that an earlier run finished with this palette, if it is still as it was written."""
        if not self._note(file).is_file():
            return None
        entry = read_json(self._note(file))
        path = self.out / file
        whole = path.is_file() and entry["palette_sha256"] == palette_sha256 and file_sha256(path) == entry["sha256"]
        return entry if whole else None

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _note(self, file: str) -> Path:
        return self.folder / Path(file).with_suffix(".json").name


def _refuse_difference(out: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises ValueError naming the first key by which two configurations differ."""
    flat_theirs, flat_ours = _flat(theirs), _flat(ours)
    for key in [*flat_ours, *flat_theirs]:
        there, here = flat_theirs.get(key), flat_ours.get(key)
        if there != here:
            raise ValueError(
                f"--out {out} holds a set prepared with {key} {there}, now it is {here}; choose another folder."
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
