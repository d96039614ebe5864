"""python -m pipeline COMMAND: trains, exports, evaluates and publishes models."""

import gc
import logging
import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn

from data_prep.common.command_line import Command, dispatch
from data_prep.common.exit_codes import STOPPED
from pipeline.rank_errors import CONNECTING, local_rank, report_error, reported_once_per_node

logger = logging.getLogger("pipeline")


def train(arguments: list[str]) -> int:
    """Trains a run, or resumes it."""
    gc.disable()  # importing 4,000 modules takes a quarter less time without; pipeline.train.loop enables it again
    from pipeline.command_line import parse_start
    from pipeline.train.health.stop import restarted_after_stop

    with reported_once_per_node(local_rank()):
        config, run, resume_from = parse_start(arguments)
        stays_stopped = restarted_after_stop(run)
    if stays_stopped:
        if os.environ.get("RANK") == "0":
            logger.warning(f"{run} was stopped on request: it stays stopped, although torchrun restarts its ranks")
        return STOPPED
    from pipeline.distributed import select_mig_instance

    select_mig_instance(local_rank())  # before torchao, whose import makes CUDA read the variable
    from pipeline.train.loop import train as run_training

    return run_training(config, run, ["python", "-m", "pipeline", "train", *arguments], resume_from)


def leave(code: int) -> NoReturn:
    """Ends the process: without the interpreter's shutdown if a process group was started, or is being started.

    The shutdown waits for all threads and destroys the group. After an error, NCCL's threads may wait for other ranks,
    which in turn wait for this one. Even a finished rank sometimes aborts in the group's threads; so may a rank whose
    attempt to connect to rank 0 hangs. Everything that a later command reads is on disk by now: a checkpoint that is
    still being written stays incomplete.
    """
    distributed = sys.modules.get("torch.distributed")
    started = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if not started and all(thread.name != CONNECTING for thread in threading.enumerate()):
        sys.exit(code)
    for flush in (logging.shutdown, sys.stdout.flush, sys.stderr.flush):
        with suppress(OSError, ValueError):  # a console that was closed
            flush()
    os._exit(code)


COMMANDS: dict[str, tuple[str, Command | str]] = {
    "train": ("train a run, or resume it (alone, under torchrun, or under srun)", train),
    "search": (
        "find the peak learning rate by a sweep downward in half-decades, as the paper does",
        "operate.rate_search:search_command",
    ),
    "plan": (
        "estimate memory and time of a run on N accelerators, and list layouts that fit",
        "plan.command:plan_command",
    ),
    "export": ("write a checkpoint as a Hugging Face model folder", "model_folder.command:export_command"),
    "evaluate": ("probe and measure a model, with a report", "evaluate.command:evaluate"),
    "compare": (
        "plot accuracy against validation loss over checkpoints and models",
        "results.report.compare:compare_command",
    ),
    "scaling": (
        "fit a scaling law over runs, and predict losses and compute-optimal models",
        "scaling.command:scaling_command",
    ),
    "complete": ("complete the lower halves of images", "evaluate.complete:complete_command"),
    "publish": (
        "publish a model, its results and a card to a hub or a folder",
        "publish.command:publish_command",
    ),
    "status": ("show a run's state, losses, checkpoints and remaining time", "operate.status:status_command"),
    "preflight": (
        "check a training job's options, and its nodes before it trains (the job scripts run it)",
        "operate.preflight.command:preflight_command",
    ),
    "doctor": (
        "check this machine, and that a small run can be saved, killed and resumed on it",
        "operate.doctor:doctor_command",
    ),
}
"""Each command's line of --help, and its function or "module:function" in this package."""


if __name__ == "__main__":
    description = "Trains Image GPT on a shard set; exports, evaluates and publishes the model."
    dispatch("pipeline", description, COMMANDS, leave, report_error)
