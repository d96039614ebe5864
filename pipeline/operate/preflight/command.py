"""python -m pipeline preflight: checks a training job's options before it is submitted, and its nodes before it trains.

In a job, srun starts it once on each node; one more process with --aggregate reads the nodes' reports. All take the
options of `train`.
"""

import logging
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

from data_prep.common.command_line import fill, new_parser, value_of
from data_prep.common.exit_codes import USER_ERROR
from data_prep.common.files import read_json
from pipeline.checkpoint.run_files import CHECKPOINTS_FOLDER
from pipeline.command_line import parse_run
from pipeline.config import TrainConfig
from pipeline.operate.preflight.diagnosis import diagnose
from pipeline.operate.preflight.node_checks import check_node
from pipeline.operate.preflight.report import read_line

logger = logging.getLogger(__name__)

AGGREGATE = ("--aggregate", "--judge")
"""The option, and its name in earlier versions."""


def preflight_command(arguments: list[str]) -> int:
    """Without --nodes, checks the options; with it, prints this node's report, or with --aggregate the result of all.

    The result is ok, retry, exclude NODES or inconclusive NODES. Raises ValueError for invalid options, and with
    --aggregate for a fault that all nodes share.
    """
    parser = new_parser(
        "python -m pipeline preflight",
        "Checks train's options, the shard set and the run's folder; with --nodes, the health of a job's nodes.",
    )
    parser.add_argument("--nodes", type=str, default=None, help="Names of the job's nodes, separated by commas.")
    parser.add_argument("--accelerators", type=int, default=0, help="Accelerators that each node must have.")
    parser.add_argument("--seconds", type=float, default=180, help="Time limit of the all-reduce between all nodes.")
    parser.add_argument(*AGGREGATE, dest="aggregate", action="store_true", help="Read all reports on standard input.")
    try:
        parsed = parse_run(parser, arguments)
    except ValueError as error:
        if value_of("--nodes", arguments) is not None and not set(AGGREGATE) & set(arguments):
            return USER_ERROR  # the process with --aggregate has the same options, and prints the error once
        raise ValueError(str(error).replace(parser.prog, "python -m pipeline train")) from error
    config, run = fill(TrainConfig, parsed), Path(parsed.run)
    if parsed.nodes is None:
        _check_options(config, run, parsed.resume_from)
        return 0
    nodes = parsed.nodes.split(",")
    if parsed.aggregate:
        return _aggregate(config, run, nodes, sys.stdin)
    node = os.environ.get("SLURMD_NODENAME", platform.node())
    if node not in nodes:
        raise ValueError(f"--nodes is {parsed.nodes}; it must name this node too, {node}.")
    checkpoints = Path(config.checkpoint.folder or run / CHECKPOINTS_FOLDER)
    report = check_node(
        node,
        nodes,
        run=run,
        shards=config.data.paths,
        accelerators=parsed.accelerators,
        seconds=parsed.seconds,
        checkpoints=checkpoints,
    )
    print(report.line(), flush=True)
    return 0


def _check_options(config: TrainConfig, run: Path, resume_from: int | None) -> None:
    """What `train` checks when it starts, other than ranks and devices. Raises ValueError naming the key."""
    from pipeline.checkpoint.run_folder import RunFolder
    from pipeline.probe_images import open_probe_images
    from pipeline.training_set import open_training_sets
    from pipeline.weights.start import check_start

    sets = open_training_sets(config)
    open_probe_images(config, sets)
    folder = RunFolder(run)
    folder.check(config, sets, folder.resume_step(resume_from))
    check_start(config, sets, run, download=True)
    paths = ", ".join(str(one.shards.path) for one in sets.sets)
    fit = "fits" if len(sets.sets) == 1 else "fit"
    logger.info(f"preflight: {paths} {fit} the options: resolution {sets.resolution}, {sets.colors} colors")


def _aggregate(config: TrainConfig, run: Path, nodes: list[str], lines: Iterable[str]) -> int:
    needed, digest = _needed_bytes(config, run), _digest_of(config, run)  # while the nodes run their checks
    reports = [report for report in map(read_line, lines) if report is not None]
    diagnosis = diagnose(reports, nodes, needed, digest)
    for node, sentence in diagnosis.bad.items():
        logger.warning(f"preflight: {node} is excluded: {sentence}")
    if diagnosis.inconclusive:
        logger.warning(
            f"preflight: the all-reduce between {' and '.join(diagnosis.inconclusive)} fails, and without a third node "
            f"the faulty one can't be told from the other"
        )
    if diagnosis.retry:
        logger.warning(f"preflight: {diagnosis.retry}")
    seconds = max((report.seconds for report in reports), default=0.0)
    logger.info(f"preflight: {len(nodes)} nodes in {seconds:.1f} s: {diagnosis.result}")
    print(diagnosis.result)
    return 0


def _needed_bytes(config: TrainConfig, run: Path) -> float:
    """Bytes of the checkpoints that will be written before the oldest is deleted."""
    from pipeline import costs
    from pipeline.model.gpt_config import gpt2_config

    parameters = costs.parameter_count(gpt2_config(config.model, objective=config.objective.kind))
    one = costs.state_bytes(config.ema.decay) * parameters
    existing = len(list((run / "checkpoints").glob("step-*[0-9]")))
    return float(one * max(1, config.checkpoint.keep_last + 1 - existing))


def _digest_of(config: TrainConfig, run: Path) -> str | None:
    """The digest that the shard set of the run must have; None with a mixture, whose sets may change."""
    record = read_json(run / "run.json") if (run / "run.json").is_file() else {}
    shards = record.get("shards") if isinstance(record, dict) else None
    if config.data.mixture is not None or not isinstance(shards, dict) or "mixture" in shards:
        return None
    return shards.get("digest")
