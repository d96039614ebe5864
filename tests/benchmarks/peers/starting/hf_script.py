"""A training script for transformers' Trainer as its examples are written: options by HfArgumentParser.

python -m tests.benchmarks.peers.starting.hf_script --tokens TOKENS.npy --layers 24 ... --output_dir RUN
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from tests.benchmarks.peers.training.hf_trainer import Images, model_of
from tests.benchmarks.peers.training.work import Work


@dataclass
class ModelArguments:
    """The model and its data."""

    tokens: str = field(metadata={"help": "An .npy file of token sequences, uint16 (N, T)."})
    layers: int = field(default=24, metadata={"help": "Number of transformer blocks."})
    width: int = field(default=512, metadata={"help": "Hidden size."})
    heads: int = field(default=8, metadata={"help": "Attention heads of each block."})
    positions: int = field(default=256, metadata={"help": "Positions of a sequence."})


class Printed(TrainerCallback):
    """Prints each step, for the clock."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the update."""
        print(f"ended step {state.global_step}", flush=True)


def main() -> None:
    """Trains, and resumes if the options say so."""
    own, training = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
    images = training.per_device_train_batch_size
    shape = (own.layers, own.width, own.heads, own.positions, images)
    model = model_of(Work(*shape, "fp32", False, 1, "", own.tokens, training.output_dir))
    trainer = Trainer(model, training, train_dataset=Images(own.tokens), callbacks=[Printed()])
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)


if __name__ == "__main__":
    main()
