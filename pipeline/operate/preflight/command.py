"""python -m pipeline preflight: looks at the nodes of a job before it trains on them.

srun starts it once on each node; what they print goes to one that judges. Both take the options of `train`.
"""

import logging
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

from data_prep.common.command_line import fill, new_parser
from data_prep.common.exit_codes import USER_ERROR
from data_prep.common.files import read_json
from pipeline.command_line import parse_run
from pipeline.config import TrainConfig
from pipeline.operate.preflight.node_checks import look
from pipeline.operate.preflight.report import read_line
from pipeline.operate.preflight.verdict import judge

logger = logging.getLogger(__name__)


def preflight_command(arguments: list[str]) -> int:
    """Prints one node's report, or with --judge one word on all of them: sound, again, exclude NODES or doubt NODES.

    Raises ValueError for a user's mistake, and with --judge for a fault that all nodes share.
    """
    parser = new_parser("python -m pipeline preflight", "Health checks of a job's nodes; options are train's.")
    parser.add_argument("--nodes", type=str, required=True, help="Names of the job's nodes, with commas.")
    parser.add_argument("--accelerators", type=int, default=0, help="That each node should have.")
    parser.add_argument("--seconds", type=float, default=60, help="For the all-reduce between all nodes.")
    parser.add_argument("--judge", action="store_true", help="Read the nodes' reports on standard input.")
    try:
        parsed = parse_run(parser, arguments)
    except ValueError:
        if "--judge" in arguments:
            raise
        return USER_ERROR  # the judge has the same options, and says it once
    config, run, nodes = fill(TrainConfig, parsed), Path(parsed.run), parsed.nodes.split(",")
    if parsed.judge:
        return _judge(config, run, nodes, sys.stdin)
    node = os.environ.get("SLURMD_NODENAME", platform.node())
    if node not in nodes:
        raise ValueError(f"--nodes is {parsed.nodes}; it must name this node too, {node}.")
    print(look(node, nodes, run, config.data.shards, parsed.accelerators, parsed.seconds).line(), flush=True)
    return 0


def _judge(config: TrainConfig, run: Path, nodes: list[str], lines: Iterable[str]) -> int:
    needed, digest = _needed_bytes(config, run), _digest_of(run)  # while the nodes are being looked at
    reports = [report for report in map(read_line, lines) if report is not None]
    verdict = judge(reports, nodes, needed, digest)
    for node, sentence in verdict.bad.items():
        logger.warning(f"preflight: {node} is excluded: {sentence}")
    if verdict.doubtful:
        logger.warning(
            f"preflight: the all-reduce between {' and '.join(verdict.doubtful)} fails, and without a third node the "
            f"faulty one can't be told from the other"
        )
    if verdict.again:
        logger.warning(f"preflight: {verdict.again}")
    seconds = max((report.seconds for report in reports), default=0.0)
    logger.info(f"preflight: {len(nodes)} nodes in {seconds:.1f} s: {verdict.word}")
    print(verdict.word)
    return 0


def _needed_bytes(config: TrainConfig, run: Path) -> float:
    """Of checkpoints that are still to be written before the oldest is deleted."""
    from pipeline import costs
    from pipeline.model.gpt import gpt2_config

    one = costs.STATE_BYTES * costs.parameter_count(gpt2_config(config.model, objective=config.objective.kind))
    kept = len(list((run / "checkpoints").glob("step-*[0-9]")))
    return float(one * max(1, config.checkpoint.keep_last + 1 - kept))


def _digest_of(run: Path) -> str | None:
    record = read_json(run / "run.json") if (run / "run.json").is_file() else {}
    shards = record.get("shards") if isinstance(record, dict) else None
    return shards.get("digest") if isinstance(shards, dict) else None
