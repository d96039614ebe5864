"""`python -m pipeline complete`: draws a model's completions of half images next to the originals."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.common.command_line import new_parser, parse
from data_prep.common.exit_codes import FINISHED
from pipeline.evaluate.options import GridOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Command:
    """Which images to complete, and where to write the figure."""

    shards: str
    """The shard set whose images are completed: a folder or an address."""
    out: Path
    """The PNG to write."""
    seed: int = 0
    """Seed of the choice of images and of the sampled completions."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward pass."""


def complete_command(arguments: list[str]) -> int:
    """`python -m pipeline complete MODEL --shards SHARDS --out FILE`. Raises ValueError for invalid input."""
    parser = new_parser("python -m pipeline complete", "Completes half images and shows them next to the originals.")
    parser.add_argument("model", type=Path, help="a run, a checkpoint, a model folder, or hub:ORG/NAME")
    parser.add_class_arguments(Command)
    parser.add_class_arguments(GridOptions)
    values = vars(parse(parser, arguments))
    path, command = values["model"], Command(**{name: values[name] for name in Command.__dataclass_fields__})
    options = GridOptions(**{name: values[name] for name in GridOptions.__dataclass_fields__})
    if command.out.suffix.lower() != ".png":
        raise ValueError(f"--out is {command.out}; it must be a file that ends in .png.")
    # Imported here, so that --help and the errors above do not import torch.
    from data_prep.shards.reader import open_shard_set
    from pipeline.evaluate.context import load_matching, start_accelerator
    from pipeline.evaluate.tasks.completions import CANT_COMPLETE, choose_examples, draw_completions
    from pipeline.model_folder.resolve import model_folder

    shards = open_shard_set(command.shards)
    choose_examples(shards, options.split, options.images, command.seed)
    model = load_matching(model_folder(path), shards)
    if model.mask_probability is not None:
        raise ValueError(CANT_COMPLETE)
    accelerator = start_accelerator(command.precision)
    model.model.to(accelerator.device).eval()
    with accelerator.autocast():
        draw_completions(model, shards, options, command.seed, command.out)
    logger.info(f"completions: {command.out}")
    return FINISHED
