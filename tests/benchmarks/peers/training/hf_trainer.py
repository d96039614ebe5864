"""transformers' Trainer on its ImageGPT: its data loader, log and checkpoints."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.benchmarks.peers.paused import PausedLoop, serve_loop
from tests.benchmarks.peers.training.work import COLORS, SOS, Turns, Work, from_command_line, sync_files


class Images(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """SOS and the tokens of each image; the model shifts the labels itself."""

    def __init__(self, file: str) -> None:
        self._tokens = np.load(file, mmap_mode="r")  # uint16 (N, T)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(np.concatenate([[SOS], self._tokens[number]]))  # int64 (T + 1,)
        return {"input_ids": tokens, "labels": tokens}


def model_of(work: Work) -> ImageGPTForCausalImageModeling:
    """Of the given size, without dropout."""
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_layer": work.layers, "n_embd": work.width, "n_head": work.heads, "n_positions": work.positions + 1}
    return ImageGPTForCausalImageModeling(ImageGPTConfig(vocab_size=COLORS + 1, **shape, **dropout))


class PauseAfterTurns(TrainerCallback):
    """Times the saves, and pauses before the first step of a turn."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self._began = turns, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The turn before has ended, its save included."""
        if state.global_step:
            self._turns.after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What follows is the log, and the save if it is due."""
        self._began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Of each step, before the save."""
        self._began, self._turns.loss = time.perf_counter(), (logs or {}).get("loss", float("nan"))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The end of a save."""
        self._turns.stall = time.perf_counter() - self._began
        sync_files(Path(args.output_dir))
        self._turns.saving = time.perf_counter() - self._began


def arguments_of(work: Work, folder: Path) -> TrainingArguments:
    """Its fastest documented options on one device: the fused optimizer, and compilation if asked for."""
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=work.images,
        max_steps=10**6,
        learning_rate=1e-3,
        warmup_steps=100,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=work.precision == "bf16",
        torch_compile=work.compiled,
        logging_steps=1,
        report_to="tensorboard",
        save_steps=work.steps,
        save_total_limit=1,
        disable_tqdm=True,
        use_cpu=work.device == "cpu",
    )


def main() -> None:
    """Takes turns."""
    work = from_command_line()
    folder = Path(work.folder) / f"trainer-{work.compiled}"
    trainer = Trainer(model_of(work), arguments_of(work, folder), train_dataset=Images(work.tokens))

    def run(loop: PausedLoop) -> None:
        trainer.add_callback(PauseAfterTurns(Turns(work, loop)))
        trainer.train()

    serve_loop(run)


if __name__ == "__main__":
    main()
