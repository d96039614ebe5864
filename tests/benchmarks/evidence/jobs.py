"""The commands that `make evidence` runs, and which of them needs which.

Each model is one trunk at a constant learning rate, and a decay branch off it for each number of images: 16,000,
32,000, 64,000 and so on. A finished model is the end of a branch. A longer `--images` continues the trunks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BATCH = 32
SHORTEST = 16_000
"""Images of the shortest finished model; the others double it."""
DECAY_SHARE = 0.2
"""Share of its images over which a branch decays."""
EVALUATION = ("--train_images", "10000", "--valid_images", "5000", "--test_images", "10000", "--precision", "bf16")
"""Labelled images of the linear probes and of fine-tuning, and the precision of their forward passes."""
FINE_TUNE = (
    "--fine_tune.learning_rates", "[0.001]", "--fine_tune.epochs", "4", "--fine_tune.reflect_crop", "2",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A recipe in configs/cifar10/ with a seed."""

    recipe: str
    seed: int = 0

    @property
    def name(self) -> str:
        """The first part of the names of its runs and results."""
        return self.recipe + (f"-seed{self.seed}" if self.seed else "")


LARGEST = Model("next_color_2.9m")
MASKED = Model("masked_color_1.3m")
FINE_TUNED = (Model("next_color_1.3m"), MASKED)
SIZES = (Model("next_color_0.1m"), Model("next_color_0.4m"), Model("next_color_1.3m"), LARGEST)
SECOND_SEEDS = (Model("next_color_0.1m", 1), Model("next_color_0.4m", 1))
"""Of the sizes that cost little."""


@dataclass(frozen=True)
class Job:
    """One command, `python -m pipeline ARGUMENTS`."""

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = field(default=())
    """Names of the jobs that have to be finished before."""
    inputs: tuple[Path, ...] = field(default=())
    """Files that must not change once the job was started: the recipe, and the manifest of the shard set."""


@dataclass(frozen=True)
class Places:
    """The shard set, and the folders that the jobs write."""

    shards: Path
    out: Path

    def trunk(self, model: Model) -> Path:
        """The run at a constant rate."""
        return self.out / "runs" / f"{model.name}-trunk"

    def branch(self, model: Model, images: int) -> Path:
        """The decay branch that ends at a number of images, those of the trunk included."""
        return self.out / "runs" / f"{model.name}-{images}"

    def results(self, model: Model, images: int) -> Path:
        """The evaluation of a branch's end."""
        return self.out / "results" / f"{model.name}-{images}"


def lengths(images: int) -> list[int]:
    """The numbers of images of finished models up to `images`.

    Raises ValueError if `images` is not one of them, or the shortest: a scaling law needs several.
    """
    found = [SHORTEST, 2 * SHORTEST]
    while found[-1] < images:
        found.append(2 * found[-1])
    if found[-1] != images:
        raise ValueError(f"--images is {images}; it must be {SHORTEST} times 2, 4, 8 and so on, such as 64000.")
    return found


def recipe(model: Model) -> Path:
    """Its YAML file, from the root of the repository."""
    return Path(f"configs/cifar10/{model.recipe}.yaml")


def trained_steps(arguments: Sequence[str]) -> int:
    """The steps that a trunk's arguments name; 0 for none."""
    return int(arguments[arguments.index("--schedule.steps") + 1]) if "--schedule.steps" in arguments else 0


def branch_step(images: int) -> int:
    """The trunk's step at which the branch of a length begins."""
    return round(images * (1 - DECAY_SHARE) / BATCH)


def all_jobs(places: Places, images: int) -> list[Job]:
    """All jobs, each after those it needs; the longest chains first."""
    ends = lengths(images)
    models = [LARGEST, *(model for model in SIZES if model != LARGEST), MASKED, *SECOND_SEEDS]
    jobs = [_trunk(places, model, images) for model in models]
    for model in models:
        own = ends if model in (*SIZES, *SECOND_SEEDS) else ends[-1:]
        jobs += [_branch(places, model, length) for length in own]
    jobs += [of(places, model, images) for model in (*SIZES, MASKED) for of in (_random_weights, _probe)]
    jobs += [_fine_tune(places, model, images) for model in FINE_TUNED]
    jobs += [_from_scratch(places, FINE_TUNED[0], images)]
    return [*jobs, *_summaries(places, ends)]


def _train(places: Places, model: Model, run: Path, *options: object) -> tuple[str, ...]:
    words = ("train", "--config", recipe(model), "--data.shards", places.shards, "--run", run, "--seed", model.seed)
    return tuple(map(str, (*words, *options)))


def _trunk(places: Places, model: Model, images: int) -> Job:
    run = places.trunk(model)
    inputs = (recipe(model), places.shards / "shards.json")
    return Job(run.name, _train(places, model, run, "--schedule.steps", branch_step(images)), inputs=inputs)


def _branch(places: Places, model: Model, images: int) -> Job:
    run, trunk, start = places.branch(model, images), places.trunk(model), branch_step(images)
    steps = images // BATCH - start
    options = (
        "--start.path", trunk / "checkpoints" / f"step-{start:08d}",
        "--start.moments", "true", "--start.position", "true",
        "--schedule.steps", steps, "--schedule.warmup_steps", 0, "--schedule.decay", "linear",
        "--probe.every_steps", steps, "--validation.every_steps", steps, "--checkpoint.every_steps", steps,
    )  # fmt: skip
    return Job(run.name, _train(places, model, run, *options), (trunk.name,), (recipe(model),))


def _evaluate(places: Places, model: Model, images: int, task: str, out: Path, *options: str) -> tuple[str, ...]:
    words = ("evaluate", places.branch(model, images), "--shards", places.shards, "--tasks", task, "--out", out)
    return tuple(map(str, (*words, *EVALUATION, *options)))


def _probe(places: Places, model: Model, images: int) -> Job:
    branch, out = places.branch(model, images), places.results(model, images)
    needs = (branch.name, f"probe-{model.name}-random")  # the report then has a column of random weights
    return Job(f"probe-{branch.name}", _evaluate(places, model, images, "linear_probe", out), needs)


def _random_weights(places: Places, model: Model, images: int) -> Job:
    branch, out = places.branch(model, images), places.results(model, images) / "random_weights"
    words = _evaluate(places, model, images, "linear_probe", out, "--weights", "random")
    return Job(f"probe-{model.name}-random", words, (branch.name,))


def _fine_tune(places: Places, model: Model, images: int) -> Job:
    branch, out = places.branch(model, images), places.results(model, images)
    words = _evaluate(places, model, images, "fine_tune", out, *FINE_TUNE)
    return Job(f"fine-tune-{branch.name}", words, (branch.name, f"probe-{branch.name}"))


def _from_scratch(places: Places, model: Model, images: int) -> Job:
    branch, out = places.branch(model, images), places.results(model, images) / "random_weights"
    words = _evaluate(places, model, images, "fine_tune", out, "--weights", "random", *FINE_TUNE)
    return Job(f"fine-tune-{model.name}-random", words, (branch.name, f"probe-{model.name}-random"))


def _summaries(places: Places, ends: list[int]) -> Iterator[Job]:
    """The scaling law of the finished models, and their accuracy against their loss."""
    runs = [places.branch(model, length) for model in (*SIZES, *SECOND_SEEDS) for length in ends]
    words = ("scaling", *runs, "--points", "decayed", "--out", places.out / "scaling")
    yield Job("scaling", tuple(map(str, words)), tuple(run.name for run in runs))
    results = [places.results(model, ends[-1]) for model in SIZES]
    probes = tuple(f"probe-{places.branch(model, ends[-1]).name}" for model in SIZES)
    words = ("compare", *results, "--accuracy", "test", "--out", places.out / "compare")
    yield Job("compare", tuple(map(str, words)), probes)
