"""python -m tests.pipeline.train.several_runs FILE: trains one run after the other in one process.

FILE: JSON, for each run the arguments of `python -m pipeline train`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep.common.logs import configure_logging
from pipeline.__main__ import train
from pipeline.train import loop

configure_logging()
start_group = loop.start_group
started: list[Any] = []


def start_or_meet(*arguments: Any) -> Any:
    """Starting the group is where ranks wait for each other's checks; the group of a second run has started."""
    started.extend([] if started else [start_group(*arguments)])
    dist.barrier()
    return started[0]


loop.start_group = start_or_meet
for words in json.loads(Path(sys.argv[1]).read_text()):
    code = train(words)
    sys.stdout.flush()
    if code:
        os._exit(code)
os._exit(0)  # as the command line does, once a process group was started
