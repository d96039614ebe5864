"""Images to shards, against the straightforward peer: Pillow and ImageGPTImageProcessor, one image at a time."""

import io
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_prep.config import SourceConfig
from data_prep.images.decode import Decoder
from data_prep.palette.codec import save_palette
from data_prep.sources.open import open_source

PHOTOGRAPH = (500, 375)
PHOTOGRAPHS = 5_000
GRAIN = 26
"""Standard deviation of the noise that makes JPEGs of 500x375 as large as ImageNet's average, 110 KB. The
windows alone are smooth, and decoding time depends on the bytes as much as on the pixels."""
WEB_SIDE, WEB_TARS, WEB_IMAGES = 256, 4, 1_000
SMALL = 10_000
PEER_IMAGES = 600
PAGES_REUSED = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}
"""Lets the peer reuse the memory of its large arrays from image to image. By default glibc returns it to the system and
requests it again each time, which takes most of the peer's time on CIFAR-10."""
ROOT = Path(__file__).parents[2]


class Run(NamedTuple):
    """The cost of one preparation."""

    images: int
    seconds: float
    core_seconds: float
    """Of all its processes together, their start included: what a machine's other work does not lengthen."""
    megabytes: float
    """The largest resident set among its processes."""

    @property
    def rate(self) -> float:
        return self.images / self.seconds

    @property
    def core_rate(self) -> float:
        return self.images / self.core_seconds


def photographs(count: int, size: tuple[int, int], grain: float = 0) -> Iterator[tuple[int, bytes]]:
    """JPEGs of `size`, each a window of an embedded photograph, with its class."""
    windows = open_source(SourceConfig(kind="photographs", train_per_class=-(-count // 10))).splits["train"]
    random = np.random.default_rng(0)
    for number in range(count):
        index = number * len(windows) // count
        window = Image.fromarray(windows.image(index, Decoder())).resize(size, Image.Resampling.BICUBIC)
        if grain:
            noisy = np.asarray(window) + random.normal(0, grain, (size[1], size[0], 3))
            window = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        content = io.BytesIO()
        window.save(content, "JPEG", quality=90)
        yield int(windows.labels[index]), content.getvalue()


def write_photographs(folder: Path, count: int, size: tuple[int, int], grain: float = 0) -> int:
    """Writes `photographs` as folder/train/<class>/<number>.jpg; their mean size in bytes."""
    total = 0
    for number, (label, content) in enumerate(photographs(count, size, grain)):
        file = folder / f"train/{label}/{number:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        total += file.write_bytes(content)
    return total // count


def write_tars(folder: Path) -> int:
    """WEB_TARS tars of WEB_IMAGES JPEGs of 256x256 with their grain, as img2dataset's; their mean size in bytes."""
    folder.mkdir()
    total = 0
    found = photographs(WEB_TARS * WEB_IMAGES, (WEB_SIDE, WEB_SIDE), GRAIN)
    for tar_number in range(WEB_TARS):
        with tarfile.open(folder / f"{tar_number:05d}.tar", "w") as tar:
            for number, (_, content) in enumerate(islice(found, WEB_IMAGES)):
                member = tarfile.TarInfo(f"{tar_number:05d}{number:04d}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                total += len(content)
    return total // (WEB_TARS * WEB_IMAGES)


def small_images(folder: Path) -> tuple[str, Path]:
    """CIFAR-10 as JPEG where the environment names its archive, else windows of photographs; and what they are."""
    archive = os.environ.get("CIFAR10_JPEG")
    if archive is None:
        write_photographs(folder, SMALL, (32, 32))
        return f"{SMALL:,} JPEGs of 32x32", folder
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return "CIFAR-10 (JPEG copy)", folder


def prepare(count: int, palette: Path, out: Path, workers: int, options: Sequence[object]) -> Run:
    """`python -m data_prep shards` on `count` images with a given palette, as a user runs it."""
    command = [sys.executable, "-m", "data_prep", "shards", "--palette.file", palette, "--out", out]
    command += ["--workers", workers, *options]
    program = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss, file=sys.stderr); sys.exit(code)"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, command)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    core_seconds, kilobytes = done.stderr.split()[-2:]
    return Run(count, time.perf_counter() - began, float(core_seconds), int(kilobytes) / 1024)


def peer(images: Path, palette: Path, **environment: str) -> float:
    """Images a CPU-second of the peer in a process of its own with one thread, its start not counted."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.data", images, palette],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    return float(done.stdout.split()[-1])


def peer_rate(images: Path, palette: Path) -> float:
    """Images a CPU-second of Pillow and ImageGPTImageProcessor in this process, one image after the other."""
    from threadpoolctl import threadpool_limits
    from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

    processor = ImageGPTImageProcessorPil(clusters=np.load(palette), size={"height": 32, "width": 32})
    files = sorted(images.glob("train/*/*"))[:PEER_IMAGES]
    began = time.process_time()
    with threadpool_limits(1):
        for file in files:
            processor(Image.open(file).convert("RGB"))
    return len(files) / (time.process_time() - began)


def preparation(folder: Path) -> Iterator[str]:
    """Rows of the table: images per second and memory, with 1 and 2 processes."""
    palette = folder / "palette.npy"
    save_palette(palette, np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32))
    small_name, small = small_images(folder / "small")
    scaled = ("--views.scaled_decode", "true")
    yield from _rows(f"{small_name} to 32x32", small, palette)
    for grain in (0, GRAIN):
        large = folder / f"large{grain}"
        size = write_photographs(large, PHOTOGRAPHS, PHOTOGRAPH, grain)
        name = f"{PHOTOGRAPHS:,} JPEGs of {PHOTOGRAPH[0]}x{PHOTOGRAPH[1]}, {size / 1000:,.0f} KB, to 32x32"
        yield from _rows(f"{name}, exact", large, palette)
        yield from _rows(f"{name}, scaled decode", large, palette, *scaled)
    size = write_tars(folder / "tars")
    name = f"{WEB_TARS} tars of {WEB_IMAGES:,} JPEGs of {WEB_SIDE}x{WEB_SIDE}, {size / 1000:,.0f} KB, to 64x64"
    options = ("--source.kind", "webdataset", "--source.path", folder / "tars", "--resolution", 64)
    for workers in (1, 2):
        run = _run(WEB_TARS * WEB_IMAGES, palette, workers, options)
        yield f"{_ours(name, workers, run)} | | | |"


def _rows(name: str, images: Path, palette: Path, *options: object) -> Iterator[str]:
    """Ours with 1 and 2 processes on a folder of images, next to the peer."""
    theirs, tuned = peer(images, palette), peer(images, palette, **PAGES_REUSED)
    count = sum(1 for _ in images.glob("t*/*/*"))
    for workers in (1, 2):
        run = _run(count, palette, workers, ("--source.kind", "image_folder", "--source.path", images, *options))
        yield (
            f"{_ours(name, workers, run)} {theirs:,.0f} | {run.core_rate / theirs:.1f} | {tuned:,.0f} | "
            f"{run.core_rate / tuned:.1f} |"
        )


def _run(count: int, palette: Path, workers: int, options: Sequence[object]) -> Run:
    with TemporaryDirectory(dir=palette.parent) as out:
        return prepare(count, palette, Path(out) / "set", workers, options)


def _ours(name: str, workers: int, run: Run) -> str:
    processes = f"{workers} process{'es' if workers > 1 else ''}"
    return f"| {name} | {processes} | {run.rate:,.0f} | {run.core_rate:,.0f} | {run.megabytes:,.0f} |"


HEAD = (
    "| images to shards | ours with | images/s | images a CPU-second | MB, largest process | "
    "Pillow + ImageGPTImageProcessor, images a CPU-second | ratio a core | "
    "the same, glibc told to keep its pages | ratio a core |\n|---|---|---|---|---|---|---|---|---|"
)

if __name__ == "__main__":
    print(peer_rate(Path(sys.argv[1]), Path(sys.argv[2])))
