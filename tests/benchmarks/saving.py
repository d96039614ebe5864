"""How long a save holds up training, asynchronous against synchronous, for iGPT-S (76M parameters) on this machine.

python -m tests.benchmarks.saving
"""

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.checkpoint.probe import probe_batch
from pipeline.checkpoint.run_folder import RunFolder
from pipeline.config import CheckpointConfig, DataConfig, ModelConfig, TrainConfig
from pipeline.distributed import describe_ranks
from pipeline.train.checkpointing import Progress
from pipeline.train.engine.process_group import start_group
from pipeline.train.health.stop import StopRequests
from pipeline.train.health.watchdog import Watchdog
from pipeline.train.loop import Trainer
from pipeline.train.monitor.startup import StartClock
from pipeline.train.setup import check_inputs
from pipeline.train.validation import probe_loss
from tests.launch import run

SAVES = 5


def trainer_on(shards: Path, folder: Path, asynchronous: bool) -> Trainer:
    """One rank with ZeRO-1 at 16x16, after its first step, so that Adam has its moments."""
    config = TrainConfig(
        model=ModelConfig(size="s", resolution=16),
        data=DataConfig(shards=str(shards)),
        precision="fp32",
        checkpoint=CheckpointConfig(asynchronous=asynchronous, keep_last=1),
    )
    config = replace(config, batch=replace(config.batch, global_size=1, micro_size=1))
    ranks = describe_ranks()
    inputs = check_inputs(config, ranks)
    start_group(ranks)
    runs = RunFolder(folder)
    runs.open(config, inputs.sets, [], 1)
    trainer = Trainer(inputs, runs, StopRequests(folder), Watchdog(runs, ranks, minutes=0), StartClock())
    trainer.engine.step(trainer.batches.at(0, 1), 1e-3)
    return trainer


def measure(shards: Path, folder: Path, asynchronous: bool) -> None:
    """Prints the mean seconds that `save` held up the loop, those of its probe, CPU-seconds, and the peak of memory."""
    trainer = trainer_on(shards, folder, asynchronous)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    stalls, probes, own, all_threads = [], [], [], []
    trainer.checkpoint_manager.save(trainer.engine, Progress(0, 0))  # the first takes memory that the others write over
    trainer.checkpoint_manager.finish()
    for number in range(1, SAVES + 1):
        began, began_own, began_all = time.perf_counter(), time.thread_time(), time.process_time()
        trainer.checkpoint_manager.save(trainer.engine, Progress(number, number))
        stalls.append(time.perf_counter() - began)
        own.append(time.thread_time() - began_own)
        all_threads.append(time.process_time() - began_all)
        trainer.checkpoint_manager.finish()
        began = time.perf_counter()
        probe_loss(trainer.engine, probe_batch(trainer.inputs.held_out[0]))
        probes.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    stall, probe = sum(stalls) / SAVES, sum(probes) / SAVES
    kind = "asynchronous" if asynchronous else "synchronous"
    cpu = f"{sum(own) / SAVES:.2f} | {sum(all_threads) / SAVES:.2f}"
    row = f"| {kind} | {stall:.2f} | {probe:.2f} | {stall - probe:.2f} | {cpu} | {before:,.0f} | {peak:,.0f} |"
    print(row, flush=True)


def table(folder: Path) -> Iterator[str]:
    """Lines; each kind in a process of its own."""
    yield (
        "| save | s a save holds up training | of it the probe's forward pass | the rest | CPU-seconds of the loop's "
        "thread | of all threads until the loop goes on | MB before | MB peak |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    options = ["--source.kind=photographs", "--resolution", 16, "--out", folder / "shards"]
    assert run(1, "-m", "data_prep", "shards", *options, logs=folder / "logs").codes == [0]
    for kind in ("synchronous", "asynchronous"):
        own = [folder / "shards", folder / kind, kind]
        done = run(1, "-m", "tests.benchmarks.saving", *own, logs=folder / kind, seconds=1800)
        yield "\n".join(line for line in done.output.splitlines() if line.startswith("|")) or done.output


def main() -> None:
    """The table."""
    with TemporaryDirectory() as folder:
        for line in table(Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]), Path(sys.argv[2]) / "run", sys.argv[3] == "asynchronous")
    else:
        main()
