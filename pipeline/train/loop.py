"""The training loop: read, step, record, validate, sample, save, until the last step or a request to stop."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.common.exit_codes import FINISHED, STOPPED
from pipeline.checkpoint.metrics_log import SKIPPED_FILE
from pipeline.checkpoint.run_folder import RunFolder
from pipeline.config import TrainConfig
from pipeline.distributed import (
    Ranks,
    all_reduce_max,
    barrier_with_errors,
    describe_ranks,
    gather,
    raise_on_all_ranks,
    start_group,
)
from pipeline.model.image_grid import completion_grid
from pipeline.rank_errors import is_on_all_ranks, reported_once_per_node
from pipeline.schedule import learning_rate_at
from pipeline.train.checkpointing import Progress, Store
from pipeline.train.data.verify import verify_shards
from pipeline.train.health.diverged import Diverged
from pipeline.train.health.replicas import check_replicas
from pipeline.train.health.stop import StopRequests
from pipeline.train.health.stragglers import SlowRanks
from pipeline.train.health.watchdog import Watchdog, group_timeout
from pipeline.train.monitor.startup import StartClock
from pipeline.train.monitor.telemetry import StepClock, peak_memory_bytes, peak_memory_table
from pipeline.train.setup import Inputs, Session, check_inputs, set_up
from pipeline.train.validation import spread, validation_loss

SAMPLES_A_PICTURE = 2


def train(config: TrainConfig, run: Path, command: list[str]) -> int:
    """Trains to the last step, or until asked to stop. Returns the exit code.

    Raises ValueError or OSError for a user's mistake, Diverged if the numbers are no longer finite.
    """
    start_clock = StartClock()
    start_clock.mark("imports")
    gc.freeze()  # DeepSpeed collects garbage twenty times while it starts; what was imported is none
    ranks, folder, stop = describe_ranks(), RunFolder(run), StopRequests(run)
    with reported_once_per_node(ranks.local_rank):
        inputs = check_inputs(config, ranks)
        folder.check(config, inputs.shards)
    if folder.finished_steps() >= config.schedule.steps:
        print(f"{run} has finished its {folder.finished_steps()} steps; nothing is left to train.", flush=True)
        for line in folder.changes(config):
            print(f"without effect on a finished run: {line}", flush=True)
        return FINISHED
    start_clock.mark("checks")
    start_group(ranks, group_timeout(config.health.hang_minutes))
    start_clock.mark("ranks meeting")
    try:
        with raise_on_all_ranks():
            if ranks.is_first:
                folder.open(config, inputs.shards, command, ranks.count)
        verify_shards(inputs.shards, folder, ranks)
        watchdog = Watchdog(folder, ranks, config.health.hang_minutes)
        start_clock.mark("shards' digests")
        session = set_up(inputs, folder, stop, watchdog, start_clock)
        gc.collect()
        gc.freeze()
        gc.enable()
        with finishing_saves(session.store):
            progress = run_loop(inputs, session)
        finished = progress.step >= config.schedule.steps
        with raise_on_all_ranks():  # a rank that leaves early would break the others' connections
            if ranks.is_first:
                folder.note("finished" if finished else "stopped", step=progress.step, images=progress.images)
                print(f"{'finished' if finished else 'stopped on request'} at step {progress.step}: {run}", flush=True)
        watchdog.end()
        return FINISHED if finished else STOPPED
    except BaseException as error:
        folder.note_failure(error)
        raise
    finally:
        folder.close()


@contextmanager
def finishing_saves(store: Store) -> Iterator[None]:
    """An error that all ranks raise does not take along the checkpoint that is being written."""
    try:
        yield
    except Exception as error:
        if is_on_all_ranks(error):
            store.finish()
        raise


def run_loop(inputs: Inputs, session: Session) -> Progress:
    """Trains from session.start; returns how far it came. What happens at a step is recorded before it is saved."""
    config, ranks, engine, store = inputs.config, inputs.ranks, session.engine, session.store
    telemetry, watchdog, profiler = session.telemetry, session.watchdog, session.profiler
    step_filter = session.step_filter
    progress, last = session.start, config.schedule.steps
    clock, slow_ranks = StepClock(), SlowRanks(ranks)
    signs, save_owed = agree(session, ranks), False
    while progress.step < last and (save_owed or not signs.stopping):
        step, size = progress.step + 1, config.batch.size_at(progress.step + 1)
        watchdog.enter("reading", step)
        batch = barrier_with_errors(partial(clock.wait_for, partial(session.batches.at, progress.images, size)), ranks)
        watchdog.enter("training", step)
        profiler.before(step, bool(signs.profile))
        rate = learning_rate_at(step, config.optimizer.learning_rate, config.schedule)
        result = engine.step(batch, rate, step_filter.accept)
        step_filter.record(result)
        seconds, waited = clock.lap()
        signs = agree(session, ranks, waited)
        row = {
            "step": step,
            "images": progress.images + size,
            "loss": result.loss,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "applied": result.applied,
            **session.throughput.rates(size, seconds),
            "data_wait": signs.waited / seconds,
            "memory_bytes": signs.memory_bytes,
        }
        telemetry.training_step(row)
        if progress == session.start:
            session.start_clock.mark("first step")
            telemetry.say(session.start_clock.describe())
        telemetry.say(profiler.after(step))
        telemetry.say(slow_ranks.look(engine, waited))
        if result.reason is not None:
            record_odd_step(inputs, session, progress.images, size, row, result.reason)
        if signs.broken:
            telemetry.raise_together()
        if not signs.writing:
            store.finish()
        progress = Progress(step, progress.images + size)

        def due(every: int, step: int = step) -> bool:
            return every > 0 and (step % every == 0 or step == last)

        # The next step that is applied shows whether the weights are sound; health.max_skipped others end the run.
        sound = not step_filter.weights_may_be_nonfinite or step == last
        save_owed |= due(config.checkpoint.every_steps) or bool(signs.stopping or signs.overdue)
        save, save_owed = save_owed and sound, save_owed and not sound
        watchdog.enter("comparing weights", step)
        if config.health.replicas_every_steps and (save or due(config.health.replicas_every_steps)):
            check_replicas(engine, step)
        with clock.paused():
            if due(config.validation.every_steps):
                watchdog.enter("validation", step)
                loss = validation_loss(engine, inputs.held_out, config.validation.images, ranks)
                telemetry.validation({"step": step, "images": progress.images, "valid_loss": loss})
            if due(config.samples.every_steps) and inputs.masks is None:
                watchdog.enter("samples", step)
                telemetry.samples(step, completions(inputs, session))
            if save:
                watchdog.enter("saving", step)
                telemetry.flush()
                telemetry.raise_together()
                store.save(engine, progress)
    watchdog.enter("ending", progress.step)
    store.finish()
    telemetry.say(profiler.close(progress.step))
    telemetry.say(peak_memory_table(gather(peak_memory_bytes(ranks.device))))
    if signs.stopping:
        session.stop.honour()
    session.batches.close()
    engine.close()
    telemetry.close()
    telemetry.raise_together()
    return progress


class Signs(NamedTuple):
    """What the ranks tell each other once a step: true if it is on one, or the largest."""

    stopping: float
    broken: float
    writing: float
    overdue: float
    profile: float
    waited: float
    memory_bytes: float


def agree(session: Session, ranks: Ranks, waited: float = 0.0) -> Signs:
    """The signs of all ranks; `waited`: this rank's seconds for data."""
    own = Signs(
        stopping=session.stop.pending(),
        broken=session.telemetry.failure is not None,
        writing=session.store.writing(),
        overdue=session.store.overdue(),
        profile=session.profiler.requested(),
        waited=waited,
        memory_bytes=peak_memory_bytes(ranks.device),
    )
    return Signs(*all_reduce_max(list(own), ranks.device))


def record_odd_step(
    inputs: Inputs, session: Session, position: int, size: int, row: dict[str, Any], reason: str
) -> None:
    """Writes the step and its pictures down. Raises Diverged if too many in a row were not applied."""
    pictures = inputs.train_split.places(session.store.order.image_numbers(position, size))
    facts = {"reason": reason, "positions": [position, position + size], "pictures": pictures}
    session.telemetry.odd_step(row | facts)
    if session.step_filter.exhausted:
        raise Diverged(
            f"step {row['step']} is {reason} (loss {row['loss']}, gradient norm {row['grad_norm']}), the last of "
            f"{session.step_filter.skipped_in_a_row} in a row that were not applied (health.max_skipped); its pictures "
            f"are {', '.join(pictures[:3])} ... and, with those of the other such steps, in {SKIPPED_FILE} of the run; "
            f"a lower optimizer.learning_rate, a longer warm-up or precision fp32 may pass it."
        )


def completions(inputs: Inputs, session: Session) -> np.ndarray:
    """Half pictures of the valid split, completed: a grid uint8 (H, W, 3)."""
    split, config = inputs.valid_split, inputs.config
    tokens, _ = split.gather(spread(split.images, config.samples.images))
    drawn = session.engine.complete(tokens, SAMPLES_A_PICTURE, config.seed)
    return completion_grid(tokens, drawn, inputs.shards.palette, inputs.shards.resolution)
