"""What the training scripts of ours and of the peers share: the work that is asked for, and how a turn is timed.

It runs in the peers' environments too: beside torch and numpy it imports nothing of ours.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.peers.paused import PausedLoop, serve_loop

COLORS = 512
SOS = COLORS
SAVE_EVERY = 500
"""Steps between the saves of a Trainer by default. A turn ends with a save, which counts in this proportion."""


@dataclass(frozen=True)
class Work:
    """Steps of a model of one size on images of one set."""

    layers: int
    width: int
    heads: int
    positions: int
    images: int
    """Of a step's batch."""
    precision: str
    """fp32, or bf16, which is autocast over fp32 weights."""
    compiled: bool
    steps: int
    """Of a turn."""
    shards: str
    """Folder of the shard set, which ours reads."""
    tokens: str
    """The same images as an .npy file, uint16 (N, T), which the peers read."""
    folder: str
    """Where checkpoints go; a script adds a name of its own."""
    device: str = "cpu"

    def to_argument(self) -> str:
        """As the scripts take it from the command line."""
        return json.dumps(asdict(self))


def sync_files(folder: Path) -> None:
    """Waits until all files of a folder are on the disk: some libraries leave them in the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def from_command_line() -> Work:
    """The work that the first argument describes."""
    return Work(**json.loads(sys.argv[1]))


class Turns:
    """Counts a loop's steps, and pauses it after each turn, which ends with a save."""

    def __init__(self, work: Work, loop: PausedLoop) -> None:
        self._work, self._loop, self._steps = work, loop, 0
        self.stall, self.saving, self.loss = 0.0, 0.0, float("nan")
        """Seconds for which the save stops the loop, seconds until it is on disk, and the loss of the last step."""

    def save(self, save: Callable[[], object], finish: Callable[[], object] = lambda: None) -> None:
        """Times a save; finish: waits for what it left to a thread, so that this disturbs nobody else's turn."""
        began = time.perf_counter()
        save()
        self.stall = time.perf_counter() - began
        finish()
        sync_files(Path(self._work.folder))
        self.saving = time.perf_counter() - began

    def after_step(self, save: Callable[[], object] = lambda: None) -> None:
        """Call after each step; save: calls `save` above, for a loop that leaves the saving to its user."""
        self._steps += 1
        if self._steps % self._work.steps:
            return
        save()
        images = self._work.steps * self._work.images
        self._loop.pause({"work": images, "stall": self.stall, "saving": self.saving, "loss": self.loss})


def serve_plain_loop(
    work: Work,
    step: Callable[[Any], float],
    save: Callable[[], object],
    finish: Callable[[], object] = lambda: None,
) -> None:
    """Takes turns with a loop for libraries that leave the loop to their user.

    step: takes int64 (B, T + 1), SOS first, updates the model and returns the loss. save: writes the weights and the
    optimizer's state; finish: waits for what it left to a thread.
    """
    import numpy as np
    import torch

    images = np.load(work.tokens, mmap_mode="r")  # uint16 (N, T)
    random = np.random.default_rng(0)

    def batch() -> Any:
        chosen = images[np.sort(random.choice(len(images), work.images, replace=False))]
        return torch.from_numpy(np.pad(chosen.astype(np.int64), ((0, 0), (1, 0)), constant_values=SOS)).to(work.device)

    def run(loop: PausedLoop) -> None:
        turns = Turns(work, loop)
        while True:
            turns.loss = step(batch())
            turns.after_step(lambda: turns.save(save, finish))

    serve_loop(run)
