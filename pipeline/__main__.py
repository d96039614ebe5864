"""python -m pipeline COMMAND: from a shard set to a measured model."""

import gc
import os
import sys
from typing import NoReturn

from data_prep.common.command_line import dispatch
from data_prep.common.exit_codes import FAILED
from pipeline.rank_errors import local_rank, report_error, reported_once_per_node


def train(arguments: list[str]) -> int:
    """Trains a run, or goes on with it."""
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


def search(arguments: list[str]) -> int:
    """Finds the peak rate."""
    from pipeline.operate.rate_search import search_command

    return search_command(arguments)


def plan(arguments: list[str]) -> int:
    """Says what a run would take, and which layouts fit."""
    from pipeline.plan.command import plan_command

    return plan_command(arguments)


def export(arguments: list[str]) -> int:
    """Writes a checkpoint as a Hugging Face model folder."""
    from pipeline.model_folder.command import export_command

    return export_command(arguments)


def evaluate(arguments: list[str]) -> int:
    """Runs evaluation tasks and writes their report."""
    from pipeline.evaluate.command import evaluate as run_tasks

    return run_tasks(arguments)


def complete(arguments: list[str]) -> int:
    """Completes half pictures."""
    from pipeline.evaluate.complete import complete_command

    return complete_command(arguments)


def compare(arguments: list[str]) -> int:
    """Shows accuracy against validation loss over checkpoints."""
    from pipeline.results.report.compare import compare_command

    return compare_command(arguments)


def publish(arguments: list[str]) -> int:
    """Publishes a model with its results and a card."""
    from pipeline.publish.command import publish_command

    return publish_command(arguments)


def doctor(arguments: list[str]) -> int:
    """Says what this machine has, and tries a small run out."""
    from pipeline.operate.doctor import doctor_command

    return doctor_command(arguments)


def status(arguments: list[str]) -> int:
    """Says where a run stands."""
    from pipeline.operate.status import status_command

    return status_command(arguments)


def preflight(arguments: list[str]) -> int:
    """Looks at the nodes of a job."""
    from pipeline.operate.preflight.command import preflight_command

    return preflight_command(arguments)


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


if __name__ == "__main__":
    dispatch(
        "python -m pipeline",
        "Trains Image GPT on a shard set, exports, measures, shows and publishes it.",
        {
            "train": ("train a run, or go on with it (alone, under torchrun, or under srun)", train),
            "search": ("find the peak rate by runs downward in half-decades, as the paper does", search),
            "plan": ("what a run takes on N accelerators, and the layouts that fit", plan),
            "export": ("write a checkpoint as a Hugging Face model folder", export),
            "evaluate": ("probe and measure a model, with a report", evaluate),
            "compare": ("accuracy against validation loss over checkpoints and models", compare),
            "complete": ("complete half pictures", complete),
            "publish": ("a model, its results and a card to a hub or a folder", publish),
            "status": ("where a run stands", status),
            "preflight": ("whether the nodes of a job are sound; the job scripts ask it before they train", preflight),
            "doctor": ("what this machine has, and whether a small run saves, dies and resumes on it", doctor),
        },
        leave,
        report_error,
    )
