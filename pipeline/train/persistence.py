"""Saving and resuming across ranks: the newest whole checkpoint is found, loaded, and proven by the probe's loss."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2Config

from data_prep.shards import ShardSet, Split
from pipeline.config import TrainConfig
from pipeline.train import checkpoints
from pipeline.train.batches import Order
from pipeline.train.checkpoints import Checkpoint, CheckpointRecord
from pipeline.train.engine import Engine
from pipeline.train.ranks import Ranks, failing_together, first_word, from_first, gather
from pipeline.train.run_folder import check_shards
from pipeline.train.validation import probe_loss

PROBE_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
"""Nats per token by which the probe loss may differ after a load: summation order of another topology, no more."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: with the seed, all that the order of the pictures depends on."""

    step: int = 0
    images: int = 0


@dataclass(frozen=True)
class Store:
    """A run's checkpoints, and what they must agree with."""

    folder: Path
    config: TrainConfig
    model_config: GPT2Config
    shards: ShardSet
    order: Order
    probe: Split
    ranks: Ranks

    def save(self, engine: Engine, progress: Progress) -> Path:
        """Writes, publishes, and deletes what the rule does not keep.

        Raises ValueError or OSError on every rank if one could not write; then nothing is published and the older
        checkpoints stay.
        """
        with failing_together():
            if self.ranks.is_first:
                checkpoints.begin(self.folder, progress.step)
        aside = checkpoints.aside_folder(self.folder, progress.step)
        probe = probe_loss(engine, self.probe)
        tensors, index = engine.snapshot()
        written = None
        with failing_together():
            written = checkpoints.write_rank(aside, self.ranks.rank, tensors, index, torch.get_rng_state())
        files = {checkpoints.rank_file(rank): facts for rank, facts in enumerate(gather(written)) if facts}
        with failing_together():
            if self.ranks.is_first:
                checkpoints.publish(aside, self._record(progress, probe, files))
                checkpoints.retain(self.folder, self.config.checkpoint, progress.step)
        return checkpoints.step_folder(self.folder, progress.step)

    def newest_whole(self) -> Checkpoint | None:
        """The newest checkpoint whose files all are what was written; the ranks share the reading.

        Says which ones it passed over. Raises ValueError if there are checkpoints and none is whole.
        """
        candidates = from_first([str(path) for path in reversed(checkpoints.published(self.folder))])
        for candidate in candidates:
            checkpoint, damage = None, None
            try:
                checkpoint = checkpoints.open_checkpoint(Path(candidate))
                damage = checkpoint.damage(self.ranks.rank, self.ranks.count)
            except (ValueError, OSError) as error:
                damage = str(error)
            damage = first_word(damage)
            if damage is None:
                return checkpoint
            if self.ranks.is_first:
                print(f"WARNING: passed over {candidate}: {damage}", flush=True)
        if candidates:
            raise ValueError(
                f"{self.folder} holds {len(candidates)} checkpoints and none is whole; put a copy back, or name a "
                f"new --run."
            )
        return None

    def load(self, checkpoint: Checkpoint, engine: Engine) -> Progress:
        """Fills the engine from a checkpoint of any topology, and proves it.

        Raises ValueError if it was made with other shards, another palette or another order of the pictures, or if
        the probe batch's loss is not the stored one.
        """
        record = checkpoint.record
        self._check_origin(checkpoint)
        with failing_together():
            reader = checkpoint.reader()
        engine.restore(reader, record.step)
        with failing_together():
            random_state = checkpoints.load_random_state(checkpoint, self.ranks.rank)
        if random_state is not None:
            torch.set_rng_state(random_state)
        loss = probe_loss(engine, self.probe)
        tolerance = max(PROBE_TOLERANCE[record.precision], PROBE_TOLERANCE[self.config.precision])
        if not abs(loss - record.probe_loss) <= tolerance:
            raise ValueError(
                f"{checkpoint.folder} gives the probe batch a loss of {loss:.7f}, but {record.probe_loss:.7f} when it "
                f"was saved; the weights were not restored as they were."
            )
        if self.ranks.is_first:
            print(
                f"resumed from {checkpoint.folder}: step {record.step}, {record.images:,} images seen, probe loss "
                f"{loss:.7f} (saved with {record.probe_loss:.7f})",
                flush=True,
            )
        return Progress(record.step, record.images)

    def _check_origin(self, checkpoint: Checkpoint) -> None:
        record = checkpoint.record
        made_with = {"palette_sha256": record.palette_sha256, "digest": record.shards_digest}
        check_shards(made_with, self.shards, checkpoint.folder)
        if self.order.fingerprint(record.images) == record.order_fingerprint:
            return
        moved = self.order.moved_from(record.order_fingerprint, record.images)
        if moved is None:
            raise ValueError(
                f"{checkpoint.folder} goes on with other pictures than this run would read next; seed, data.flip "
                f"and data.reflect_crop must be those of the run, and numpy must draw as it did."
            )
        if self.ranks.is_first:
            print(f"WARNING: {moved}", flush=True)

    def _record(self, progress: Progress, probe: float, files: dict[str, dict[str, object]]) -> CheckpointRecord:
        return CheckpointRecord(
            step=progress.step,
            images=progress.images,
            topology={
                "ranks": self.ranks.count,
                "zero_stage": self.config.parallel.zero_stage,
                "pipeline_stages": self.config.parallel.pipeline_stages,
            },
            model=self.model_config.to_dict(),
            palette_sha256=self.shards.palette_sha256,
            shards_digest=self.shards.digest,
            order_fingerprint=self.order.fingerprint(progress.images),
            probe_loss=probe,
            precision=self.config.precision,
            files=files,
        )
