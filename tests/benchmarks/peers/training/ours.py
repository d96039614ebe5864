"""`pipeline train`'s own loop: reading the shard set, logging every step, a checkpoint at the end of a turn."""

import gc
from pathlib import Path

from pipeline.checkpoint.run_folder import RunFolder
from pipeline.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    SamplesConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)
from pipeline.distributed import describe_ranks
from pipeline.model.masks import Batch
from pipeline.train.engine.base import StepResult
from pipeline.train.engine.process_group import start_group
from pipeline.train.health.stop import StopRequests
from pipeline.train.health.watchdog import Watchdog
from pipeline.train.loop import Trainer
from pipeline.train.monitor.startup import StartClock
from pipeline.train.setup import check_inputs
from tests.benchmarks.peers.paused import PausedLoop, serve_loop
from tests.benchmarks.peers.training.work import Turns, Work, from_command_line


def config_of(work: Work) -> TrainConfig:
    """As its recipe would read."""
    return TrainConfig(
        model=ModelConfig(layers=work.layers, width=work.width, heads=work.heads, resolution=int(work.positions**0.5)),
        data=DataConfig(shards=work.shards),
        batch=BatchConfig(global_size=work.images, micro_size=work.images),
        schedule=ScheduleConfig(steps=10**6, warmup_steps=100),
        precision=work.precision,  # type: ignore[arg-type]
        compile=work.compiled,
        checkpoint=CheckpointConfig(every_steps=work.steps, keep_last=1, keep_every=0),
        validation=ValidationConfig(every_steps=10**6, images=1),
        samples=SamplesConfig(every_steps=0),
    )


class TrainerInTurns(Trainer):
    """The loop as it is, with a pause before the first step of each turn."""

    turns: Turns

    def train_step(self, step: int, batch: Batch, profile: bool) -> StepResult:
        """As a run's, once the turn before has ended."""
        if step > self.first_step:
            self.turns.after_step()
        result = super().train_step(step, batch, profile)
        self.turns.loss = result.loss
        return result

    def save(self) -> None:
        """As a run's; then waits for the thread that writes."""
        self.turns.save(super().save, self.checkpoint_manager.finish)


def main() -> None:
    """Takes turns."""
    work = from_command_line()
    config, ranks = config_of(work), describe_ranks()
    folder = Path(work.folder) / "ours"
    inputs = check_inputs(config, ranks)
    start_group(ranks)
    runs = RunFolder(folder)
    runs.open(config, inputs.sets, [], 1)
    trainer = TrainerInTurns(inputs, runs, StopRequests(folder), Watchdog(runs, ranks, minutes=0), StartClock())
    gc.freeze()

    def run(loop: PausedLoop) -> None:
        trainer.turns = Turns(work, loop)
        trainer.run()

    serve_loop(run)


if __name__ == "__main__":
    main()
