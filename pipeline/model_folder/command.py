"""`python -m pipeline export`: a run's checkpoint as a Hugging Face model folder."""

import logging
import os
from pathlib import Path

from data_prep.common.command_line import new_parser, parse

logger = logging.getLogger(__name__)


def export_command(arguments: list[str]) -> int:
    """`export RUN --out MODEL [--step N]`. Raises ValueError for invalid input."""
    parser = new_parser("python -m pipeline export", "Exports a checkpoint as a Hugging Face model folder.")
    parser.add_argument("source", type=str, help="a run, or one of its checkpoints")
    parser.add_argument("--out", type=str, required=True, help="the model folder to write")
    parser.add_argument(
        "--step", type=int | None, default=None, help="the step of the checkpoint; the run's newest by default"
    )
    chosen = parse(parser, arguments)

    from pipeline.model_folder.export import export, find_checkpoint  # imports torch, which takes seconds

    checkpoint = find_checkpoint(Path(chosen.source), chosen.step)
    export(checkpoint, Path(chosen.out))
    logger.info(f"exported step {checkpoint.record.step} to {chosen.out}")
    return os.EX_OK
