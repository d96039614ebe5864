"""Takes turns at preparing images: python -m tests.benchmarks.peers.preparing HOW IMAGES PALETTE SIDE [ADDRESS]

A turn stores the images of IMAGES/train/<class>/*, or of the tars IMAGES/*.tar, as training samples of SIDE x SIDE
pixels, in an empty folder, with one process. ADDRESS: where a server has IMAGES. What each HOW stores is said in its
function. The peers' packages are imported before the first turn.
"""

import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tests.benchmarks.peers.turn import cpu_seconds, serve

Prepare = Callable[[Path], None]
DOWNLOADS = 10
"""Of each image by img2dataset, so that they take longer than its start."""
BATCH = 100
"""Images that a processor is given at once."""


def ours(images: Path, palette: Path, side: int, address: str) -> Prepare:
    """Tokens in shards, by the code of `python -m data_prep shards`."""
    return _ours("image_folder", images, palette, side)


def ours_tars(images: Path, palette: Path, side: int, address: str) -> Prepare:
    """The same from the tars in IMAGES."""
    return _ours("webdataset", images, palette, side)


def _ours(kind: str, images: Path, palette: Path, side: int) -> Prepare:
    from data_prep.build.build import prepare_shards
    from data_prep.build.parts import Part
    from data_prep.config import DataConfig, PaletteConfig, SourceConfig

    config = DataConfig(
        source=SourceConfig(kind=kind, path=str(images)),  # type: ignore[arg-type]
        palette=PaletteConfig(file=str(palette)),
        resolution=side,
        workers=1,
    )
    return lambda out: prepare_shards(config, out / "set", Part())


def decoding(images: Path, palette: Path, side: int, address: str) -> Prepare:
    """Stores nothing: libjpeg-turbo decodes each file at its full size."""
    import simplejpeg

    files = sorted(images.glob("train/*/*"))

    def decode(_: Path) -> None:
        for file in files:
            simplejpeg.decode_jpeg(file.read_bytes(), "RGB", fastdct=False, fastupsample=False)

    return decode


def litdata_pixels(images: Path, palette: Path, side: int, address: str) -> Prepare:
    """uint8 pixels in chunks, without a palette: less than ours."""
    return _litdata(images, _Resized(side))


def litdata_tokens(images: Path, palette: Path, side: int, address: str) -> Prepare:
    """Tokens in chunks, by ImageGPTImageProcessor."""
    return _litdata(images, _Tokens(_processor(palette, side)))


def _litdata(images: Path, function: Callable[[str], Any]) -> Prepare:
    from litdata import optimize

    files = sorted(str(file) for file in images.glob("train/*/*"))

    def store(out: Path) -> None:
        options = {"chunk_bytes": "64MB", "num_workers": 1, "start_method": "fork"}  # its default starts Python anew
        optimize(fn=function, inputs=files, output_dir=str(out / "set"), **options)

    return store


class _Resized:
    """A file's pixels uint8 (side, side, 3) and class: the center, as our square images are cut."""

    def __init__(self, side: int) -> None:
        self._side = side

    def __call__(self, file: str) -> Mapping[str, Any]:
        return {"pixels": np.asarray(_square(file, self._side)), "class": Path(file).parent.name}


class _Tokens:
    """A file's tokens uint16 (side * side,) and class."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, file: str) -> Mapping[str, Any]:
        side = self._processor.size["height"]
        tokens = self._processor(_square(file, side), do_resize=False)["input_ids"][0]
        return {"tokens": np.asarray(tokens).astype(np.uint16).reshape(-1), "class": Path(file).parent.name}


def _square(file: str, side: int) -> Any:
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        return ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)


def datasets_map(images: Path, palette: Path, side: int, address: str) -> Prepare:
    """Tokens in Arrow files, by datasets.map with ImageGPTImageProcessor on batches of images."""
    from datasets import ClassLabel, Features, Sequence, Value, load_dataset

    processor = _processor(palette, side)
    count = len({file.parent.name for file in images.glob("train/*/*")})
    features = Features({"tokens": Sequence(Value("uint16")), "label": ClassLabel(num_classes=count)})

    def tokens(batch: dict[str, list[Any]]) -> dict[str, Any]:
        whole = [image.convert("RGB") for image in batch["image"]]
        found = processor(whole)["input_ids"]
        return {"tokens": [np.asarray(one).astype(np.uint16).reshape(-1) for one in found], "label": batch["label"]}

    def store(out: Path) -> None:
        loaded = load_dataset(
            "imagefolder", data_dir=str(images / "train"), split="train", cache_dir=str(out / "cache")
        )
        loaded.map(
            tokens,
            batched=True,
            batch_size=BATCH,
            remove_columns=["image"],
            features=features,
            cache_file_name=str(out / "tokens.arrow"),
        )

    return store


def _processor(palette: Path, side: int) -> Any:
    """The processor for torchvision, which is faster than the one for Pillow, where torchvision is installed."""
    from tests.benchmarks.peers.torchvision_operators import declare_operators

    declare_operators()
    from transformers import ImageGPTImageProcessor

    return ImageGPTImageProcessor(clusters=np.load(palette), size={"height": side, "width": side})


def img2dataset(images: Path, palette: Path, side: int, address: str) -> Prepare:
    """JPEGs of the wanted size in webdataset tars, downloaded from a server on this machine: less than ours.

    Each image is downloaded DOWNLOADS times.
    """
    return _downloads(sorted(images.glob("train/*/*")) * DOWNLOADS, images, side, address)


def img2dataset_start(images: Path, palette: Path, side: int, address: str) -> Prepare:
    """One download."""
    return _downloads(sorted(images.glob("train/*/*"))[:1], images, side, address)


def _downloads(files: list[Path], images: Path, side: int, address: str) -> Prepare:
    from img2dataset import download

    def store(out: Path) -> None:
        (out / "addresses.txt").write_text("".join(f"{address}/{file.relative_to(images)}\n" for file in files))
        download(
            url_list=str(out / "addresses.txt"),
            input_format="txt",
            output_folder=str(out / "set"),
            output_format="webdataset",
            image_size=side,
            resize_mode="center_crop",
            processes_count=1,
            thread_count=16,
        )
        stored = 0
        for file in (out / "set").glob("*.tar"):
            with tarfile.open(file) as tar:
                stored += sum(name.endswith(".jpg") for name in tar.getnames())
        if stored != len(files):
            raise ValueError(f"{stored} of {len(files)} images were stored")

    return store


WAYS = {
    one.__name__: one
    for one in (
        *(ours, ours_tars, decoding),
        *(litdata_pixels, litdata_tokens, datasets_map, img2dataset, img2dataset_start),
    )
}


def _count(images: Path) -> int:
    count = sum(1 for _ in images.glob("train/*/*"))
    for file in images.glob("*.tar"):
        with tarfile.open(file) as tar:
            count += len(tar.getmembers())
    return count


def main(how: str, images: str, palette: str, side: str, address: str = "") -> None:
    """Takes turns."""
    arguments = Path(images), Path(palette), int(side), address
    prepare, count = WAYS[how](*arguments), _count(Path(images))

    def turn() -> dict[str, float]:
        return {"work": float(count), **_cost(prepare, Path(palette).parent)}

    serve(without_start(arguments, count * DOWNLOADS) if how == "img2dataset" else turn)


def without_start(arguments: tuple[Path, Path, int, str], count: int) -> Callable[[], dict[str, float]]:
    """A turn of img2dataset less a turn of one download, because its start takes as long as thousands of images."""
    start, whole = (WAYS[way](*arguments) for way in ("img2dataset_start", "img2dataset"))

    def turn() -> dict[str, float]:
        one, all_of_them = (_cost(prepare, arguments[1].parent) for prepare in (start, whole))
        if all_of_them["cpu_seconds"] < 1.2 * one["cpu_seconds"]:
            raise ValueError(f"{count} images took {all_of_them['cpu_seconds']:.1f} s, one {one['cpu_seconds']:.1f}")
        return {"work": float(count - 1), **{name: all_of_them[name] - one[name] for name in one}}

    return turn


def _cost(prepare: Prepare, folder: Path) -> dict[str, float]:
    began, used = time.perf_counter(), cpu_seconds()
    with TemporaryDirectory(dir=folder) as out:
        prepare(Path(out))
    return {"seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - used}


if __name__ == "__main__":
    main(*sys.argv[1:])
