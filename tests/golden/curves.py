"""Short runs: how they are trained, how their curves are read, and which values differ from the stored ones."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.launch import run
from tests.pipeline.conftest import Runner

FOLDER = Path(__file__).parent
SHARDS, CURVES, EXACT = FOLDER / "shards", FOLDER / "curves", FOLDER / "exact.json"
STEPS = 20
TOLERANCES = {"loss": 1e-5, "valid_loss": 1e-5, "valid_loss_ema": 1e-5, "grad_norm": 1e-4}
"""Relative; README.md says why."""
RATE_TOLERANCE = 1e-12
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {  # ranks, settings
    "1-rank": (1, {}),
    "zero-0": (2, {"parallel__zero_stage": 0}),
    "zero-1": (2, {"parallel__zero_stage": 1}),
    "zero-2": (2, {"parallel__zero_stage": 2}),
    "zero-3": (2, {"parallel__zero_stage": 3}),
    "stages-2": (2, {"parallel__pipeline_stages": 2}),
    "stages-2-data-2": (4, {"parallel__pipeline_stages": 2}),
    "tensor-2": (2, {"parallel__tensor_parallel": 2}),
    "offload-optimizer": (2, {"parallel__offload": "optimizer"}),
    "offload-parameters": (2, {"parallel__offload": "parameters", "parallel__zero_stage": 3}),
}
KINDS = [f"{block} {objective}" for objective in ("next_color", "masked_color") for block in ("igpt", "gpt2")]
Curve = dict[str, list[float]]
"""Values by key of metrics.jsonl."""
Exact = dict[str, list[Any]]
"""What does not depend on the processor: learning_rate and images of each step, and digests of the tokens in tokens."""


def train_curves(layout: str, folder: Path) -> Runner:
    """Trains a run of each kind, named after it, one after the other in the same processes."""
    runner, (ranks, settings) = Runner(SHARDS, folder), LAYOUTS[layout]
    settings = {"schedule__steps": STEPS, "batch__micro_size": 2, "optimizer__learning_rate": 0.003, **settings}
    settings |= {"optimizer__clip_norm": 0.5, "optimizer__weight_decay": 0.1}  # most norms are larger: it clips
    settings |= {"checkpoint__every_steps": STEPS, "validation__every_steps": 10, "validation__images": 13}
    words = []
    for kind in KINDS:
        block, objective = kind.split()
        words.append(runner.arguments(kind, **settings, model__block=block, objective__kind=objective)[3:])
    train_recorded(ranks, words, folder)
    return runner


def train_recorded(ranks: int, runs: list[list[str]], folder: Path) -> None:
    """Trains runs to their end, each with these arguments of `train`, and records their images."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    finished = run(ranks, "-m", "tests.golden.recorded_runs", file, logs=folder / "logs", seconds=1800)
    assert finished.codes == [0] * ranks, "\n".join(finished.outputs)


def curve_of(runner: Runner, name: str, after: int = 0) -> Curve:
    """The curve of a run after some step."""
    rows = [row for row in runner.rows(name) if row["step"] > after]
    found = {key: [row[key] for row in rows if key in row] for key in TOLERANCES}
    return {key: values for key, values in found.items() if values}


def exact_of(runner: Runner, name: str, after: int = 0) -> Exact:
    """What a run after some step has to have in common on all layouts and processors."""
    rows = [row for row in runner.rows(name) if "loss" in row and row["step"] > after]
    assert all(row["applied"] for row in rows)
    recorded = [
        json.loads(line)
        for file in sorted((runner.folder / name).glob("images-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    found: Exact = {key: [row[key] for row in rows] for key in ("step", "images", "learning_rate")}
    return found | {"tokens": [_step_digest(recorded, row["step"]) for row in rows]}


def _step_digest(recorded: Iterable[Mapping[str, Any]], step: int) -> str:
    """The digest of a step's images in the order of the global batch: each data-parallel rank has the next share."""
    shares: dict[int, list[str]] = {}
    for row in recorded:
        if row["step"] == step:  # the stages and tensor-parallel ranks of a data-parallel rank read the same
            assert shares.setdefault(row["data_rank"], row["images"]) == row["images"], f"step {step}: ranks differ"
    images = [image for rank in sorted(shares) for image in shares[rank]]
    assert images, f"step {step}: no recorded images"
    return hashlib.sha256("".join(images).encode()).hexdigest()[:16]


def relative(found: list[float], stored: list[float]) -> list[float]:
    """The relative difference of each value."""
    return [abs(a - b) / abs(b) for a, b in zip(found, stored, strict=True)]


def count_changes(found: Mapping[str, list[Any]], stored: Mapping[str, list[Any]]) -> list[str]:
    """A sentence for each key with another number of values than stored; a key that is absent has none."""
    counts = {key: (len(found.get(key, [])), len(stored.get(key, []))) for key in sorted(found.keys() | stored.keys())}
    return [f"{key} has {new} values, stored {old}" for key, (new, old) in counts.items() if new != old]


def changes(found: Curve, stored: Curve, first: int = 1) -> list[str]:
    """A sentence for each list that differs by more than its tolerance, or only those of `count_changes` if there are
    any; first: the step of the first loss."""
    if sentences := count_changes(found, stored):
        return sentences
    for key, tolerance in TOLERANCES.items():
        differences = relative(found.get(key, []), stored.get(key, []))
        beyond = [number for number, difference in enumerate(differences) if not difference <= tolerance]
        if beyond:
            place = beyond[0]
            where = f"of step {first + place}" if key in ("loss", "grad_norm") else f"number {place + 1}"
            sentences.append(
                f"{key} {where} is {found[key][place]:.9g}, stored {stored[key][place]:.9g}; {len(beyond)} of "
                f"{len(differences)} differ by more than {tolerance:g} (relative), by {max(differences):.1e} at most"
            )
    return sentences


def exact_changes(found: Exact, stored: Exact) -> list[str]:
    """A sentence for each key that differs at all, or the learning rate by more than its tolerance; or only those of
    `count_changes` if there are any."""
    if sentences := count_changes(found, stored):
        return sentences
    for key in sorted(found):
        pairs = list(zip(found[key], stored[key], strict=True))
        if key == "learning_rate":
            beyond = [pair for pair in pairs if not abs(pair[0] - pair[1]) <= RATE_TOLERANCE]  # NaN is beyond it
        else:
            beyond = [pair for pair in pairs if pair[0] != pair[1]]
        if beyond:
            sentences.append(
                f"{key}: {len(beyond)} of {len(pairs)} steps differ, first {beyond[0][0]}, stored {beyond[0][1]}"
            )
    return sentences


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write(path: Path, content: Mapping[str, Mapping[str, list[Any]]]) -> None:
    """Writes JSON with one list a line, and floats with nine digits, which determine an fp32 number."""
    groups = []
    for name, lists in content.items():
        lines = [f"  {json.dumps(key)}: {json.dumps([_rounded(key, value) for value in lists[key]])}" for key in lists]
        groups.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(groups) + "\n}\n")


def _rounded(key: str, value: Any) -> Any:
    return float(f"{value:.9g}") if isinstance(value, float) and key != "learning_rate" else value
