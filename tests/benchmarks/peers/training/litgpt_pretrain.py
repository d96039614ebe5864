"""`litgpt pretrain`: its own loop, which compiles the model, on a GPT of the same size."""

from pathlib import Path
from typing import Any

import litgpt.pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from torchmetrics.aggregation import RunningMean

from tests.benchmarks.peers.paused import PausedLoop, serve_loop
from tests.benchmarks.peers.training.litgpt_data import Images
from tests.benchmarks.peers.training.work import Turns, Work, from_command_line

VOCABULARY = 520
"""512 colors and SOS, padded to a multiple of 8."""


def config_of(work: Work) -> Config:
    """The blocks of Pythia, litgpt's defaults, in the given size."""
    return Config(
        name="image-gpt",
        block_size=work.positions,
        n_layer=work.layers,
        n_embd=work.width,
        n_head=work.heads,
        padded_vocab_size=VOCABULARY,
    )


def take_turns(work: Work, loop: PausedLoop) -> None:
    """Pauses pretrain's loop after each turn's save, which it makes at the end of a step."""
    turns, save = Turns(work, loop), litgpt.pretrain.save_checkpoint

    class PausedIterator(litgpt.pretrain.CycleIterator):
        steps = 0

        def __next__(self) -> Any:
            if self.steps:
                turns.after_step()
            self.steps += 1
            return super().__next__()

    class Loss(RunningMean):
        def compute(self) -> Any:
            value = super().compute()
            turns.loss = float(value)
            return value

    def timed(*arguments: Any) -> None:
        turns.save(lambda: save(*arguments))

    litgpt.pretrain.CycleIterator, litgpt.pretrain.RunningMean = PausedIterator, Loss
    litgpt.pretrain.save_checkpoint = timed


def main() -> None:
    """Takes turns."""
    work = from_command_line()
    if not work.compiled:
        raise ValueError("litgpt pretrain always compiles")

    def run(loop: PausedLoop) -> None:
        take_turns(work, loop)
        litgpt.pretrain.setup(
            "image-gpt",
            model_config=config_of(work),
            out_dir=Path(work.folder) / "litgpt",
            precision="bf16-mixed" if work.precision == "bf16" else "32-true",
            data=Images(work.tokens),
            train=TrainArgs(
                save_interval=work.steps,
                log_interval=1,
                global_batch_size=work.images,
                micro_batch_size=work.images,
                lr_warmup_steps=100,
                max_tokens=10**12,
                max_norm=1.0,
            ),
            eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False),
            optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "betas": (0.9, 0.95)}},
            devices=1,
        )

    serve_loop(run)


if __name__ == "__main__":
    main()
