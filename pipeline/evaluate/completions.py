"""Completions: the lower halves of pictures drawn anew, as a task and as `python -m pipeline complete`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_prep.command_line import new_parser, parse
from data_prep.files import written_aside
from data_prep.seeding import generator
from data_prep.shards import ShardSet, open_shard_set
from pipeline.evaluate.inputs import Evaluation, check_match, from_first, split_labels, start_accelerator
from pipeline.model.pictures import completion_grid

if TYPE_CHECKING:
    from pipeline.model.huggingface import LoadedModel

FIGURE = "completions.png"
TITLE_PIXELS = 22


@dataclass(frozen=True, kw_only=True)
class Options:
    """Half pictures completed."""

    images: int = 8
    """Pictures to complete, one a row."""
    samples: int = 4
    """Completions of each picture."""
    temperature: float = 1.0
    """1 samples from the model as it is, the paper's choice; 0 takes the most probable colour."""
    split: str = "test"
    """The split the pictures come from."""

    def __post_init__(self) -> None:
        for name in ("images", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or above.")


def choose_examples(shards: ShardSet, split_name: str, images: int, seed: int) -> np.ndarray:
    """Numbers of `images` random pictures of a split, of different classes as far as there are; int64 (images,).

    Raises ValueError if the split is absent or holds fewer.
    """
    split = shards.split(split_name)
    if split.images < images:
        raise ValueError(
            f"images is {images}, but {shards.path} has {split.images} pictures in its split {split_name}."
        )
    labels = split_labels(split)
    shuffled = generator(seed, "examples", split_name).permutation(split.images)
    _, first_of_class = np.unique(labels[shuffled], return_index=True)
    others = np.delete(shuffled, first_of_class)
    return np.concatenate([shuffled[np.sort(first_of_class)], others])[:images]


def draw_completions(model: "LoadedModel", shards: ShardSet, options: Options, seed: int, path: Path) -> dict[str, Any]:
    """Writes the grid of completions as a PNG, and returns what it shows."""
    from PIL import Image

    from pipeline.model.sampling import complete_halves

    chosen = choose_examples(shards, options.split, options.images, seed)
    tokens, labels = shards.split(options.split).gather(chosen)
    drawn = complete_halves(model.model, tokens, samples=options.samples, seed=seed, temperature=options.temperature)
    columns = ["given half", *(f"sample {number}" for number in range(1, options.samples + 1)), "original"]
    grid = with_titles(completion_grid(tokens, drawn, shards.palette, shards.resolution), columns)
    with written_aside(path) as aside:
        Image.fromarray(grid).save(aside, format="png")
    return {
        "split": options.split,
        "images": chosen.tolist(),
        "classes": [shards.classes[label] if label >= 0 else None for label in labels],
        "samples": options.samples,
        "temperature": options.temperature,
    }


def with_titles(grid: np.ndarray, columns: list[str]) -> np.ndarray:
    """A grid of pictures, uint8 (height, width, 3), with a small title above each column of equal width."""
    from PIL import Image, ImageDraw, ImageFont

    height, width, _ = grid.shape
    page = Image.new("RGB", (width, height + TITLE_PIXELS), "white")
    page.paste(Image.fromarray(grid), (0, TITLE_PIXELS))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=TITLE_PIXELS * 0.6)
    for number, title in enumerate(columns):
        place = ((number + 0.5) * width / len(columns), TITLE_PIXELS * 0.6)
        pen.text(place, title, fill=(70, 70, 70), font=font, anchor="mm")
    return np.asarray(page)


def measure(evaluation: Evaluation, options: Options) -> dict[str, Any]:
    """Draws `completions.png`. The first rank samples alone, so that the draws do not depend on the ranks."""
    evaluation.say(f"completing {options.images} half pictures, {options.samples} times each")
    path = evaluation.results / FIGURE
    return from_first(
        evaluation.accelerator,
        lambda: draw_completions(evaluation.model, evaluation.shards, options, evaluation.seed, path),
    )


def summary(result: dict[str, Any]) -> str:
    """The result in a line."""
    return f"{len(result['images'])} pictures, {result['samples']} samples each, in {FIGURE}"


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to complete and where the figure goes."""

    shards: str
    """The shard set whose pictures are completed: a folder or an address."""
    out: Path
    """The PNG to write."""
    seed: int = 0
    """Chooses the pictures and draws the completions."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass."""


def complete_command(arguments: list[str]) -> int:
    """`python -m pipeline complete MODEL --shards SHARDS --out FILE`. Raises ValueError for a user's mistake."""
    parser = new_parser("python -m pipeline complete", "Completes half pictures and shows them beside the originals.")
    parser.add_argument("model", type=Path, help="a run, a checkpoint, or a model folder")
    parser.add_class_arguments(Command)
    parser.add_class_arguments(Options)
    values = vars(parse(parser, arguments))
    path, command = values["model"], Command(**{name: values[name] for name in Command.__dataclass_fields__})
    options = Options(**{name: values[name] for name in Options.__dataclass_fields__})
    if command.out.suffix.lower() != ".png":
        raise ValueError(f"--out is {command.out}; it must be a file that ends in .png.")
    shards = open_shard_set(command.shards)
    choose_examples(shards, options.split, options.images, command.seed)

    from pipeline.locate import model_folder
    from pipeline.model.huggingface import load_model_folder

    folder = model_folder(path)
    model = load_model_folder(folder)
    check_match(model, folder, shards)
    accelerator = start_accelerator(command.precision)
    model.model.to(accelerator.device).eval()
    with accelerator.autocast():
        draw_completions(model, shards, options, command.seed, command.out)
    print(f"completions: {command.out}")
    return os.EX_OK
