"""The state that a run begins with: its own newest checkpoint, what `start.path` names, or initial weights."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pipeline.checkpoint.format import Checkpoint, CheckpointRecord, restore_random_states
from pipeline.checkpoint.fragments import StateReader
from pipeline.checkpoint.metrics_log import Row, last_steps
from pipeline.checkpoint.probe import probe_batch
from pipeline.checkpoint.run_folder import RunFolder
from pipeline.config import TrainConfig
from pipeline.distributed import Ranks, from_first, gather, raise_on_all_ranks
from pipeline.hub import HUB, pull
from pipeline.rank_errors import reported_on_all_ranks
from pipeline.schedule import learning_rate_at
from pipeline.train.checkpointing import (
    CheckpointManager,
    Progress,
    compare_order,
    newest_complete,
    newest_undamaged,
    resume_at,
)
from pipeline.train.engine.base import Engine
from pipeline.train.setup import Inputs, data_order
from pipeline.train.validation import probe_loss
from pipeline.weights.start import (
    Origin,
    check_fits,
    check_start,
    checkpoint_origin,
    checkpoints_in,
    folder_origin,
    reader_of,
)

logger = logging.getLogger(__name__)

ORIGIN = "origin"
"""What run.json calls the model that the run started from."""
MIN_RISE = 1.001
"""A learning rate rises if it is more than this factor above the one before."""


def check_origin(inputs: Inputs, run: RunFolder) -> None:
    """Checks `start` before the ranks meet. Raises ValueError naming the key."""
    origin = check_start(inputs.config, inputs.sets, run.path)
    if origin is not None:
        _compare_order(origin, inputs)


def _compare_order(origin: Origin, inputs: Inputs) -> str:
    """As `compare_order`, if the run continues the origin's data order."""
    start = inputs.config.start
    if origin.checkpoint is None or not start.position:
        return ""
    record = origin.checkpoint.record
    subject = f"start.position is true, but start.path {start.path}"
    return compare_order(data_order(inputs, record), record, subject, "; or set start.position to false")


def find_source(run: RunFolder, resume_from: int | None, inputs: Inputs) -> Checkpoint | Origin | None:
    """The run's own checkpoint, else the model of start.path, else None; each rank verifies a share of the files.

    resume_from: the step of the run's checkpoint; None for the newest complete one. Raises ValueError on every rank.
    """
    ranks = inputs.ranks
    if resume_from is not None:
        return resume_at(run, resume_from, ranks)
    checkpoint = newest_complete(run.checkpoints, ranks)
    if checkpoint is not None:
        return checkpoint
    origin = _open_origin(inputs) if inputs.config.start.path is not None else None
    if origin is None:
        from_first(lambda: _forget_origin(run))
    return origin


def _forget_origin(run: RunFolder) -> None:
    """Removes the origin of an earlier start that ended before its first checkpoint, and named another start.path."""
    if run.recall(ORIGIN):
        run.note("running", **{ORIGIN: None})


def _open_origin(inputs: Inputs) -> Origin:
    path, ranks = inputs.config.start.path, inputs.ranks
    assert path is not None
    if inputs.config.start.from_hub:
        origin = _downloaded(path, ranks)
    else:
        checkpoints = from_first(lambda: _newest_first(path))
        origin = _folder(path, Path(path)) if checkpoints is None else _undamaged(path, checkpoints, ranks)
    with raise_on_all_ranks():
        check_fits(origin, inputs.config, inputs.sets)
        warning = _compare_order(origin, inputs)  # of an older checkpoint than check_origin's, if that is damaged
        if ranks.is_first and warning:
            logger.warning(warning)
    return origin


def _downloaded(path: str, ranks: Ranks) -> Origin:
    """Rank 0 downloads the model, so that hundreds of ranks do not ask the hub at the same time."""
    folder = Path(from_first(lambda: str(pull(path.removeprefix(HUB)))))
    with raise_on_all_ranks():
        if not folder.is_dir():
            raise ValueError(
                f"start.path is {path}, which rank 0 downloaded to {folder}, but rank {ranks.rank} can't see it; set "
                f"HF_HOME to a folder that all nodes share."
            )
    return _folder(path, folder)


def _folder(path: str, folder: Path) -> Origin:
    origin = None
    with raise_on_all_ranks():
        origin = folder_origin(path, folder)
    assert origin is not None
    return origin


def _undamaged(path: str, checkpoints: list[str], ranks: Ranks) -> Origin:
    checkpoint, damages = newest_undamaged(checkpoints, ranks)
    if checkpoint is None:
        raise reported_on_all_ranks(
            ValueError(
                f"start.path is {path}, which is damaged: {damages[0]}; restore it from a copy, or start from another "
                f"model."
            )
        )
    return checkpoint_origin(path, checkpoint)


def _newest_first(path: str) -> list[str] | None:
    checkpoints = checkpoints_in(path)
    return None if checkpoints is None else [str(folder) for folder in reversed(checkpoints)]


def record_of(source: Checkpoint | Origin | None, config: TrainConfig) -> CheckpointRecord | None:
    """The record of the checkpoint whose data position the run continues, if it does."""
    if isinstance(source, Origin):
        return source.checkpoint.record if source.checkpoint and config.start.position else None
    return None if source is None else source.record


def load(source: Checkpoint | Origin | None, manager: CheckpointManager, engine: Engine, run: RunFolder) -> Progress:
    """Fills the engine with what `find_source` found, and verifies it. Raises ValueError on every rank."""
    if isinstance(source, Checkpoint):
        progress = manager.load(source, engine)
        from_first(lambda: _warn_of_rising_rate(manager.config, last_steps(run.path, progress.step, 1)))
        return progress
    return Progress() if source is None else _start(source, manager, engine, run)


def _warn_of_rising_rate(config: TrainConfig, last: list[Row]) -> None:
    """Logs a warning if the learning rate rises after the last step, unless it is still warming up."""
    before = last[-1].get("learning_rate") if last else None
    if before is None:
        return
    step = last[-1]["step"] + 1
    rate = learning_rate_at(step, config.optimizer.learning_rate, config.schedule)
    if config.schedule.warmup_steps < step <= config.schedule.steps and rate > MIN_RISE * before:
        logger.warning(
            f"the learning rate rises from {before:.3g} in step {step - 1:,} to {rate:.3g} in step {step:,}, as "
            f"optimizer.learning_rate or the schedule has changed; the curve will not be that of a run that had these "
            f"settings from its first step"
        )


def _start(origin: Origin, manager: CheckpointManager, engine: Engine, run: RunFolder) -> Progress:
    """Fills the engine from the origin, logs that and records it in run.json. Its steps are counted from 0."""
    config, ranks, checkpoint = manager.config, manager.ranks, origin.checkpoint
    start, reader = config.start, None
    with raise_on_all_ranks(), _explaining_deletion(origin):
        reader = reader_of(origin, config)
    assert reader is not None
    digest = _common_digest(origin, ranks)
    facts = from_first(partial(origin.facts, digest)) | {"moments": start.moments, "position": start.position}
    engine.restore(reader, 0)
    if start.position and checkpoint is not None:
        with raise_on_all_ranks(), _explaining_deletion(origin):
            restore_random_states(checkpoint, manager.random_rank, ranks.device)
    facts |= {"probe_loss": _verified_loss(origin, manager, engine)}
    if ranks.is_first:
        _log(origin, facts, manager, reader)
        if start.moments and checkpoint is not None:
            manager.log_average(checkpoint)
    from_first(partial(run.note, "running", **{ORIGIN: facts}))
    return Progress(0, checkpoint.record.images if start.position and checkpoint is not None else 0)


@contextmanager
def _explaining_deletion(origin: Origin) -> Iterator[None]:
    """The run of a checkpoint may delete it (checkpoint.keep_last) while it is read here."""
    try:
        yield
    except FileNotFoundError as error:
        if origin.checkpoint is None:
            raise
        raise ValueError(
            f"{origin.folder} was deleted by its run; name a checkpoint that it keeps (checkpoint.keep_every)."
        ) from error


def _common_digest(origin: Origin, ranks: Ranks) -> str:
    """The digest of what all ranks read; the first rank of each node computes it.

    Raises ValueError on every rank if nodes have different copies.
    """
    digest = None
    with raise_on_all_ranks(), _explaining_deletion(origin):
        if ranks.is_first or ranks.local_rank == 0:
            digest = origin.digest()
    digests = gather(digest)
    assert digests[0] is not None
    for rank, other in enumerate(digests):
        if other not in (None, digests[0]):
            raise reported_on_all_ranks(
                ValueError(
                    f"start.path is {origin.path}, but rank 0 reads a model of sha256 {digests[0][:12]} there and rank "
                    f"{rank} one of {other[:12]}; all nodes must have the same model: name a folder that they share."
                )
            )
    return digests[0]


def _verified_loss(origin: Origin, manager: CheckpointManager, engine: Engine) -> float:
    """The loss of the check image. A checkpoint's checksums are compared and, where its image is known, its loss.

    Raises ValueError on every rank if they differ.
    """
    checkpoint, config, inputs = origin.checkpoint, manager.config, manager.inputs
    if checkpoint is None or origin.config.n_positions != inputs.model_config.n_positions:
        return gather(probe_loss(engine, probe_batch(inputs.held_out[0])))[0]
    manager.verify_checksums(checkpoint, engine, None if config.start.moments else ["weight"])
    record = checkpoint.record
    if _knows_probe(record, inputs):
        return manager.verify_probe(checkpoint, engine)
    return gather(probe_loss(engine, probe_batch(inputs.held_out[0], record.probe_tokens)))[0]


def _knows_probe(record: CheckpointRecord, inputs: Inputs) -> bool:
    """Whether the check image is in the checkpoint, or is an image of one of the run's sets without masks."""
    return record.probe_batch is not None or (record.shards_digest in inputs.sets.digests and inputs.masks is None)


def _log(origin: Origin, facts: dict[str, object], manager: CheckpointManager, reader: StateReader) -> None:
    """One line about the origin, on rank 0; a warning if its palette is unknown."""
    start, record = manager.config.start, origin.checkpoint.record if origin.checkpoint else None
    resolution = manager.config.model.resolution
    taken = ["the weights"]
    if facts["resolution"] != resolution:
        taken[0] += f" (position embeddings resampled from {facts['resolution']} to {resolution} pixels a side)"
    taken += [f"Adam's moments after {reader.optimizer_step:,.0f} updates"] if start.moments else []
    taken += ["the average of the weights"] if start.moments and manager.config.ema.decay and reader.has_average else []
    taken += [f"the data position, {record.images:,} images"] if start.position and record else []
    saved = "not recorded"
    if record is not None:
        same_batch = facts["resolution"] == resolution and _knows_probe(record, manager.inputs)
        saved = f"when saved{'' if same_batch else ', of another check image'}: {record.probe_loss:.7f}"
    step = f" (step {facts['step']:,})" if facts["step"] is not None else ""
    logger.info(
        f"started from {origin.folder}{step}, sha256 {str(facts['digest'])[:12]}: {', '.join(taken)}; the loss of the "
        f"check image is {facts['probe_loss']:.7f} ({saved})"
    )
    if origin.palette_sha256 is None:
        logger.warning(
            f"start.path {start.path} has no palette, so whether it was trained with the shard set's was not checked"
        )
