"""Saves and resumes over all ranks: a thread writes each checkpoint; the newest complete one is loaded and verified."""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from data_prep.common.exit_codes import Failed
from pipeline.checkpoint import format as checkpoints
from pipeline.checkpoint.checksums import add_up, checksums
from pipeline.checkpoint.format import Checkpoint, CheckpointRecord
from pipeline.checkpoint.fragments import EMA, Tensors
from pipeline.checkpoint.metrics_log import METRICS_FILE, SKIPPED_FILE
from pipeline.checkpoint.mixture_record import check_shards
from pipeline.checkpoint.probe import PROBE_TOKENS, as_json, from_json, probe_batch
from pipeline.checkpoint.run_files import STEP_NAME, committed, step_folder, step_of
from pipeline.checkpoint.run_folder import RunFolder
from pipeline.distributed import Ranks, first_message, from_first, gather, raise_on_all_ranks
from pipeline.model.masks import Batch
from pipeline.rank_errors import reported_on_all_ranks
from pipeline.train.data.batches import Order
from pipeline.train.data.mixture import MixtureOrder
from pipeline.train.data.mixture_history import to_record
from pipeline.train.engine.base import Engine
from pipeline.train.health.diverged import Diverged
from pipeline.train.setup import Inputs
from pipeline.train.validation import probe_loss

logger = logging.getLogger(__name__)

PROBE_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp8": 2e-2}
"""Nats per token by which the check loss may differ after a load. Another topology sums in another order, and ZeRO-0
keeps fp32 between products where the other stages round to bf16: 0.015 at most in a thousand probes of 64 tokens. An
fp8 run is evaluated in bf16."""
READ_ATTEMPTS, READ_PAUSE = 3, 2.0
"""How often, and with which pause in seconds, a checkpoint is read that a file system fails to read."""
SET_ASIDE = "set-aside"
TOPOLOGY = ("zero_stage", "pipeline_stages", "tensor_parallel")
"""Keys of `parallel` that a checkpoint's manifest records."""


class Unreadable(Failed):
    """The file system failed to read a checkpoint; a later start may succeed."""


@dataclass(frozen=True)
class Progress:
    """Steps and images of a run so far: with the seed, they determine which images come next."""

    step: int = 0
    images: int = 0


@dataclass(frozen=True)
class Pending:
    """A checkpoint that is being written."""

    progress: Progress
    probe: float
    """The loss of the check image."""
    written: Future[dict[str, Any]]
    """Bytes, sha256 and checksums of this rank's file, once it is written."""
    began: float
    """When the save began, by `time.monotonic`."""


def newest_complete(folder: Path, ranks: Ranks) -> Checkpoint | None:
    """The newest checkpoint in `folder` whose files match their digests; each rank verifies a share of the files.

    Logs the damaged checkpoints that it skips. Raises ValueError on every rank if there are checkpoints and none is
    complete. An unreadable file is not treated as damaged: raises as `verified`.
    """
    candidates = from_first(lambda: [str(path) for path in reversed(committed(folder))])
    checkpoint, _ = newest_undamaged(candidates, ranks)
    if candidates and checkpoint is None:
        raise reported_on_all_ranks(
            ValueError(
                f"{folder} has {len(candidates)} checkpoints, and none is complete; restore one from a copy, or name a "
                f"new --run."
            )
        )
    return checkpoint


def newest_undamaged(candidates: list[str], ranks: Ranks) -> tuple[Checkpoint | None, list[str]]:
    """The first of the folders, newest first, that is complete, or None; and what is damaged in those before it.

    Logs the damaged checkpoints. Raises as `verified`.
    """
    damages: list[str] = []
    for candidate in candidates:
        checkpoint, damage = verified(Path(candidate), ranks)
        if damage is None:
            return checkpoint, damages
        damages.append(damage)
        if ranks.is_first:
            logger.warning(f"skipped the damaged checkpoint {candidate}: {damage}")
    return None, damages


def verified(folder: Path, ranks: Ranks) -> tuple[Checkpoint | None, str | None]:
    """A checkpoint, and what is damaged, or None; every rank calls it, and verifies a share of the files.

    Raises on every rank if one of them may not read a file (ValueError), or fails to (Unreadable).
    """
    checkpoint, damage, failure = None, None, None
    with raise_on_all_ranks():
        try:
            checkpoint, damage = _inspect(folder, ranks)
        except Unreadable as error:
            failure = error
    message = first_message(None if failure is None else str(failure))
    if message is not None:
        raise reported_on_all_ranks(failure or Unreadable(message))
    return checkpoint, first_message(damage)


def _inspect(folder: Path, ranks: Ranks) -> tuple[Checkpoint | None, str | None]:
    """As `verified`, on this rank. Damage is a file that is missing, or has another size or digest than recorded."""
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            checkpoint = checkpoints.open_checkpoint(folder)
            if STEP_NAME.fullmatch(folder.name) and checkpoint.record.step != step_of(folder):
                return checkpoint, f"its manifest is of step {checkpoint.record.step}"
            return checkpoint, checkpoint.damage(ranks.rank, ranks.count)
        except (ValueError, FileNotFoundError) as error:
            return None, str(error)
        except OSError as error:
            what = f"{error.filename or folder} can't be read ({error.strerror or error})"
            otherwise = f"or move {folder} away to resume from an older checkpoint"
            if isinstance(error, PermissionError):
                raise ValueError(f"{what}; make it readable, {otherwise}.") from error
            if attempt == READ_ATTEMPTS:
                raise Unreadable(f"{what}; run the same command again, {otherwise}.") from error
            time.sleep(READ_PAUSE)
    raise AssertionError("every attempt returns or raises")


def resume_at(run: RunFolder, step: int, ranks: Ranks) -> Checkpoint:
    """The checkpoint of a step; later ones, if any, are set aside in a folder, with a copy of the metrics.

    Every rank calls it. Raises ValueError if the checkpoint is damaged, and as `verified`; then nothing is set aside.
    """
    checkpoint, damage = verified(step_folder(run.checkpoints, step), ranks)
    if checkpoint is None or damage is not None:
        raise reported_on_all_ranks(
            ValueError(f"--resume_from is {step}, but this checkpoint is damaged: {damage}; choose another one.")
        )
    with raise_on_all_ranks():
        if ranks.is_first:
            _set_aside(run, step)
            run.note_resumed(step)
    return checkpoint


def _set_aside(run: RunFolder, step: int) -> None:
    later = [folder for folder in committed(run.checkpoints) if step_of(folder) > step]
    if not later:
        return
    aside = run.checkpoints / f"{SET_ASIDE}-{time.strftime('%Y%m%d-%H%M%S')}"
    aside.mkdir()
    for name in (METRICS_FILE, SKIPPED_FILE):
        if (run.path / name).is_file():
            shutil.copyfile(run.path / name, aside / name)
    for folder in later:
        if folder.is_symlink():  # a relative link would lead elsewhere from there
            (aside / folder.name).symlink_to(folder.resolve())
            folder.unlink()
        else:
            folder.rename(aside / folder.name)
    names = ", ".join(str(step_of(folder)) for folder in later)
    logger.warning(f"the checkpoints after step {step} ({names}) and the metrics were set aside in {aside}")


def compare_order(order: Order, record: CheckpointRecord, subject: str, otherwise: str = "") -> str:
    """Compares a run's data order with that of a checkpoint. Returns a warning if it is weaker, or an empty string.

    Raises ValueError if it is another one; subject and otherwise: the start and the end of its sentence.
    """
    if order.fingerprint(record.images) == record.order_fingerprint:
        return ""
    warning = order.resume_warning(record.order_fingerprint, record.images)
    if warning is None:
        raise ValueError(
            f"{subject} has another data order than this run; seed, data.flip, data.reflect_crop and numpy's random "
            f"generator must be the same as when it was saved{otherwise}."
        )
    return warning


class CheckpointManager:
    """Saves and loads a run's checkpoints."""

    def __init__(
        self, folder: Path, inputs: Inputs, order: Order, saved: Callable[[int], None] = lambda step: None
    ) -> None:
        """saved: called on rank 0 with the step of each committed checkpoint."""
        self.folder, self.inputs, self.order, self._saved = folder, inputs, order, saved
        self.config, self.ranks = inputs.config, inputs.ranks
        self.random_rank = inputs.config.parallel.random_rank(inputs.ranks.rank)
        self._pending: Pending | None = None
        self._tensors: Tensors = {}
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._last_save = time.monotonic()

    def overdue(self) -> bool:
        """Whether checkpoint.every_minutes have passed since the last save, by this rank's clock."""
        minutes = self.config.checkpoint.every_minutes
        return minutes > 0 and time.monotonic() - self._last_save >= 60 * minutes

    @property
    def mixture(self) -> list[dict[str, Any]]:
        """The history of the mixture; empty for a run of one set."""
        return to_record(self.order.history) if isinstance(self.order, MixtureOrder) else []

    def writing(self) -> bool:
        """Whether this rank's file of a checkpoint is still being written."""
        return self._pending is not None and not self._pending.written.done()

    def save(self, engine: Engine, progress: Progress) -> None:
        """Copies the state to the host and starts writing it in a thread; `finish` commits it.

        First finishes the previous save, and raises its errors. Raises Diverged on every rank if the check loss is NaN
        or Inf.
        """
        self.finish()
        began = time.monotonic()
        probe, *others = gather(probe_loss(engine, probe_batch(self.inputs.held_out[0])))
        if not all(map(isfinite, [probe, *others])):
            raise Diverged(
                f"the loss of the check image at step {progress.step} is NaN or Inf (by rank: {[probe, *others]}); the "
                f"step was not saved, and the checkpoints in {self.folder} are older; try a lower "
                f"optimizer.learning_rate or a longer warm-up."
            )
        with raise_on_all_ranks():
            if self.ranks.is_first:
                checkpoints.begin(self.folder, progress.step)
        temporary = checkpoints.temporary_folder(self.folder, progress.step)
        self._tensors, index = engine.snapshot(self._tensors)
        tensors = self._tensors | checkpoints.random_states(self.ranks.device)
        written = self._writer.submit(self._write, temporary, tensors, index)
        self._pending, self._last_save = Pending(progress, probe, written, began), time.monotonic()
        if not self.config.checkpoint.asynchronous:
            self.finish()

    def _write(self, temporary: Path, tensors: Tensors, index: list[dict[str, Any]]) -> dict[str, Any]:
        """In the thread: writes this rank's file and computes its share of the checksums."""
        facts = checkpoints.write_rank(temporary, self.ranks.rank, tensors, index)
        return facts | {"checksums": checksums(tensors, index)}

    def finish(self) -> None:
        """Waits until all ranks have written the pending checkpoint, commits it, and deletes those not to be retained.

        Every rank calls it. Raises ValueError or OSError on every rank if one could not write; then the checkpoint is
        not committed, and the older ones remain.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        written = None
        with raise_on_all_ranks():
            written = pending.written.result()
        facts = [facts for facts in gather(written) if facts]
        sums = add_up([fact.pop("checksums") for fact in facts])
        files = {checkpoints.rank_file(rank): fact for rank, fact in enumerate(facts)}
        with raise_on_all_ranks():
            if self.ranks.is_first:
                temporary = checkpoints.temporary_folder(self.folder, pending.progress.step)
                saved = checkpoints.commit(temporary, self._record(pending.progress, pending.probe, files, sums))
                logger.info(f"saved {saved} in {time.monotonic() - pending.began:.1f} s")
                self._saved(pending.progress.step)
                checkpoints.retain(self.folder, self.config.checkpoint, pending.progress.step)

    def load(self, checkpoint: Checkpoint, engine: Engine) -> Progress:
        """Fills the engine from a checkpoint of any topology, and verifies the result.

        Raises ValueError if the checkpoint was made with other shards, another palette or another data order, if the
        checksums of the restored weights and moments differ from the stored ones, or if the probe loss does.
        """
        record = checkpoint.record
        with raise_on_all_ranks():
            self._check_origin(checkpoint)
            reader = checkpoint.reader()
        engine.restore(reader, record.step)
        with raise_on_all_ranks():
            checkpoints.restore_random_states(checkpoint, self.random_rank, self.ranks.device)
        self.verify_checksums(checkpoint, engine)
        loss = self.verify_probe(checkpoint, engine)
        if self.ranks.is_first:
            logger.info(
                f"resumed from {checkpoint.folder}: step {record.step}, {record.images:,} images seen; the loss of the "
                f"check image is {loss:.7f} (when saved: {record.probe_loss:.7f})"
            )
            self.log_average(checkpoint)
        return Progress(record.step, record.images)

    def verify_probe(self, checkpoint: Checkpoint, engine: Engine) -> float:
        """The loss of the check image. Raises ValueError on every rank if it is not the stored one."""
        record = checkpoint.record
        losses = gather(probe_loss(engine, self._probe_of(record)))
        tolerance = max(PROBE_TOLERANCE[record.precision], PROBE_TOLERANCE[self.config.precision])
        for rank, loss in enumerate(losses):
            if not abs(loss - record.probe_loss) <= tolerance:
                raise reported_on_all_ranks(
                    ValueError(
                        f"{checkpoint.folder} was not restored correctly: the loss of the check image is {loss:.7f} on "
                        f"rank {rank}, and was {record.probe_loss:.7f} when it was saved."
                    )
                )
        return losses[0]

    def _probe_of(self, record: CheckpointRecord) -> Batch:
        """The check image that a checkpoint's loss is of."""
        if record.probe_batch is not None:
            return from_json(record.probe_batch)
        of_sets = dict(zip(self.inputs.sets.digests, self.inputs.held_out, strict=True))
        return probe_batch(of_sets[record.shards_digest], record.probe_tokens)

    def log_average(self, checkpoint: Checkpoint) -> None:
        """Logs if an average of the weights starts here, or is dropped, because ema.decay has changed."""
        saved, decay = EMA in checkpoint.record.fingerprints, self.config.ema.decay
        if decay and not saved:
            logger.warning(
                f"{checkpoint.folder} has no average of the weights (ema): it starts from the weights of step "
                f"{checkpoint.record.step}"
            )
        if saved and not decay:
            logger.warning(
                f"the average of the weights (ema) in {checkpoint.folder} is dropped, because ema.decay is 0"
            )

    def verify_checksums(self, checkpoint: Checkpoint, engine: Engine, states: Sequence[str] | None = None) -> None:
        """Compares the checksums of the engine's state, or of these states, with the stored ones.

        Raises ValueError on every rank.
        """
        stored = checkpoint.record.fingerprints
        if not stored:
            return
        self._tensors, index = engine.snapshot(self._tensors)
        found = add_up(gather(checksums(self._tensors, index)))
        if not self.config.ema.decay:
            stored = {state: value for state, value in stored.items() if state != EMA}  # an average that is dropped
        differing = ", ".join(state for state in states or stored if found.get(state) != stored[state])
        if differing:
            raise reported_on_all_ranks(
                ValueError(
                    f"{checkpoint.folder} was not restored correctly: the checksums of {differing} differ from those "
                    f"in its manifest."
                )
            )

    def _check_origin(self, checkpoint: Checkpoint) -> None:
        record = checkpoint.record
        made_with: dict[str, Any] = {"palette_sha256": record.palette_sha256, "digest": record.shards_digest}
        if record.mixture:
            made_with["mixture"] = record.mixture[-1]["members"]
        check_shards(made_with, self.inputs.sets, checkpoint.folder)
        warning = compare_order(self.order, record, str(checkpoint.folder))
        if self.ranks.is_first and warning:
            logger.warning(warning)

    def _record(
        self, progress: Progress, probe: float, files: dict[str, dict[str, Any]], sums: dict[str, str]
    ) -> CheckpointRecord:
        stores_probe = self.inputs.sets.is_mixture or self.inputs.masks is not None
        return CheckpointRecord(
            step=progress.step,
            images=progress.images,
            topology={"ranks": self.ranks.count} | {key: getattr(self.config.parallel, key) for key in TOPOLOGY},
            model=self.inputs.model_config.to_dict(),
            palette_sha256=self.inputs.sets.palette_sha256,
            shards_digest=self.inputs.sets.first.digest,
            order_fingerprint=self.order.fingerprint(progress.images),
            probe_loss=probe,
            precision=self.config.precision,
            files=files,
            probe_tokens=PROBE_TOKENS,
            probe_batch=as_json(probe_batch(self.inputs.held_out[0])) if stores_probe else None,
            fingerprints=sums,
            mixture=self.mixture,
        )
