"""A plain loop over transformers' ImageGPT that saves by torch.distributed.checkpoint.async_save.

One stager copies every state, into the memory of the one before; by default each save would have a new one, which stops
training for longer.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.nn import functional

from tests.benchmarks.peers.training.hf_trainer import model_of
from tests.benchmarks.peers.training.work import COLORS, Work, from_command_line, serve_plain_loop


class AsyncSaves:
    """Saves of a model and its optimizer; the newest is kept."""

    def __init__(self, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._folder, self._model, self._optimizer = folder, model, optimizer
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._written: Any = None

    def save(self) -> None:
        """Copies the state, and returns while a thread writes it."""
        weights, moments = get_state_dict(self._model, self._optimizer)
        state = {"model": weights, "optimizer": moments}
        self._written = dcp.async_save(state, checkpoint_id=self._folder, async_stager=self._stager, no_dist=True)

    def finish(self) -> None:
        """Waits for the thread."""
        self._written.result()


def main() -> None:
    """Takes turns."""
    work = from_command_line()
    folder = Path(work.folder) / "async-save"
    shutil.rmtree(folder, ignore_errors=True)
    model = model_of(work).to(work.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    saves = AsyncSaves(folder, model, optimizer)
    serve_plain_loop(work, step_of(work, model, optimizer), saves.save, saves.finish)


def step_of(work: Work, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """A training step of next-color prediction."""

    def step(tokens: torch.Tensor) -> float:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=work.precision == "bf16"):
            logits = model(input_ids=tokens[:, :-1]).logits[..., :COLORS]
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    main()
