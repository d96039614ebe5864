"""The training loop: read, step, record, validate, sample, probe, save, until the last step or a request to stop.

Start at Trainer.run.
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data_prep.common.exit_codes import FINISHED, STOPPED
from pipeline.checkpoint.metrics_log import SKIPPED_FILE, last_steps
from pipeline.checkpoint.mixture_record import changes
from pipeline.checkpoint.run_folder import RunFolder
from pipeline.config import TrainConfig
from pipeline.distributed import (
    Attempt,
    all_reduce_max,
    attempt,
    describe_ranks,
    from_first,
    gather,
    raise_on_all_ranks,
    set_group_timeout,
)
from pipeline.model.image_grid import completion_grid
from pipeline.model.masks import Batch
from pipeline.rank_errors import is_on_all_ranks, reported_on_all_ranks, reported_once_per_node
from pipeline.schedule import learning_rate_at
from pipeline.train.checkpointing import CheckpointManager, Progress
from pipeline.train.data.verify import verify_shards
from pipeline.train.engine.base import StepResult
from pipeline.train.engine.build import build_engine
from pipeline.train.engine.process_group import set_heartbeat_timeout, start_group
from pipeline.train.health.diverged import Diverged
from pipeline.train.health.lost_rank import explain_lost_rank
from pipeline.train.health.out_of_memory import with_advice
from pipeline.train.health.replicas import check_replicas
from pipeline.train.health.step_filter import DESCRIPTIONS, StepFilter
from pipeline.train.health.stop import StopRequested, StopRequests
from pipeline.train.health.stragglers import SlowRanks
from pipeline.train.health.watchdog import Watchdog, group_timeout, start_timeout
from pipeline.train.monitor.console import Console
from pipeline.train.monitor.peak_memory import peak_memory, peak_memory_table, use_expandable_segments
from pipeline.train.monitor.profiler import Profiler
from pipeline.train.monitor.startup import StartClock
from pipeline.train.monitor.summary import Throughput, describe, log_end, print_finished
from pipeline.train.monitor.telemetry import NOT_EVALUATED, EvaluatedStep, StepClock, evaluated, open_telemetry
from pipeline.train.probe.measure import probe
from pipeline.train.setup import Inputs, check_inputs, choose_kernels, choose_reader
from pipeline.train.start import check_origin, find_source, load, record_of
from pipeline.train.validation import spread, validation_losses

logger = logging.getLogger(__name__)

SAMPLES_PER_IMAGE = 2


def train(config: TrainConfig, run: Path, command: list[str], resume_from: int | None = None) -> int:
    """Trains to the last step, or until asked to stop. Returns the exit code.

    resume_from: the step of an earlier checkpoint to resume from; None for the newest.

    Raises ValueError or OSError for invalid input, Diverged if training can't continue, OutOfMemory with advice.
    """
    start_clock = StartClock()
    start_clock.mark("imports")
    gc.freeze()  # DeepSpeed runs the garbage collector twenty times while it starts; imported modules are excluded
    use_expandable_segments()
    ranks, folder, minutes = describe_ranks(), RunFolder(run), config.health.hang_minutes
    with reported_once_per_node(ranks.local_rank):
        inputs = check_inputs(config, ranks)
        step = folder.resume_step(resume_from)
        folder.check(config, inputs.sets, step)
        inputs = replace(inputs, sets=inputs.sets.named(folder.names_of_sets(step)))
        check_origin(inputs, folder)
        if ranks.device.type == "cuda":
            set_heartbeat_timeout(group_timeout(minutes), ranks)
    if step is None and folder.finished_steps() >= config.schedule.steps:
        print_finished(folder, config)
        return FINISHED
    start_clock.mark("checks")
    members = start_group(ranks, start_timeout(minutes), group_timeout(minutes))
    stop = StopRequests(run, checks_file=ranks.is_first)  # until here a signal ends the process: nothing is trained yet
    start_clock.mark("rendezvous")
    try:
        resume_from = from_first(partial(folder.resume_step, resume_from))  # a rank's own file may be an older copy
        from_first(partial(folder.open, config, inputs.sets, command, ranks.count))
        verify_shards(inputs.sets, folder, ranks)
        watchdog = Watchdog(folder, ranks, minutes)
        set_group_timeout(group_timeout(minutes))
        start_clock.mark("shards' digests")
        trainer = Trainer(inputs, folder, stop, watchdog, start_clock, resume_from)
        gc.collect()
        gc.freeze()
        gc.enable()
        with finishing_saves(trainer.checkpoint_manager):
            progress = trainer.run()
        finished = progress.step >= config.schedule.steps and not trainer.interrupted
        with raise_on_all_ranks():  # a rank that leaves early would break the others' connections
            if ranks.is_first:
                folder.note("finished" if finished else "stopped", step=progress.step, images=progress.images)
                log_end(run, progress.step, finished)
        watchdog.end()
        return FINISHED if finished else STOPPED
    except BaseException as error:
        advice = with_advice(error, inputs) or explain_lost_rank(error, ranks, members)
        folder.note_failure(advice or error)
        if advice is not None:
            raise advice from error
        raise
    finally:
        folder.close()


@contextmanager
def finishing_saves(checkpoint_manager: CheckpointManager) -> Iterator[None]:
    """If all ranks raise an error, the checkpoint that is being written is still finished."""
    try:
        yield
    except Exception as error:
        if is_on_all_ranks(error):
            checkpoint_manager.finish()
        raise


class RankFlags(NamedTuple):
    """Values that the ranks all-reduce once a step, with max: a flag is 1 if it is set on any rank."""

    read_failed: float
    """Whether the images of the next step could not be read."""
    stopping: float
    telemetry_failed: float
    writing: float
    """Whether a checkpoint is being written."""
    save_overdue: float
    profile: float
    data_wait: float
    """Seconds for which the slowest rank waited for data."""
    memory_bytes: float
    reserved_bytes: float


class Trainer:
    """Trains a run from its start, or its newest checkpoint, to its end: `run` is the loop."""

    def __init__(
        self,
        inputs: Inputs,
        folder: RunFolder,
        stop: StopRequests,
        watchdog: Watchdog,
        start_clock: StartClock,
        resume_from: int | None = None,
    ) -> None:
        """Builds the engine, loads what the run resumes or starts from, and logs the derived quantities.

        resume_from: the step of the checkpoint; None for the newest complete one.
        """
        self.inputs, self.stop, self.watchdog = inputs, stop, watchdog
        self.start_clock, self.run_folder = start_clock, folder
        config, ranks = self.config, self.ranks = inputs.config, inputs.ranks
        torch.manual_seed((config.seed * 1_000_003 + config.parallel.random_rank(ranks.rank)) % 2**63)
        source = find_source(folder, resume_from, inputs)
        start_clock.mark("verifying checkpoints")
        kernels = choose_kernels(inputs, folder)
        self.engine = build_engine(config, inputs.model_config, ranks, initial=source is None)
        start_clock.mark("model and engine")
        order, self.batches = choose_reader(inputs, self.engine, record_of(source, config))
        self.checkpoint_manager = CheckpointManager(
            folder.checkpoints, inputs, order, saved=lambda step: folder.note("running", checkpoint=step)
        )
        self.progress = load(source, self.checkpoint_manager, self.engine, folder)
        if history := changes(self.checkpoint_manager.mixture):
            from_first(partial(folder.note, "running", mixture_history=history))
        start_clock.mark("loading")
        self.throughput = Throughput.measure(inputs.model_config, config.precision, ranks)
        start_clock.mark("peak of the device")
        console = Console(self.throughput, inputs, self.progress.step)
        self.telemetry = open_telemetry(folder.path, self.progress.step, console, ranks)
        rows = from_first(partial(last_steps, folder.path, self.progress.step, config.health.spike_window))
        self.step_filter = StepFilter(config.health, rows)
        start_clock.mark("metrics")
        self.profiler, self.slow_ranks = Profiler(folder.path, config.profile, ranks), SlowRanks(ranks)
        self.first_step, self.last_step = self.progress.step + 1, config.schedule.steps
        self.save_pending, self.interrupted = False, False
        """interrupted: whether a request to stop ended the evaluation of the last step."""
        self.clock = StepClock()
        if ranks.is_first:
            end = self.progress.images + config.batch.images_between(self.progress.step, self.last_step)
            logger.info(f"derived quantities of the run:\n{describe(inputs, self.throughput, kernels, order, end)}")

    def run(self) -> Progress:
        """Trains until the last step or a request to stop. A step is recorded before it is saved.

        The host waits for the device only before a step's update (ConditionalStep). While the device computes the
        update, the host reads the next batch, exchanges the flags and records the step.
        """
        self.evaluate_loaded_step()
        self.clock.start()
        batch = self.read_batch(self.progress)
        flags = self.sync_flags(batch)
        while self.progress.step < self.last_step and (self.save_pending or not flags.stopping):
            step = self.progress.step + 1
            result = self.train_step(step, batch.value(bool(flags.read_failed)), profile=bool(flags.profile))
            done = Progress(step, self.progress.images + self.config.batch.size_at(step))
            batch = self.read_batch(done)
            seconds, waited = self.clock.lap()
            flags = self.sync_flags(batch, waited)
            self.record(step, result, seconds, waited, flags)
            if flags.telemetry_failed:
                self.telemetry.raise_failure()
            if not flags.writing:
                self.checkpoint_manager.finish()
            self.progress = done
            with self.clock.paused():
                self.evaluate()
            flags = flags._replace(stopping=flags.stopping or self.interrupted)
            save_now = self.decide_to_save(flags)
            self.compare_replicas(save_now)
            if save_now:
                with self.clock.paused():
                    self.save()
        self.close(flags)
        return self.progress

    def sync_flags(self, batch: Attempt[Batch], data_wait: float = 0.0) -> RankFlags:
        """All-reduces the flags of all ranks; data_wait: seconds for which this rank waited for data."""
        memory = peak_memory(self.ranks.device)
        own = RankFlags(
            read_failed=batch.error is not None,
            stopping=self.stop.pending(),
            telemetry_failed=self.telemetry.failure is not None,
            writing=self.checkpoint_manager.writing(),
            save_overdue=self.checkpoint_manager.overdue(),
            profile=self.profiler.requested(),
            data_wait=data_wait,
            memory_bytes=memory.used,
            reserved_bytes=memory.reserved,
        )
        return RankFlags(*all_reduce_max(list(own)))

    def read_batch(self, done: Progress) -> Attempt[Batch]:
        """This rank's share of the images of the step after `done`; an empty attempt after the last step."""
        step = done.step + 1
        if step > self.last_step:
            return Attempt()
        self.watchdog.enter("reading", step)
        size = self.config.batch.size_at(step)
        batch = attempt(lambda: self.clock.wait_for(partial(self.batches.at, done.images, size)))
        self.watchdog.enter("exchanging flags", max(done.step, self.first_step))  # here ranks wait for those that read
        return batch

    def train_step(self, step: int, batch: Batch, profile: bool) -> StepResult:
        """Forward pass, backward pass, and the update unless the step filter skips it."""
        self.watchdog.enter("training", step)
        self.profiler.before(step, profile)
        result = self.engine.step(batch, self.learning_rate(step), self.step_filter.accept)
        self.step_filter.record(result)
        return result

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        return learning_rate_at(step, self.config.optimizer.learning_rate, self.config.schedule)

    def record(self, step: int, result: StepResult, seconds: float, waited: float, flags: RankFlags) -> None:
        """Writes the step's row; logs profile, slow ranks and skipped steps. Raises Diverged as record_skipped does."""
        size = self.config.batch.size_at(step)
        row = {
            "step": step,
            "images": self.progress.images + size,
            "loss": result.loss,
            "learning_rate": self.learning_rate(step),
            "grad_norm": result.grad_norm,
            "applied": result.applied,
            **self.throughput.rates(size, seconds),
            "data_wait": flags.data_wait / seconds,
            "memory_bytes": flags.memory_bytes,
            "reserved_bytes": flags.reserved_bytes,
        }
        epochs = self.checkpoint_manager.order.epochs(self.progress.images + size)
        self.telemetry.training_step(row, seconds, self.clock.pauses, epochs)
        if step == self.first_step:
            self.start_clock.mark("first step")
            self.telemetry.log(self.start_clock.describe())
        self.telemetry.log(self.profiler.after(step))
        self.telemetry.log(self.slow_ranks.check(self.engine, waited))
        if result.reason is not None:
            self.record_skipped(row, result.reason)

    def record_skipped(self, row: dict[str, Any], reason: str) -> None:
        """Records a skipped step or a loss spike with its images. Raises Diverged after too many in a row."""
        start, stop = self.progress.images, row["images"]
        numbers = self.checkpoint_manager.order.image_numbers(start, stop - start)
        images = self.inputs.sets.locations(numbers)
        self.telemetry.skipped_step(row | {"reason": reason, "positions": [start, stop], "pictures": images})
        if self.step_filter.exhausted:
            raise Diverged(
                f"step {row['step']} was skipped ({DESCRIPTIONS[reason]}: loss {row['loss']}, gradient norm "
                f"{row['grad_norm']}), and {self.step_filter.skipped_in_a_row} skipped steps in a row end the run "
                f"(health.max_skipped); its images are {', '.join(images[:3])} ...; {SKIPPED_FILE} of the run lists "
                f"those of all skipped steps; try a lower optimizer.learning_rate, a longer warm-up or precision fp32."
            )

    def is_due(self, every: int) -> bool:
        """Whether this step is a multiple of `every`, or the last step; never if `every` is 0."""
        step = self.progress.step
        return every > 0 and (step % every == 0 or step == self.last_step)

    def decide_to_save(self, flags: RankFlags) -> bool:
        """Whether to save now. A due save stays pending while the weights may be non-finite.

        The next applied step shows that they are finite; health.max_skipped skipped steps in a row end the run.
        """
        due = self.is_due(self.config.checkpoint.every_steps) or flags.stopping or flags.save_overdue
        self.save_pending = self.save_pending or bool(due)
        finite = not self.step_filter.weights_may_be_nonfinite or self.progress.step == self.last_step
        save_now, self.save_pending = self.save_pending and finite, self.save_pending and not finite
        return save_now

    def compare_replicas(self, save_now: bool) -> None:
        """Compares replicated weights every health.replicas_every_steps, and before each save."""
        self.watchdog.enter("comparing weights", self.progress.step)
        every = self.config.health.replicas_every_steps
        if every and (save_now or self.is_due(every)):
            check_replicas(self.engine, self.progress.step)

    def evaluate(self, done: EvaluatedStep = NOT_EVALUATED) -> None:
        """Validates, draws samples and probes, if that is due and not done; a request to stop ends it."""
        step = self.progress.step
        try:
            if self.is_due(self.config.validation.every_steps) and not done.validated:
                self.watchdog.enter("validation", step)
                self.validate()
            if self.is_due(self.config.samples.every_steps) and self.inputs.masks is None and not done.sampled:
                self.watchdog.enter("samples", step)
                self.draw_samples()
            if self.inputs.probe and self.is_due(self.config.probe.every_steps) and not done.probed:
                self.watchdog.enter("probe", step)
                accuracies = probe(self.engine, self.inputs, self.check_for_stop)
                row = {"step": step, "images": self.progress.images, **accuracies}
                self.telemetry.probe(row, self.config.probe.test_images)
        except StopRequested:
            self.interrupted = True
            self.telemetry.log(f"a request to stop ended the evaluation of step {step}; the next start repeats it")

    def evaluate_loaded_step(self) -> None:
        """Evaluates the loaded step if due and not recorded, as when a request to stop had ended that."""
        if self.progress.step:
            self.evaluate(from_first(partial(evaluated, self.run_folder.path, self.progress.step)))

    def check_for_stop(self) -> None:
        """Raises StopRequested on all ranks if one was asked to stop; all ranks call it."""
        if all_reduce_max([self.stop.pending()])[0]:
            raise reported_on_all_ranks(StopRequested())

    def validate(self) -> None:
        """Computes the validation loss of each set; also that of the weights' average, if there is one."""
        losses = partial(validation_losses, self.engine, self.inputs, self.check_for_stop)
        row = {"step": self.progress.step, "images": self.progress.images, **losses()}
        if self.config.ema.decay:
            self.watchdog.enter("validation", self.progress.step)
            with self.engine.averaged():
                row["valid_loss_ema"] = losses()["valid_loss"]
        self.telemetry.validation(row)

    def draw_samples(self) -> None:
        """Completes half images of the valid split of each set."""
        sets, count = self.inputs.sets, self.config.samples.images
        tokens = np.concatenate([each.batch(spread(each.images, count)).tokens for each in self.inputs.held_out])
        drawn = self.engine.complete(tokens, SAMPLES_PER_IMAGE, self.config.seed, self.check_for_stop)
        grid = completion_grid(tokens, drawn, sets.palette, sets.resolution)
        self.telemetry.samples(self.progress.step, grid)

    def save(self) -> None:
        """Starts a checkpoint, once all rows up to its step are on disk."""
        self.watchdog.enter("saving", self.progress.step)
        self.telemetry.flush()
        self.telemetry.raise_failure()
        self.checkpoint_manager.save(self.engine, self.progress)

    def close(self, flags: RankFlags) -> None:
        """Finishes the pending save, a profile and all files, on every rank."""
        self.watchdog.enter("ending", self.progress.step)
        self.checkpoint_manager.finish()
        self.telemetry.log(self.profiler.close(self.progress.step))
        self.telemetry.log(peak_memory_table(self.ranks.device, gather(peak_memory(self.ranks.device))))
        if flags.stopping:
            self.stop.acknowledge()
        self.batches.close()
        self.engine.close()
        self.telemetry.close()
        self.telemetry.raise_failure()
