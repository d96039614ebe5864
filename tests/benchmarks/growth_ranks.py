"""CPU-seconds of starts, saves and resumes: python -m tests.benchmarks.growth_ranks SHARDS FOLDER RANKS...

The ranks are forks of this process, so that imports are not counted. Prints a line of JSON: the sums over the ranks.
"""

import json
import multiprocessing
import os
import sys
import time
from multiprocessing.queues import Queue
from pathlib import Path

from pipeline.checkpoint.run_folder import RunFolder
from pipeline.config import CheckpointConfig, DataConfig, ModelConfig, TrainConfig, ValidationConfig
from pipeline.distributed import describe_ranks, from_first
from pipeline.layout import BatchConfig
from pipeline.train.checkpointing import Progress
from pipeline.train.engine import pipeline, zero
from pipeline.train.engine.process_group import start_group
from pipeline.train.health.stop import StopRequests
from pipeline.train.health.watchdog import Watchdog
from pipeline.train.loop import Trainer
from pipeline.train.monitor.startup import StartClock
from pipeline.train.setup import check_inputs
from tests.launch import free_port

IMPORTED = pipeline, zero
"""Modules that an engine imports when it is made."""
GLOBAL_SIZE = 8
"""Images of a step, on any number of ranks."""
SECONDS = 300


def config_of(shards: Path) -> TrainConfig:
    """6.6M parameters with ZeRO-1."""
    return TrainConfig(
        model=ModelConfig(layers=8, width=256, heads=4, resolution=16),
        data=DataConfig(shards=str(shards)),
        batch=BatchConfig(global_size=GLOBAL_SIZE, micro_size=1),
        precision="fp32",
        compile=False,
        checkpoint=CheckpointConfig(keep_last=1, keep_every=0),
        validation=ValidationConfig(images=1),
    )


def costs_of_rank(shards: Path, folder: Path) -> dict[str, float]:
    """CPU-seconds of this rank from its first line to a trainer that could step, and of a step's save."""
    config, ranks = config_of(shards), describe_ranks()
    inputs = check_inputs(config, ranks)
    start_group(ranks)
    runs = RunFolder(folder)
    from_first(lambda: runs.open(config, inputs.sets, [], ranks.count))
    trainer = Trainer(inputs, runs, StopRequests(folder), Watchdog(runs, ranks, minutes=0), StartClock())
    started = time.process_time()
    step = trainer.progress.step + 1
    trainer.engine.step(trainer.batches.at(GLOBAL_SIZE * (step - 1), GLOBAL_SIZE), 1e-3)
    stepped = time.process_time()
    trainer.checkpoint_manager.save(trainer.engine, Progress(step, GLOBAL_SIZE * step))
    trainer.checkpoint_manager.finish()
    return {"start": started, "save": time.process_time() - stepped}


def _answer(answers: "Queue[dict[str, float] | str]", variables: dict[str, str], shards: Path, folder: Path) -> None:
    os.environ |= variables
    try:
        answers.put(costs_of_rank(shards, folder))
    except Exception as error:
        answers.put(f"{type(error).__name__}: {error}")
    answers.close()
    answers.join_thread()
    os._exit(0)  # not through the handlers of torch and DeepSpeed


def costs(shards: Path, folder: Path, ranks: int) -> dict[str, float]:
    """The sums over the ranks of one start and its save. Raises RuntimeError with the first error of a rank."""
    context, port = multiprocessing.get_context("fork"), free_port()
    answers: Queue[dict[str, float] | str] = context.Queue()
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    children = []
    for rank in range(ranks):
        variables = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        children.append(context.Process(target=_answer, args=(answers, variables, shards, folder)))
        children[-1].start()
    found: list[dict[str, float]] = []
    try:
        for _ in children:
            answer = answers.get(timeout=SECONDS)
            if isinstance(answer, str):
                raise RuntimeError(answer)
            found.append(answer)
    finally:
        for child in children:
            if len(found) == ranks:
                child.join()
            child.kill()
    return {name: sum(one[name] for one in found) for name in ("start", "save")}


def main(shards: Path, folder: Path, *numbers: int) -> None:
    """A start and a save, then a resume, on each number of ranks."""
    table: dict[str, list[float]] = {"start": [], "save": [], "resume": []}
    for ranks in numbers:
        first = costs(shards, folder / str(ranks), ranks)
        table["resume"].append(costs(shards, folder / str(ranks), ranks)["start"])
        for name, cost in first.items():
            table[name].append(cost)
    print(json.dumps(table), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
