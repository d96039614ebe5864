"""`python -m pipeline export`: a run's checkpoint as a Hugging Face model folder."""

import logging
import os
from pathlib import Path

from data_prep.common.command_line import new_parser, parse

logger = logging.getLogger(__name__)


def export_command(arguments: list[str]) -> int:
    """`export RUN --out MODEL [--step N]`. Raises ValueError for invalid input."""
    parser = new_parser("python -m pipeline export", "Write a checkpoint as a Hugging Face model folder.")
    parser.add_argument("source", type=str, help="A run, or one of its checkpoints.")
    parser.add_argument("--out", type=str, required=True, help="The model folder to write.")
    parser.add_argument(
        "--step", type=int | None, default=None, help="Which of a run's checkpoints; its newest by default."
    )
    chosen = parse(parser, arguments)

    from pipeline.model_folder.export import export, find_checkpoint  # torch: seconds that --help need not take

    checkpoint = find_checkpoint(Path(chosen.source), chosen.step)
    export(checkpoint, Path(chosen.out))
    logger.info(f"exported step {checkpoint.record.step} to {chosen.out}")
    return os.EX_OK
