"""Saving and resuming across ranks: a thread writes a copy; the newest complete checkpoint is loaded and verified."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from pipeline.checkpoint import format as checkpoints
from pipeline.checkpoint.checksums import add_up, checksums
from pipeline.checkpoint.format import Checkpoint, CheckpointRecord
from pipeline.checkpoint.fragments import Tensors
from pipeline.checkpoint.probe import PROBE_TOKENS
from pipeline.checkpoint.run_folder import check_shards
from pipeline.distributed import Ranks, first_message, from_first, gather, raise_on_all_ranks
from pipeline.rank_errors import reported_on_all_ranks
from pipeline.train.data.batches import Order
from pipeline.train.engine.base import Engine
from pipeline.train.health.diverged import Diverged
from pipeline.train.setup import Inputs
from pipeline.train.validation import probe_loss

logger = logging.getLogger(__name__)

PROBE_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp8": 2e-2}
"""Nats per token by which the probe loss may differ after a load: another topology sums in another order, and ZeRO-0
keeps fp32 between products where the others round to bf16 (one image of 64 tokens: 0.015 at most of a thousand).
An fp8 run is evaluated in bf16."""
TOPOLOGY = ("zero_stage", "pipeline_stages", "tensor_parallel")
"""Keys of parallel that a checkpoint's manifest names."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: with the seed, all that the order of the images depends on."""

    step: int = 0
    images: int = 0


@dataclass(frozen=True)
class Pending:
    """A checkpoint that is being written."""

    progress: Progress
    probe: float
    """The loss of the probe batch."""
    written: Future[dict[str, Any]]
    """What this rank's part of it is, once written: bytes and sha256."""


def newest_complete(folder: Path, ranks: Ranks) -> Checkpoint | None:
    """The newest checkpoint in `folder` whose files all are what was written; the ranks share the reading.

    Prints which ones it passed over. Raises ValueError if there are checkpoints and none is complete.
    """
    candidates = from_first(lambda: [str(path) for path in reversed(checkpoints.committed(folder))])
    for candidate in candidates:
        checkpoint, damage = None, None
        try:
            checkpoint = checkpoints.open_checkpoint(Path(candidate))
            if checkpoint.record.step != checkpoints.step_of(checkpoint.folder):
                raise ValueError(f"it holds step {checkpoint.record.step}")
            damage = checkpoint.damage(ranks.rank, ranks.count)
        except (ValueError, OSError) as error:
            damage = str(error)
        damage = first_message(damage)
        if damage is None:
            return checkpoint
        if ranks.is_first:
            logger.warning(f"passed over {candidate}: {damage}")
    if candidates:
        raise ValueError(
            f"{folder} holds {len(candidates)} checkpoints and none is complete; put a copy back, or name a new --run."
        )
    return None


class CheckpointManager:
    """A run's checkpoints, and what they must agree with."""

    def __init__(self, folder: Path, inputs: Inputs, order: Order) -> None:
        self.folder, self.inputs, self.order = folder, inputs, order
        self.config, self.ranks = inputs.config, inputs.ranks
        self._pending: Pending | None = None
        self._tensors: Tensors = {}
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._last_save = time.monotonic()

    def overdue(self) -> bool:
        """Whether checkpoint.every_minutes have passed since the last save, by this rank's clock."""
        minutes = self.config.checkpoint.every_minutes
        return minutes > 0 and time.monotonic() - self._last_save >= 60 * minutes

    def writing(self) -> bool:
        """Whether this rank's part of a checkpoint is still being written."""
        return self._pending is not None and not self._pending.written.done()

    def save(self, engine: Engine, progress: Progress) -> None:
        """Copies the state to the host and has it written; `finish` commits it.

        Waits for the save before, and raises as `finish` does; Diverged on every rank if the model is not finite.
        """
        self.finish()
        probe, *others = gather(probe_loss(engine, self.inputs.held_out))
        if not all(map(isfinite, [probe, *others])):
            raise Diverged(
                f"the model of step {progress.step} is not finite (loss on the probe batch, by rank: "
                f"{[probe, *others]}) and was not saved; the checkpoints in {self.folder} are from before it; a lower "
                f"optimizer.learning_rate or a longer warm-up may help."
            )
        with raise_on_all_ranks():
            if self.ranks.is_first:
                checkpoints.begin(self.folder, progress.step)
        temporary = checkpoints.temporary_folder(self.folder, progress.step)
        self._tensors, index = engine.snapshot(self._tensors)
        tensors = self._tensors | checkpoints.random_states(self.ranks.device)
        written = self._writer.submit(self._write, temporary, tensors, index)
        self._pending, self._last_save = Pending(progress, probe, written), time.monotonic()
        if not self.config.checkpoint.asynchronous:
            self.finish()

    def _write(self, temporary: Path, tensors: Tensors, index: list[dict[str, Any]]) -> dict[str, Any]:
        """In the thread: this rank's file, and what its part adds to the checksums."""
        facts = checkpoints.write_rank(temporary, self.ranks.rank, tensors, index)
        return facts | {"checksums": checksums(tensors, index)}

    def finish(self) -> None:
        """Commits what was begun, once all ranks have written it, and deletes what the rule does not keep.

        Every rank calls it. Raises ValueError or OSError on every rank if one could not write; then nothing is
        committed and the older checkpoints stay.
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
                checkpoints.commit(temporary, self._record(pending.progress, pending.probe, files, sums))
                checkpoints.retain(self.folder, self.config.checkpoint, pending.progress.step)

    def load(self, checkpoint: Checkpoint, engine: Engine) -> Progress:
        """Fills the engine from a checkpoint of any topology, and proves it.

        Raises ValueError if it was made with other shards, another palette or another order of the images, if an
        element of weights or moments is not what it was, or if the probe batch's loss is not the stored one.
        """
        record = checkpoint.record
        self._check_origin(checkpoint)
        with raise_on_all_ranks():
            reader = checkpoint.reader()
        engine.restore(reader, record.step)
        with raise_on_all_ranks():
            checkpoints.restore_random_states(checkpoint, self.ranks.rank, self.ranks.device)
        self._check_checksums(checkpoint, engine)
        losses = gather(probe_loss(engine, self.inputs.held_out, record.probe_tokens))
        tolerance = max(PROBE_TOLERANCE[record.precision], PROBE_TOLERANCE[self.config.precision])
        for rank, loss in enumerate(losses):
            if not abs(loss - record.probe_loss) <= tolerance:
                raise reported_on_all_ranks(
                    ValueError(
                        f"{checkpoint.folder} gives the probe batch a loss of {loss:.7f} on rank {rank}, but "
                        f"{record.probe_loss:.7f} when it was saved; the weights were not restored as they were."
                    )
                )
        if self.ranks.is_first:
            logger.info(
                f"resumed from {checkpoint.folder}: step {record.step}, {record.images:,} images seen; a "
                f"held-out image gives the loss {losses[0]:.7f} (when it was saved: {record.probe_loss:.7f})"
            )
        return Progress(record.step, record.images)

    def _check_checksums(self, checkpoint: Checkpoint, engine: Engine) -> None:
        """Of what the engine holds now, whatever its topology. Raises ValueError on every rank if they differ."""
        stored = checkpoint.record.fingerprints
        if not stored:
            return
        self._tensors, index = engine.snapshot(self._tensors)
        found = add_up(gather(checksums(self._tensors, index)))
        odd = " and ".join(state for state in stored if found.get(state) != stored[state])
        if odd:
            raise reported_on_all_ranks(
                ValueError(
                    f"{checkpoint.folder} was not restored as it was saved: {odd} of some parameter differs "
                    f"(the checksums are not those of its manifest)."
                )
            )

    def _check_origin(self, checkpoint: Checkpoint) -> None:
        record = checkpoint.record
        made_with = {"palette_sha256": record.palette_sha256, "digest": record.shards_digest}
        check_shards(made_with, self.inputs.shards, checkpoint.folder)
        if self.order.fingerprint(record.images) == record.order_fingerprint:
            return
        moved = self.order.moved_from(record.order_fingerprint, record.images)
        if moved is None:
            raise ValueError(
                f"{checkpoint.folder} continues with other images than this run would read next; seed, data.flip "
                f"and data.reflect_crop must be those of the run, and numpy must draw as it did."
            )
        if self.ranks.is_first:
            logger.warning(moved)

    def _record(
        self, progress: Progress, probe: float, files: dict[str, dict[str, Any]], sums: dict[str, str]
    ) -> CheckpointRecord:
        return CheckpointRecord(
            step=progress.step,
            images=progress.images,
            topology={"ranks": self.ranks.count} | {key: getattr(self.config.parallel, key) for key in TOPOLOGY},
            model=self.inputs.model_config.to_dict(),
            palette_sha256=self.inputs.shards.palette_sha256,
            shards_digest=self.inputs.shards.digest,
            order_fingerprint=self.order.fingerprint(progress.images),
            probe_loss=probe,
            precision=self.config.precision,
            files=files,
            probe_tokens=PROBE_TOKENS,
            fingerprints=sums,
        )
