"""python -m tests.pipeline.train.several FILE: trains one run after the other in one process, which starts but once.

FILE: JSON, for each run the arguments of `python -m pipeline train`.
"""

import json
import os
import sys
from pathlib import Path

from pipeline.__main__ import train

for arguments in json.loads(Path(sys.argv[1]).read_text()):
    code = train(arguments)
    sys.stdout.flush()
    if code:
        os._exit(code)
os._exit(0)  # as the command line does, once a process group was started
