"""How cost grows: CPU-seconds at 1, 10 and 100 times as many images, shards, or steps; and the exponent.

An exponent of 1 is linear. It is that of the last factor of ten, where constant costs weigh least.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np

from data_prep.common.files import write_json
from data_prep.palette.codec import save_palette
from data_prep.shards.format import MANIFEST
from data_prep.shards.reader import open_shard_set
from pipeline.checkpoint.metrics_log import METRICS_FILE, drop_rows_after, last_steps, to_line
from pipeline.checkpoint.metrics_table import read_table
from pipeline.checkpoint.run_files import CONFIG_FILE, RECORD_FILE
from pipeline.operate.status import status_command
from pipeline.results.curve import CURVE, draw_curve
from tests.benchmarks.data import write_photographs
from tests.benchmarks.peers import preparing
from tests.benchmarks.peers.formats import ours
from tests.benchmarks.peers.token_images import token_images
from tests.benchmarks.peers.turn import cpu_seconds

FACTORS = (1, 10, 100)
IMAGES, SIDE, BATCH = 4_096, 8, 128
SHARDS = 10
PREPARED = 600
STEPS = 20_000
VALIDATION = 5_000
"""Steps between validations."""
REPEATED = 3
HEAD = "| CPU-seconds | at 1x | 1x | 10x | 100x | exponent, 10x to 100x |\n|---|---|---|---|---|---|"


def table(folder: Path) -> Iterator[str]:
    """Reading, preparation, and what is read of metrics.jsonl."""
    yield HEAD
    yield _row("reading an epoch", f"{IMAGES:,} images", [_reading(folder, factor) for factor in FACTORS])
    yield _row("opening a set", f"{SHARDS} shards", [_opening(folder, factor) for factor in FACTORS])
    yield _row("the first batch", f"{IMAGES:,} images", [_first_batch(folder, factor) for factor in FACTORS])
    yield _row("images to shards", f"{PREPARED} JPEGs", [_preparing(folder, factor) for factor in FACTORS])
    runs = [_run(folder / f"run-{factor}", STEPS * factor) for factor in FACTORS]
    steps = f"{STEPS:,} steps"
    yield _row("`pipeline status`", steps, [_best(lambda run=run: _status(run)) for run in runs])
    yield _row("resuming: end of metrics.jsonl", steps, [_best(lambda run=run: _resume(run)) for run in runs])
    yield _row("training curve of a report", steps, [_best(lambda run=run: _curve(run), 1) for run in runs])


def _row(what: str, unit: str, seconds: list[float]) -> str:
    exponent = math.log10(seconds[2] / seconds[1])
    return f"| {what} | {unit} | {' | '.join(f'{one:.3g}' for one in seconds)} | {exponent:.2f} |"


def _best(work: Callable[[], object], repeated: int = REPEATED) -> float:
    """CPU-seconds of this process and its children: the least of some times, after one to warm up."""
    seconds = []
    for _ in range(repeated + 1):
        began = cpu_seconds()
        work()
        seconds.append(cpu_seconds() - began)
    return min(seconds[1:])


def _set(folder: Path, factor: int) -> Path:
    target = folder / f"set-{factor}"
    if not target.exists():
        ours.write(token_images(IMAGES * factor, SIDE**2), target)
    return target


def _reading(folder: Path, factor: int) -> float:
    loader = ours.loader(_set(folder, factor), BATCH)
    return _best(lambda: [None for _ in loader])


def _first_batch(folder: Path, factor: int) -> float:
    """In the middle of an epoch, the set's opening included."""
    target, position = _set(folder, factor), IMAGES * factor // 2

    def first() -> None:
        batches = ours.Loader(target, BATCH, position)
        next(iter(batches))

    return _best(first)


def _opening(folder: Path, factor: int) -> float:
    """Of a set whose shards have the size that the manifest says, and no content: opening reads none."""
    target, template = folder / f"shards-{factor}", _set(folder, 1)
    target.mkdir()
    shutil.copy(template / "palette.npy", target)
    manifest = json.loads((template / MANIFEST).read_text())
    split = manifest["splits"]["train"]
    whole, entries = split["shards"][0], []
    for number in range(SHARDS * factor):
        entries.append(whole | {"file": f"train-{number:06d}.tar"})
        with (target / entries[-1]["file"]).open("wb") as file:
            file.truncate(whole["bytes"])
    split |= {"images": whole["images"] * len(entries), "shards": entries}
    shutil.copy(template / "valid-000000.tar", target)
    write_json(target / MANIFEST, manifest)
    return _best(lambda: open_shard_set(target).split("train"))


def _preparing(folder: Path, factor: int) -> float:
    images, palette = folder / f"images-{factor}", folder / "palette.npy"
    save_palette(palette, np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32))
    write_photographs(images, PREPARED * factor, (32, 32))
    out = iter(range(REPEATED + 1))
    prepare = preparing.ours(images, palette, 32, "")

    def once() -> None:
        target = folder / f"prepared-{factor}-{next(out)}"
        target.mkdir()
        prepare(target)

    return _best(once, 1)


def _run(folder: Path, steps: int) -> Path:
    """A run's folder with what `status` reads and `steps` rows."""
    folder.mkdir()
    write_json(folder / RECORD_FILE, {"status": "finished", "step": steps, "starts": [{}], "updated": ""})
    (folder / CONFIG_FILE).write_text(f"schedule: {{steps: {steps}}}\n")
    with (folder / METRICS_FILE).open("w") as rows:
        for step in range(1, steps + 1):
            losses = {"step": step, "images": BATCH * step, "loss": 2.5 + 1 / step}
            rates = {"learning_rate": 0.003 / step, "grad_norm": 1 / step, "applied": True, "images_per_second": 1234.5}
            rates |= {"tokens_per_second": 1264128.0, "mfu": 0.4512, "data_wait": 0.0001, "memory_bytes": 12345678901}
            rows.write(to_line(losses | rates | {"reserved_bytes": 22345678901}))
            if step % VALIDATION == 0:
                rows.write(to_line({"step": step, "images": BATCH * step, "valid_loss": 2.5}))
    return folder


def _status(run: Path) -> None:
    with redirect_stdout(StringIO()):
        status_command([str(run)])


def _resume(run: Path) -> None:
    """What a resume reads: the rows after its step, to drop them, and the last steps before."""
    step = read_last_step(run)
    drop_rows_after(run / METRICS_FILE, step)
    last_steps(run, step, 100)


def read_last_step(run: Path) -> int:
    """The step in run.json."""
    return int(json.loads((run / RECORD_FILE).read_text())["step"])


def _curve(run: Path) -> None:
    """The table of the rows is read anew: a report is a process of its own."""
    metrics = run / METRICS_FILE
    metrics.touch()
    draw_curve(read_table(metrics), 512, None, run / CURVE)
