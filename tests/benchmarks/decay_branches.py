"""Three decay branches off one trunk beside three cosine runs of the same lengths: losses, cost and a figure.

    python -m tests.benchmarks.decay_branches --shards out/cifar10-16 --out out/branches

Half an hour on one core. Finished runs are not repeated, and an interrupted one resumes.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pipeline.checkpoint.metrics_log import read_last_row, read_rows

CONFIG = "configs/cifar10/decay_branches.yaml"
LENGTHS = (500, 1000, 2000)
"""Steps of a cosine run, and of the trunk and a branch together."""
DECAY = 0.2
"""Share of a length over which a branch decays."""
SMOOTHED = 25
"""Steps whose mean training loss is drawn."""
STYLES = {
    "trunk": ("0.5", "-", "trunk, constant rate"),
    "branch": ("C0", "-", "branches, linear decay"),
    "cosine": ("C1", "--", "cosine runs"),
}
"""Color, line and label of each kind of run."""


def branch_point(length: int) -> int:
    """The trunk's step at which the branch of a length begins."""
    return round(length * (1 - DECAY))


def commands(shards: str, out: Path) -> dict[str, list[str]]:
    """The options of each run by its name; the trunk comes before its branches."""
    runs = {f"cosine-{n}": ["--schedule.decay", "cosine", "--schedule.steps", str(n)] for n in LENGTHS}
    runs["trunk"] = []
    for length in LENGTHS:
        start = out / "trunk/checkpoints" / f"step-{branch_point(length):08d}"
        runs[f"branch-{length}"] = [
            *("--start.path", str(start), "--start.moments", "true", "--start.position", "true"),
            *("--schedule.steps", str(length - branch_point(length)), "--schedule.warmup_steps", "0"),
            *("--schedule.decay", "linear"),
        ]
    base = ["--config", CONFIG, "--data.shards", shards]
    return {name: [*base, "--run", str(out / name), *options] for name, options in runs.items()}


def losses(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images seen, and the training loss smoothed over SMOOTHED steps: float64 (n,) each."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    images, loss = (np.array([row[key] for row in rows], np.float64) for key in ("images", "loss"))
    count = len(loss) // SMOOTHED * SMOOTHED
    return images[:count].reshape(-1, SMOOTHED)[:, -1], loss[:count].reshape(-1, SMOOTHED).mean(axis=1)


def last_valid_loss(run: Path) -> float:
    """Nats per token at the end of a run."""
    row = read_last_row(run / "metrics.jsonl", "valid_loss")
    assert row is not None
    return float(row["valid_loss"])


def draw(out: Path, path: Path) -> None:
    """Training losses over images, with the validation losses at the ends as points."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name in ("trunk", *(f"{kind}-{length}" for length in LENGTHS for kind in ("cosine", "branch"))):
        color, line, _ = STYLES[name.partition("-")[0]]
        images, loss = losses(out / name)
        axes.plot(images, loss, color=color, linestyle=line, linewidth=1)
        if name != "trunk":
            axes.plot(images[-1], last_valid_loss(out / name), "o", color=color, markersize=5)
    for color, line, label in STYLES.values():
        axes.plot([], [], color=color, linestyle=line, label=label)
    axes.set(xlabel="images seen", ylabel="nats per token", ylim=(2.7, 3.6))
    axes.legend(title="training loss; points: validation loss", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Runs what is not finished, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.decay_branches", description=__doc__)
    parser.add_argument("--shards", required=True, help="A shard set of CIFAR-10 at 16x16.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of the runs and of decay_branches.png.")
    options = parser.parse_args()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for words in commands(options.shards, options.out).values():
        subprocess.run([sys.executable, "-m", "pipeline", "train", *words], check=True, env=environment)
    print("\n| images | cosine | branch | difference | own steps: cosine | branch |\n|---|---|---|---|---|---|")
    for length in LENGTHS:
        cosine, branch = (last_valid_loss(options.out / f"{kind}-{length}") for kind in ("cosine", "branch"))
        row = f"{32 * length:,} | {cosine:.4f} | {branch:.4f} | {branch - cosine:+.4f}"
        print(f"| {row} | {length:,} | {length - branch_point(length):,} |")
    steps = branch_point(LENGTHS[-1]) + sum(length - branch_point(length) for length in LENGTHS)
    print(f"\nSteps in all: {sum(LENGTHS):,} of cosine runs; {steps:,} of the trunk and its branches.")
    draw(options.out, options.out / "decay_branches.png")
    print(f"Figure: {options.out / 'decay_branches.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
