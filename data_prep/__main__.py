"""python -m data_prep palette | shards | join | verify | show"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.common.command_line import dispatch, fill, new_parser, parse

logger = logging.getLogger("data_prep")

if TYPE_CHECKING:
    from data_prep.build.parts import Part
    from data_prep.config import DataConfig


def palette(arguments: list[str]) -> None:
    """Fits a palette."""
    configured = _configured("palette", "Fits a palette to a source's training images.", arguments)
    from data_prep.palette.command import prepare_palette

    prepare_palette(*configured)


def shards(arguments: list[str]) -> None:
    """Prepares a shard set."""
    description = "Prepares a shard set. Run the same command again after an interruption: it keeps complete shards."
    configured = _configured("shards", description, arguments)
    from data_prep.build.build import prepare_shards

    prepare_shards(*configured)


def _configured(command: str, description: str, arguments: list[str]) -> tuple["DataConfig", Path, "Part"]:
    from data_prep.build.parts import Part
    from data_prep.config import DataConfig
    from data_prep.sources.registry import SOURCES

    kinds = "; ".join(f"{name} ({kind.reads})" for name, kind in SOURCES.items())
    parser = new_parser(f"python -m data_prep {command}", f"{description} Values of source.kind: {kinds}.")
    parser.add_argument("--config", action="config", help="YAML file, such as configs/data/cifar10.yaml")
    parser.add_argument("--out", type=str, required=True, help="file or folder to write")
    parser.add_argument("--part", type=int, default=1, help="number of the part to prepare, from 1 to --parts")
    parser.add_argument("--parts", type=int, default=1, help="number of parts; `join` joins them")
    parser.add_class_arguments(DataConfig, skip={"exclude"})
    parser.add_argument(
        "--exclude",
        type=str,
        nargs="+",
        action="extend",
        default=[],
        metavar="SHARDS_OR_FOLDER",
        help="shard sets, whose split test counts, and folders of images: near-duplicates of their images are not "
        "stored in train, nor in a valid that is held out of it",
    )
    options = parse(parser, arguments)
    return fill(DataConfig, options), Path(options.out), Part(options.part, options.parts)


def join(arguments: list[str]) -> None:
    """Joins parts."""
    parser = new_parser("python -m data_prep join", "Joins the parts of a shard set or of a palette.")
    parser.add_argument("out", type=str, help="--out of the parts: folder of the shard set, or file of the palette")
    parser.add_argument(
        "--max_skipped",
        type=float | None,
        help="largest share of images and tars that may be skipped; default: the parts'",
    )
    options = parse(parser, arguments)
    from data_prep.build.merge import join_shards
    from data_prep.palette.command import has_parts, join_palette

    if has_parts(Path(options.out)):
        join_palette(Path(options.out))
    else:
        join_shards(Path(options.out), options.max_skipped)


def verify(arguments: list[str]) -> None:
    """Verifies a shard set."""
    parser = new_parser("python -m data_prep verify", "Reads a complete shard set and compares it with its manifest.")
    parser.add_argument("shards", type=str, help="folder or URL of the shard set")
    options = parse(parser, arguments)
    from data_prep.common.progress import progress
    from data_prep.shards.overlap import Overlap, token_digests
    from data_prep.shards.reader import open_shard_set

    shard_set, overlap = open_shard_set(options.shards), Overlap()
    sizes = {name: shard_set.split(name).images for name in shard_set.splits}
    train_last = sorted(sizes, key=lambda name: name == "train")
    with progress("verify", sum(sizes.values()), "images") as advance:
        shard_set.verify(train_last, advance, lambda name, tokens: overlap.add(name, token_digests(tokens)))
    counts = ", ".join(f"{name} {images:,}" for name, images in sizes.items())
    logger.info(f"{shard_set.path}: matches its manifest ({counts} images; digest {shard_set.digest})")
    for name, images in overlap.counts().items():
        logger.info(
            f"{shard_set.path}: {images:,} of {sizes[name]:,} images of {name} are also in train (equal tokens)"
        )


def show(arguments: list[str]) -> None:
    """Draws a grid of images."""
    parser = new_parser(
        "python -m data_prep show",
        "Draws labelled images of a shard set, next to the source images where the source is available.",
    )
    parser.add_argument("shards", type=str, help="folder or URL of the shard set")
    parser.add_argument("--split", type=str, default="train", help="train, valid or test")
    parser.add_argument("--images", type=int, default=40, help="number of images, from the start of the split")
    parser.add_argument("--out", type=str, required=True, help="PNG file to write")
    options = parse(parser, arguments)
    from data_prep.preview import draw

    draw(options.shards, options.split, options.images, Path(options.out))


if __name__ == "__main__":
    dispatch(
        "data_prep",
        "Images to shard sets.",
        {
            "palette": ("fit a palette to a source's training images", palette),
            "shards": ("prepare a shard set", shards),
            "join": ("join the parts of a shard set or of a palette", join),
            "verify": ("compare a shard set with its manifest", verify),
            "show": ("draw a labelled grid of a shard set's images", show),
        },
    )
