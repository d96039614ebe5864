"""Completions: the lower halves of pictures drawn anew, as a task and as `python -m pipeline complete`.

The task also says how far completions are from true pictures (completion_distance.py). JSON: `split`, `images` (the
numbers of the pictures shown), `classes`, `samples`, `temperature`, `seed`, and `distance` as completion_distance.py
describes it, or null.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_prep.common.command_line import new_parser, parse
from data_prep.common.files import atomic_write, file_sha256
from data_prep.common.seeding import generator
from data_prep.shards.reader import ShardSet, open_shard_set
from pipeline.evaluate.context import Evaluation, check_match, from_first, split_labels, start_accelerator
from pipeline.model.image_grid import completion_grid
from pipeline.results.headline import Headline
from pipeline.results.report.html import figure, note, table

if TYPE_CHECKING:
    from pipeline.model_folder.convert import LoadedModel

FIGURE = "completions.png"
TITLE_PIXELS = 22
"""Height of the strip of titles above the grid, and of the caption below it."""
GREY = (70, 70, 70)
CANT_COMPLETE = (
    "completions need a model of the next colour, but this one was trained with masked_color: it says hidden colours "
    "from all others and draws no sequence; leave completions out."
)


@dataclass(frozen=True, kw_only=True)
class Shown:
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


@dataclass(frozen=True, kw_only=True)
class Options(Shown):
    """Half pictures completed, and how far completions are from true pictures."""

    distance_images: int = 1000
    """Complete so many more pictures for the Fréchet distance; half the split if it has fewer; 0 leaves it out."""
    feature_network: str | None = None
    """A TorchScript file of a network to compare features of, such as Inception; EfficientNet-Lite0 if not set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distance_images < 0 or self.distance_images == 1:
            raise ValueError(f"distance_images is {self.distance_images}; it must be 0, or 2 and above.")
        if self.feature_network is not None and not Path(self.feature_network).is_file():
            raise ValueError(
                f"feature_network is {self.feature_network}, which is no file; give a TorchScript network."
            )


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


def draw_completions(model: "LoadedModel", shards: ShardSet, options: Shown, seed: int, path: Path) -> dict[str, Any]:
    """Writes the grid of completions as a PNG, and returns what it shows."""
    from PIL import Image

    from pipeline.model.sampling import complete_halves

    chosen = choose_examples(shards, options.split, options.images, seed)
    tokens, labels = shards.split(options.split).gather(chosen)
    drawn = complete_halves(model.model, tokens, samples=options.samples, seed=seed, temperature=options.temperature)
    columns = ["given half", *(f"sample {number}" for number in range(1, options.samples + 1)), "original"]
    caption = f"{options.split}, seed {seed}, temperature {options.temperature:g}"
    grid = with_titles(completion_grid(tokens, drawn, shards.palette, shards.resolution), columns, caption)
    with atomic_write(path) as temporary:
        Image.fromarray(grid).save(temporary, format="png")
    return {
        "split": options.split,
        "images": chosen.tolist(),
        "classes": [shards.classes[label] if label >= 0 else None for label in labels],
        "samples": options.samples,
        "temperature": options.temperature,
        "seed": seed,
    }


def with_titles(grid: np.ndarray, columns: list[str], caption: str) -> np.ndarray:
    """A grid of pictures, uint8 (height, width, 3), a small title above each column of equal width, a caption below."""
    from PIL import Image, ImageDraw, ImageFont

    height, width, _ = grid.shape
    page = Image.new("RGB", (width, height + 2 * TITLE_PIXELS), "white")
    page.paste(Image.fromarray(grid), (0, TITLE_PIXELS))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=TITLE_PIXELS * 0.6)
    for number, title in enumerate(columns):
        place = ((number + 0.5) * width / len(columns), TITLE_PIXELS * 0.6)
        pen.text(place, title, fill=GREY, font=font, anchor="mm")
    pen.text((TITLE_PIXELS * 0.3, height + TITLE_PIXELS * 1.5), caption, fill=GREY, font=font, anchor="lm")
    return np.asarray(page)


def unfit(evaluation: Evaluation, _options: Options) -> str | None:
    """Why this model can't complete pictures."""
    return CANT_COMPLETE if evaluation.masked else None


def check(evaluation: Evaluation, options: Options, _coming: list[str]) -> None:
    """Raises ValueError if the split has too few pictures, or the user's network does not take such pictures."""
    choose_examples(evaluation.shards, options.split, options.images, evaluation.seed)
    if not options.distance_images:
        return
    from pipeline.evaluate.metrics.completion_distance import compared

    compared(evaluation, options.split, options.distance_images)
    if options.feature_network is not None:
        import torch

        from pipeline.evaluate.metrics.feature_network import feature_network

        device, side = evaluation.accelerator.device, evaluation.shards.resolution
        network = feature_network(Path(options.feature_network), device)
        network.features(torch.zeros(2, 3, side, side, dtype=torch.uint8, device=device))


def read_besides(_results: Path, options: Options) -> dict[str, str]:
    """The digest of the user's feature network."""
    return {} if options.feature_network is None else {"network_sha256": file_sha256(Path(options.feature_network))}


def measure(evaluation: Evaluation, options: Options) -> dict[str, Any]:
    """Draws `completions.png` on the first rank alone; the distance's completions are shared out among the ranks."""
    evaluation.say(f"completing {options.images} half pictures, {options.samples} times each")
    path = evaluation.results / FIGURE
    result = from_first(
        evaluation.accelerator,
        lambda: draw_completions(evaluation.model, evaluation.shards, options, evaluation.seed, path),
    )
    return result | {"distance": _distance(evaluation, options) if options.distance_images else None}


def _distance(evaluation: Evaluation, options: Options) -> dict[str, Any]:
    from pipeline.evaluate.metrics.completion_distance import completion_distance

    return completion_distance(
        evaluation, options.split, options.distance_images, options.temperature, options.feature_network
    )


def summary(result: dict[str, Any]) -> str:
    """The result in a line."""
    shown = f"{len(result['images'])} pictures, {result['samples']} samples each, in {FIGURE}"
    distance = result["distance"]
    if distance is None:
        return shown
    return (
        f"{shown}; Fréchet distance of {distance['images']} completions {distance['completions']:.3f}, of their "
        f"originals {distance['originals']:.3f}, with shuffled lower halves {distance['shuffled_lower_halves']:.3f} "
        f"({distance['network']})"
    )


def headlines(result: dict[str, Any]) -> list[Headline]:
    """For the report: the distance, between what bounds it."""
    distance = result["distance"]
    if distance is None:
        return []
    bounds = f"floor {distance['originals']:.3f}, shuffled {distance['shuffled_lower_halves']:.3f}"
    return [Headline("Fréchet distance of completions", distance["completions"], "distance", detail=bounds)]


def section(result: dict[str, Any], folder: Path) -> str:
    """For the report: the grid, and the distances."""
    caption = (
        f"The first column is what the model was given, the last the whole picture; between them are "
        f"{result['samples']} samples at temperature {result['temperature']:g}, seed {result['seed']}. Pictures of "
        f"{result['split']} chosen at random; no sample was picked by hand."
    )
    shown = figure(folder / FIGURE, "completions of half pictures", caption)
    distance = result["distance"]
    if distance is None:
        return shown
    rows = [
        ["Completions", f"{distance['completions']:.4f}"],
        ["Their originals (the floor)", f"{distance['originals']:.4f}"],
        ["Lower halves with their colours shuffled", f"{distance['shuffled_lower_halves']:.4f}"],
    ]
    completions, rows = rows[0], sorted(rows, key=lambda row: float(row[1]))
    return (
        shown
        + table(["Fréchet distance to other pictures of the split", "d²"], rows, ours=[rows.index(completions)])
        + note(
            f"{distance['images']:,} pictures completed once each, against {distance['images']:,} others of "
            f"{result['split']}; features of {distance['network']}. Distances depend on the number of pictures and on "
            "the network: they compare with each other, not with published FIDs. Against the very pictures that were "
            "completed, whose upper halves the completions share, the distance is "
            f"{distance['completions_to_their_originals']:.4f}."
        )
    )


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
    parser.add_argument("model", type=Path, help="a run, a checkpoint, a model folder, or hub:ORG/NAME")
    parser.add_class_arguments(Command)
    parser.add_class_arguments(Shown)
    values = vars(parse(parser, arguments))
    path, command = values["model"], Command(**{name: values[name] for name in Command.__dataclass_fields__})
    options = Shown(**{name: values[name] for name in Shown.__dataclass_fields__})
    if command.out.suffix.lower() != ".png":
        raise ValueError(f"--out is {command.out}; it must be a file that ends in .png.")
    shards = open_shard_set(command.shards)
    choose_examples(shards, options.split, options.images, command.seed)

    from pipeline.model_folder.convert import load_model_folder
    from pipeline.model_folder.resolve import model_folder

    folder = model_folder(path)
    model = load_model_folder(folder)
    check_match(model, folder, shards)
    if model.mask_probability is not None:
        raise ValueError(CANT_COMPLETE)
    accelerator = start_accelerator(command.precision)
    model.model.to(accelerator.device).eval()
    with accelerator.autocast():
        draw_completions(model, shards, options, command.seed, command.out)
    print(f"completions: {command.out}")
    return os.EX_OK
