"""python -m tests.golden.recorded_runs FILE: as tests.pipeline.train.several_runs, and records the images of each step.

Each rank writes images-RANK.jsonl to the run's folder: one line a step, with the step, its data-parallel rank, and a
digest of each of its images.
"""

import hashlib
import json

from pipeline.model.masks import Batch
from pipeline.train import loop
from pipeline.train.engine.base import StepResult


class RecordingTrainer(loop.Trainer):
    """Records what the engine is given, not what the data order says it should be."""

    def train_step(self, step: int, batch: Batch, profile: bool) -> StepResult:
        row = {"step": step, "data_rank": self.engine.data_rank, "images": digests(batch)}
        with (self.run_folder.path / f"images-{self.ranks.rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return super().train_step(step, batch, profile)


def digests(batch: Batch) -> list[str]:
    """A digest of each image's tokens, and of its masked pixels if there are masks."""
    masks = [b""] * len(batch.tokens) if batch.masked is None else [mask.tobytes() for mask in batch.masked]
    tokens = [image.astype("<u2").tobytes() for image in batch.tokens]
    return [hashlib.sha256(both[0] + both[1]).hexdigest() for both in zip(tokens, masks, strict=True)]


loop.Trainer = RecordingTrainer  # type: ignore[misc]
import tests.pipeline.train.several_runs  # noqa: E402, F401  trains, and ends the process
