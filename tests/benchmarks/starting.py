"""From the command to the first step, fresh and resumed, by the run's own words: python -m tests.benchmarks.starting

iGPT-S (76M parameters) at 16x16 on one rank.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.launch import run

WORDS = re.compile(r"the first step ended ([\d.]+) s after the command started \((.*)\)")


def table(folder: Path) -> Iterator[str]:
    """Lines: the phases of each start."""
    options = ["--source.kind=photographs", "--resolution", 16, "--out", folder / "shards"]
    assert run(1, "-m", "data_prep", "shards", *options, logs=folder / "logs").codes == [0]
    for number, name in enumerate(("fresh", "resumed"), 1):
        total, phases = start(folder, number)
        if number == 1:
            yield f"| start | s to the first step | {' | '.join(phases)} |"
            yield "|---" * (len(phases) + 2) + "|"
        yield f"| {name} | {total} | {' | '.join(phases.values())} |"


def start(folder: Path, steps: int) -> tuple[str, dict[str, str]]:
    """Trains to that step; seconds to the first step of this start, in all and by phase."""
    keys = {
        "model.resolution": 16, "schedule.steps": steps, "schedule.warmup_steps": 0, "batch.global_size": 1,
        "batch.micro_size": 1, "validation.images": 1, "checkpoint.every_steps": 1, "samples.every_steps": 0,
    }  # fmt: skip
    overrides = [f"--{key}={value}" for key, value in keys.items()]
    own = ["--config", "configs/igpt_s.yaml", "--run", folder / "run", "--data.shards", folder / "shards", *overrides]
    done = run(1, "-m", "pipeline", "train", *own, logs=folder / "logs")
    found = WORDS.search(done.output)
    assert found, done.output
    return found[1], dict(phase.rsplit(" ", 1) for phase in found[2].split(", "))


def main() -> None:
    """The table."""
    with TemporaryDirectory() as folder:
        for line in table(Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
