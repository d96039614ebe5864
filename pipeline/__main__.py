"""python -m pipeline COMMAND: from a shard set to a measured model."""

import gc
import os
import sys
from typing import NoReturn

from data_prep.common.command_line import Command, dispatch
from data_prep.common.exit_codes import FAILED
from pipeline.rank_errors import local_rank, report_error, reported_once_per_node


def train(arguments: list[str]) -> int:
    """Trains a run, or resumes it."""
    gc.disable()  # for four thousand modules that stay: a quarter of the time they take; the loop turns it on again
    from pipeline.command_line import parse_training

    with reported_once_per_node(local_rank()):
        config, run = parse_training(arguments)
    from pipeline.train.health.diverged import Diverged
    from pipeline.train.loop import train as run_training

    try:
        return run_training(config, run, ["python", "-m", "pipeline", "train", *arguments])
    except Diverged as error:
        report_error(error)
        return FAILED


def leave(code: int) -> NoReturn:
    """Ends the process.

    Once a process group was started, the interpreter's own shutdown now and then aborts in the group's threads, and
    a finished rank would seem to have failed; the work is done and on disk, so the process ends at once.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


COMMANDS: dict[str, tuple[str, Command | str]] = {
    "train": ("train a run, or resume it (alone, under torchrun, or under srun)", train),
    "search": (
        "find the peak learning rate by a sweep downward in half-decades, as the paper does",
        "operate.rate_search:search_command",
    ),
    "plan": ("what a run takes on N accelerators, and the layouts that fit", "plan.command:plan_command"),
    "export": ("write a checkpoint as a Hugging Face model folder", "model_folder.command:export_command"),
    "evaluate": ("probe and measure a model, with a report", "evaluate.command:evaluate"),
    "compare": (
        "accuracy against validation loss over checkpoints and models",
        "results.report.compare:compare_command",
    ),
    "complete": ("complete the lower halves of images", "evaluate.complete:complete_command"),
    "publish": ("a model, its results and a card to a hub or a folder", "publish.command:publish_command"),
    "status": ("where a run stands", "operate.status:status_command"),
    "preflight": (
        "check a training job's options, and its nodes before it trains (the job scripts run it)",
        "operate.preflight.command:preflight_command",
    ),
    "doctor": (
        "check this machine, and that a small run can be saved, killed and resumed on it",
        "operate.doctor:doctor_command",
    ),
}
"""By name: its line of --help, and a function, or "module:function" in this package."""


if __name__ == "__main__":
    description = "Trains Image GPT on a shard set, exports, measures, shows and publishes it."
    dispatch("pipeline", description, COMMANDS, leave, report_error)
