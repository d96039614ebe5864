"""`python -m pipeline export`: a run's checkpoint as a Hugging Face model folder."""

import logging
import os
from pathlib import Path
from typing import Literal

from data_prep.common.command_line import new_parser, parse

logger = logging.getLogger(__name__)


def export_command(arguments: list[str]) -> int:
    """`export RUN --out MODEL [--step N | --average STEP,STEP,...] [--weights raw|ema]`.

    Raises ValueError for invalid input.
    """
    parser = new_parser("python -m pipeline export", "Exports a checkpoint as a Hugging Face model folder.")
    parser.add_argument("source", type=str, help="a run, or one of its checkpoints")
    parser.add_argument("--out", type=str, required=True, help="the model folder to write")
    parser.add_argument(
        "--step", type=int | None, default=None, help="the step of the checkpoint; the run's newest by default"
    )
    average = "two or more steps, such as 1000,2000,3000: the mean of the weights of these checkpoints"
    parser.add_argument("--average", type=str | None, default=None, help=average)
    weights = "raw: as trained; ema: their exponential moving average, of a run with ema.decay"
    parser.add_argument("--weights", type=Literal["raw", "ema"], default="raw", help=weights)
    chosen = parse(parser, arguments)
    if chosen.average is not None and chosen.step is not None:
        raise ValueError("--step and --average both name checkpoints; give one of them.")
    if chosen.average is not None and chosen.weights == "ema":
        raise ValueError("--average takes the mean of raw weights, and --weights is ema; give one of them.")
    steps = _steps(chosen.average) if chosen.average is not None else []

    from pipeline.model_folder.export import export, find_checkpoint, find_checkpoints  # torch, which takes seconds

    source, out = Path(chosen.source), Path(chosen.out)
    [*earlier, newest] = find_checkpoints(source, steps) if steps else [find_checkpoint(source, chosen.step)]
    export(newest, out, earlier, chosen.weights)
    exported = ", ".join(str(checkpoint.record.step) for checkpoint in (*earlier, newest))
    what = "the average of steps" if earlier else "the moving average at step" if chosen.weights == "ema" else "step"
    logger.info(f"exported {what} {exported} to {out}")
    return os.EX_OK


def _steps(text: str) -> list[int]:
    """Raises ValueError unless it is a list of steps, separated by commas."""
    words = text.replace(" ", "").split(",")
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--average is {text!r}; it must be steps separated by commas, such as 1000,2000,3000.")
    return [int(word) for word in words]
