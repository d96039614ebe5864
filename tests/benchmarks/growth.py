"""How cost grows with images, shards, steps, checkpoints and ranks: CPU-seconds at each size, and the exponent.

An exponent of 1 is linear. It is that of the last two sizes, where constant costs weigh least.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np

from data_prep.common.files import write_json
from data_prep.palette.codec import save_palette
from data_prep.shards.format import MANIFEST
from data_prep.shards.reader import open_shard_set
from pipeline.checkpoint.format import open_checkpoint, retain
from pipeline.checkpoint.metrics_log import METRICS_FILE, TENSORBOARD_FOLDER, drop_rows_after, last_steps, lines_until
from pipeline.checkpoint.metrics_table import read_table
from pipeline.checkpoint.run_files import CHECKPOINTS_FOLDER, RECORD_FILE, committed
from pipeline.config import CheckpointConfig
from pipeline.model_folder.tensorboard_events import copy_events
from pipeline.operate.status import status_command
from pipeline.results.curve import CURVE, draw_curve
from tests.benchmarks.images import write_photographs
from tests.benchmarks.long_runs import FIRST_STEP, write_checkpoints, write_events, write_run
from tests.benchmarks.marks import Growth
from tests.benchmarks.peers import preparing
from tests.benchmarks.peers.formats import ours
from tests.benchmarks.peers.token_images import token_images
from tests.benchmarks.peers.turn import cpu_seconds
from tests.benchmarks.record import GROWTH_HEAD
from tests.launch import run

FACTORS = (1, 10, 100)
RANKS = (1, 2, 4, 8)
IMAGES, SIDE, BATCH = 4_096, 8, 128
SHARDS = 10
PREPARED = 200
STEPS = 20_000
CHECKPOINTS = 10
REPEATED = 3
RANKS_SECONDS = 1_800
"""The limit of all starts together."""


def table(folder: Path) -> Iterator[str | Growth]:
    """Of images, shards, steps, checkpoints and ranks."""
    yield GROWTH_HEAD
    yield _growth("reading an epoch", f"{IMAGES:,} images", [_reading(folder, factor) for factor in FACTORS])
    yield _growth("opening a set", f"{SHARDS} shards", [_opening(folder, factor) for factor in FACTORS])
    yield _growth("the first batch", f"{IMAGES:,} images", [_first_batch(folder, factor) for factor in FACTORS])
    yield _growth("images to shards", f"{PREPARED} JPEGs", [_preparing(folder, factor) for factor in FACTORS])
    of_ranks = _measured_ranks(folder)
    yield from _long_runs(folder)
    yield from _ranks(of_ranks)


def _long_runs(folder: Path) -> Iterator[Growth]:
    """Of the steps of a run, then of its checkpoints."""
    runs = [write_run(folder / f"run-{factor}", STEPS * factor) for factor in FACTORS]
    for one, factor in zip(runs, FACTORS, strict=True):
        write_events(one, STEPS * factor)
    steps = f"{STEPS:,} steps"
    works: dict[str, tuple[Callable[[Path], object], int]] = {
        "`pipeline status`": (_status, REPEATED),
        "resuming: end of metrics.jsonl": (_resume, REPEATED),
        "training curve of a report": (_curve, 1),
        "export: rows of metrics.jsonl": (_export_rows, 1),
        "export: TensorBoard events": (_export_events, 1),
    }
    for what, (work, repeated) in works.items():
        yield _growth(what, steps, [_best(lambda one=one, work=work: work(one), repeated) for one in runs])
    status, newest = [], []
    for factor in FACTORS:
        write_checkpoints(runs[0], _checkpoint(folder), CHECKPOINTS * factor)
        status.append(_best(lambda: _status(runs[0])))
        newest.append(_best(lambda: _newest(runs[0])))
    yield _growth("`pipeline status`", f"{CHECKPOINTS} checkpoints", status)
    yield _growth("resuming: newest checkpoint", f"{CHECKPOINTS} checkpoints", newest)


def _measured_ranks(folder: Path) -> dict[str, list[float]]:
    """The sums over ranks of one machine with gloo, without imports; their runs remain, each with a checkpoint."""
    shards = folder / "shards-16"
    ours.write(token_images(IMAGES, 16**2), shards)
    words = ("-m", "tests.benchmarks.growth_ranks", shards, folder / "ranks", *RANKS)
    done = run(1, *words, logs=folder / "logs", seconds=RANKS_SECONDS)
    assert done.codes == [0], done.output
    return json.loads(done.output.splitlines()[-1])


def _ranks(found: dict[str, list[float]]) -> Iterator[Growth]:
    """Of a start, a save and a resume."""
    whats = {"start": "start of a run, all ranks", "save": "save of 6.6M parameters, all ranks"}
    for name, what in (whats | {"resume": "resume of a run, all ranks"}).items():
        yield _growth(what, "1 rank", found[name], RANKS)


def _checkpoint(folder: Path) -> Path:
    """That of the run of one rank."""
    return committed(folder / "ranks" / str(RANKS[0]) / CHECKPOINTS_FOLDER)[-1]


def _growth(what: str, at: str, seconds: Sequence[float], factors: Sequence[int] = FACTORS) -> Growth:
    exponent = math.log(seconds[-1] / seconds[-2]) / math.log(factors[-1] / factors[-2])
    return Growth(what, at, factors, seconds, exponent)


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
    write_photographs(images, PREPARED, (32, 32))
    for file in sorted(images.glob("train/*/*")):
        for copy in range(1, factor):
            os.link(file, file.with_name(f"{copy}-{file.name}"))
    out = iter(range(REPEATED + 1))
    prepare = preparing.ours(images, palette, 32, "")

    def once() -> None:
        target = folder / f"prepared-{factor}-{next(out)}"
        target.mkdir()
        prepare(target)

    return _best(once, 1)


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


def _export_rows(run: Path) -> None:
    """Up to half of the steps, as those of an older checkpoint are."""
    with (run / "exported.jsonl").open("w") as rows:
        rows.writelines(lines_until(run / METRICS_FILE, read_last_step(run) // 2))


def _export_events(run: Path) -> None:
    """The same; one event a step, where a run has ten."""
    target = run / "exported"
    shutil.rmtree(target, ignore_errors=True)
    copy_events(run / TENSORBOARD_FOLDER, target, FIRST_STEP + read_last_step(run) // 2)


def _newest(run: Path) -> None:
    """Finds the newest checkpoint and reads its manifest; then the rule of which to retain, which retains all."""
    newest = committed(run / CHECKPOINTS_FOLDER)[-1]
    step = open_checkpoint(newest).record.step
    retain(run / CHECKPOINTS_FOLDER, CheckpointConfig(keep_last=1, keep_every=1), step)
