"""The training loop: read, step, record, validate, sample, save, until the last step or a request to stop."""

from functools import partial
from pathlib import Path

import numpy as np

from pipeline.config import TrainConfig
from pipeline.model.pictures import completion_grid
from pipeline.train.health import StopRequests, check_finite
from pipeline.train.integrity import verify_shards
from pipeline.train.persistence import Progress
from pipeline.train.ranks import (
    any_rank,
    describe_ranks,
    failing_together,
    one_voice_a_node,
    start_group,
)
from pipeline.train.run_folder import RunFolder
from pipeline.train.schedule import rate_at
from pipeline.train.setup import Inputs, Session, check_inputs, set_up
from pipeline.train.telemetry import StepClock, peak_memory_bytes
from pipeline.train.validation import spread, validation_loss

FINISHED = 0
STOPPED = 75
"""EX_TEMPFAIL: stopped on request, wants a requeue (contract 9)."""
SAMPLES_A_PICTURE = 2


def train(config: TrainConfig, run: Path, command: list[str]) -> int:
    """Trains to the last step, or until asked to stop. Returns the exit code.

    Raises ValueError or OSError for a user's mistake, Diverged if the numbers are no longer finite.
    """
    ranks, folder, stop = describe_ranks(), RunFolder(run), StopRequests(run)
    with one_voice_a_node(ranks):
        inputs = check_inputs(config, ranks)
        folder.check(config)
    if folder.finished_steps() >= config.schedule.steps:
        print(f"{run} has finished its {config.schedule.steps} steps; nothing is left to train.", flush=True)
        return FINISHED
    start_group(ranks)
    try:
        with failing_together():
            if ranks.is_first:
                folder.open(config, inputs.shards, command, ranks.count)
        verify_shards(inputs.shards, folder, ranks)
        progress = run_loop(inputs, set_up(inputs, folder, stop))
        finished = progress.step >= config.schedule.steps
        with failing_together():  # and leaving together: a rank that leaves early would break the others' connections
            if ranks.is_first:
                folder.note("finished" if finished else "stopped", step=progress.step, images=progress.images)
                print(f"{'finished' if finished else 'stopped on request'} at step {progress.step}: {run}", flush=True)
        return FINISHED if finished else STOPPED
    except BaseException as error:
        folder.note_failure(error)
        raise
    finally:
        folder.close()


def run_loop(inputs: Inputs, session: Session) -> Progress:
    """Trains from session.start; returns how far it came. What happens at a step is recorded before it is saved."""
    config, ranks, engine, store = inputs.config, inputs.ranks, session.engine, session.store
    telemetry = session.telemetry
    progress, last = session.start, config.schedule.steps
    clock = StepClock()
    [stopping] = any_rank([session.stop.pending()], ranks.device)
    while progress.step < last and not stopping:
        size = config.batch.size_at(progress.step + 1)
        tokens = clock.wait_for(partial(session.batches.at, progress.images, size))
        rate = rate_at(progress.step + 1, config.optimizer, config.schedule)
        result = engine.step(tokens, rate)
        check_finite(progress.step + 1, progress.images, size, result)
        progress = Progress(progress.step + 1, progress.images + size)
        seconds, waited = clock.lap()
        telemetry.training_step(
            {
                "step": progress.step,
                "images": progress.images,
                "loss": result.loss,
                "learning_rate": rate,
                "grad_norm": result.grad_norm,
                "applied": result.applied,
                **session.throughput.rates(size, seconds),
                "data_wait": waited,
                "memory_bytes": peak_memory_bytes(ranks.device),
            }
        )
        signs = [session.stop.pending(), telemetry.failure is not None, store.writing(), store.overdue()]
        stopping, broken, writing, overdue = any_rank(signs, ranks.device)
        if broken:
            telemetry.raise_together()
        if not writing:
            store.finish()

        def due(every: int, step: int = progress.step) -> bool:
            return every > 0 and (step % every == 0 or step == last)

        if due(config.validation.every_steps):
            loss = validation_loss(engine, inputs.held_out, config.validation.images, ranks)
            telemetry.validation({"step": progress.step, "images": progress.images, "valid_loss": loss})
        if due(config.samples.every_steps) and inputs.masks is None:
            telemetry.samples(progress.step, completions(inputs, session))
        if due(config.checkpoint.every_steps) or stopping or overdue:
            telemetry.flush()
            telemetry.raise_together()
            store.save(engine, progress)
        clock.restart()
    store.finish()
    if stopping:
        session.stop.honour()
    session.batches.close()
    telemetry.close()
    telemetry.raise_together()
    return progress


def completions(inputs: Inputs, session: Session) -> np.ndarray:
    """Half pictures of the valid split, completed: a grid uint8 (H, W, 3)."""
    split, config = inputs.valid_split, inputs.config
    tokens, _ = split.gather(spread(split.images, config.samples.images))
    drawn = session.engine.complete(tokens, SAMPLES_A_PICTURE, config.seed)
    return completion_grid(tokens, drawn, inputs.shards.palette, inputs.shards.resolution)
