"""python -m tests.golden.renew: trains all that is stored again, prints the differences, and writes what changed.

What is within its tolerance stays as it is stored, so a commit shows only numbers that really changed. README.md says
when to renew.
"""

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests import launch
from tests.fork_server import ForkServer
from tests.golden import curves, stored_runs
from tests.golden.curves import CURVES, EXACT, KINDS, LAYOUTS, TOLERANCES, Curve, Exact
from tests.golden.stored_runs import EXPECTED, RUNS, SAVED, WEIGHTS
from tests.launch import ROOT


def renew_curves(layout: str, compare: bool) -> None:
    """Trains the runs of one layout and writes their curves. compare: writes nothing."""
    path = CURVES / f"{layout}.json"
    with TemporaryDirectory(prefix="golden-") as folder:
        runner = curves.train_curves(layout, Path(folder))
        found = {kind: curves.curve_of(runner, kind) for kind in KINDS}
        exact = {kind.split()[1]: curves.exact_of(runner, kind) for kind in KINDS}
    stored, stored_exact = (curves.read(file) if file.exists() else {} for file in (path, EXACT))
    found = {kind: curve_to_store(f"{layout}, {kind}", curve, stored.get(kind)) for kind, curve in found.items()}
    exact = {kind: exact_to_store(f"{layout}, {kind}", new, stored_exact.get(kind)) for kind, new in exact.items()}
    if not compare:
        curves.write(path, found)
        curves.write(EXACT, exact)


def renew_expected(stored: Path, compare: bool) -> None:
    """Resumes and exports a stored run, and writes what it gave. The run itself stays as it is. compare: writes
    nothing."""
    path = stored / EXPECTED
    with TemporaryDirectory(prefix="golden-") as folder:
        runner = stored_runs.resume(stored, "zero-1", Path(folder))
        curve, exact = (of(runner, "run", SAVED) for of in (curves.curve_of, curves.exact_of))
        logits = {kind: stored_runs.logits_of(stored, kind, Path(folder) / kind).flatten().tolist() for kind in WEIGHTS}
    expected = curves.read(path) if path.exists() else {}
    name = str(stored.relative_to(ROOT))
    curve = curve_to_store(name, curve, expected.get("curve"), SAVED + 1)
    exact = exact_to_store(name, exact, expected.get("exact"))
    logits = {
        kind: logits_to_store(f"{name}, {kind} logits", new, expected.get("logits", {}).get(kind))
        for kind, new in logits.items()
    }
    if not compare:
        curves.write(path, {"curve": curve, "exact": exact, "logits": logits})


def curve_to_store(name: str, found: Curve, stored: Curve | None, first: int = 1) -> Curve:
    """The stored curve, if none of its lists is beyond its tolerance; prints the largest differences."""
    sentences = ["new"] if stored is None else curves.changes(found, stored, first)
    if stored is None or sentences:
        return _changed(name, sentences, found)
    largest = {key: max(curves.relative(found[key], stored[key])) for key in TOLERANCES if key in found}
    print(
        f"{name}: unchanged; largest: {', '.join(f'{key} {value:.1e}' for key, value in largest.items())}", flush=True
    )
    return stored


def exact_to_store(name: str, found: Exact, stored: Exact | None) -> Exact:
    """As `curve_to_store`."""
    sentences = ["new"] if stored is None else curves.exact_changes(found, stored)
    return _changed(f"{name}, exact", sentences, found) if stored is None or sentences else stored


def logits_to_store(name: str, found: list[float], stored: list[float] | None) -> list[float]:
    """As `curve_to_store`."""
    if stored is None:
        return _changed(name, ["new"], found)
    if len(found) != len(stored):
        return _changed(name, [f"{len(found)} values, stored {len(stored)}"], found)
    differences = [abs(a - b) for a, b in zip(found, stored, strict=True)]
    largest = max(differences)
    if not all(difference <= stored_runs.LOGITS_TOLERANCE for difference in differences):  # NaN is beyond it
        return _changed(name, [f"they differ by {largest:.1e}"], found)
    print(f"{name}: unchanged; largest: {largest:.1e}", flush=True)
    return stored


def _changed(name: str, sentences: list[str], found: Any) -> Any:
    print(f"{name}: CHANGED: {'; '.join(sentences)}", flush=True)
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; ends with a sentence if a run can't be stored under the name of --store."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.renew", description=__doc__)
    parser.add_argument("--compare", action="store_true", help="print the differences, write nothing")
    parser.add_argument("--store", metavar="NUMBER", help="first store a new run, with its checkpoint, in runs/NUMBER")
    parser.add_argument("--only", choices=[*LAYOUTS, "runs"], nargs="+", help="some layouts, or the stored runs")
    chosen = parser.parse_args(arguments)
    if chosen.store is not None:
        newest = stored_runs.names()[-1]
        if not chosen.store.isdecimal() or chosen.store != str(int(chosen.store)) or int(chosen.store) <= int(newest):
            parser.error(f"--store is {chosen.store!r}; it must be a number above {newest}, the newest stored run.")
        if chosen.compare:
            parser.error("--store writes a run, and --compare writes nothing; give one of them.")
    return chosen


def main() -> int:
    chosen = parse()
    os.chdir(ROOT)
    launch.fork_server = ForkServer()
    if chosen.store is not None:
        with TemporaryDirectory(prefix="golden-") as folder:
            stored_runs.store_run(Path(folder), RUNS / chosen.store / "run")
    for layout in LAYOUTS:
        if chosen.only is None or layout in chosen.only:
            renew_curves(layout, chosen.compare)
    for stored in stored_runs.names():
        if chosen.only is None or "runs" in chosen.only or stored == chosen.store:
            renew_expected(RUNS / stored, chosen.compare)
    return 0


if __name__ == "__main__":
    sys.exit(main())
