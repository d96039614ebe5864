"""Pictures to shards, against the straightforward peer: Pillow and ImageGPTImageProcessor, a picture at a time."""

import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_prep.config import SourceConfig
from data_prep.decoding import Decoder
from data_prep.palette import save_palette
from data_prep.sources import open_source

PHOTOGRAPH = (500, 375)
PHOTOGRAPHS = 5_000
SMALL = 10_000
PEER_PICTURES = 600
PAGES_KEPT = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}
"""Lets the peer keep the memory of its large arrays from picture to picture. As started, glibc gives it back and
asks for it again each time, which takes most of the peer's time on CIFAR-10."""
ROOT = Path(__file__).parents[2]


class Run(NamedTuple):
    """What a preparation took."""

    pictures: int
    seconds: float
    megabytes: float
    """The largest resident set among its processes."""

    @property
    def rate(self) -> float:
        return self.pictures / self.seconds


def write_photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """JPEGs of `size`, each a window of an embedded photograph: folder/train/<class>/<number>.jpg."""
    windows = open_source(SourceConfig(kind="photographs", train_per_class=-(-count // 10))).splits["train"]
    decode = Decoder()
    for number in range(count):
        index = number * len(windows) // count
        file = folder / f"train/{windows.labels[index]}/{number:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        window = Image.fromarray(windows.picture(index, decode))
        window.resize(size, Image.Resampling.BICUBIC).save(file, quality=90)


def small_pictures(folder: Path) -> tuple[str, Path]:
    """CIFAR-10 as JPEG where the environment names its archive, else windows of photographs; and what they are."""
    archive = os.environ.get("CIFAR10_JPEG")
    if archive is None:
        write_photographs(folder, SMALL, (32, 32))
        return f"{SMALL:,} JPEGs of 32x32", folder
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return "CIFAR-10 (JPEG copy)", folder


def prepare(pictures: Path, palette: Path, out: Path, workers: int, options: Sequence[object] = ()) -> Run:
    """`python -m data_prep shards` at 32x32 with a given palette, as a user runs it."""
    command = [sys.executable, "-m", "data_prep", "shards", "--source.kind", "image_folder", "--source.path", pictures]
    command += ["--palette.file", palette, "--workers", workers, "--out", out, *options]
    began = time.perf_counter()
    program = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, command)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    count = sum(1 for _ in pictures.glob("t*/*/*"))
    return Run(count, seconds, int(done.stderr.split()[-1]) / 1024)


def peer(pictures: Path, palette: Path, **environment: str) -> float:
    """Pictures a second of the peer in a process of its own with one thread, its start not counted."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.data", pictures, palette],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    return float(done.stdout.split()[-1])


def peer_rate(pictures: Path, palette: Path) -> float:
    """Pictures a second of Pillow and ImageGPTImageProcessor in this process, one picture after the other."""
    from threadpoolctl import threadpool_limits
    from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

    processor = ImageGPTImageProcessorPil(clusters=np.load(palette), size={"height": 32, "width": 32})
    files = sorted(pictures.glob("train/*/*"))[:PEER_PICTURES]
    began = time.perf_counter()
    with threadpool_limits(1):
        for file in files:
            processor(Image.open(file).convert("RGB"))
    return len(files) / (time.perf_counter() - began)


def preparation(folder: Path) -> Iterator[str]:
    """Rows of the table: pictures a second and memory, with 1 and 2 processes."""
    palette = np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32)
    save_palette(folder / "palette.npy", palette)
    small_name, small = small_pictures(folder / "small")
    large = folder / "large"
    write_photographs(large, PHOTOGRAPHS, PHOTOGRAPH)
    large_name = f"{PHOTOGRAPHS:,} JPEGs of {PHOTOGRAPH[0]}x{PHOTOGRAPH[1]}"
    for name, pictures, options in (
        (small_name, small, []),
        (f"{large_name}, exact", large, []),
        (f"{large_name}, scaled decode", large, ["--views.scaled_decode", "true"]),
    ):
        theirs = peer(pictures, folder / "palette.npy")
        tuned = peer(pictures, folder / "palette.npy", **PAGES_KEPT)
        for workers in (1, 2):
            with TemporaryDirectory(dir=folder) as out:
                run = prepare(pictures, folder / "palette.npy", Path(out) / "set", workers, options)
            cores = f"{workers} process{'es' if workers > 1 else ''}"
            yield (
                f"| {name} | {cores} | {run.rate:,.0f} | {run.megabytes:,.0f} | "
                f"{theirs:,.0f} | {run.rate / theirs / workers:.1f} | {tuned:,.0f} | {run.rate / tuned / workers:.1f} |"
            )


HEAD = (
    "| pictures to shards at 32x32 | ours with | pictures/s | MB, largest process | "
    "Pillow + ImageGPTImageProcessor, one thread | ratio a core | the same, glibc told to keep its pages | "
    "ratio a core |\n|---|---|---|---|---|---|---|---|"
)

if __name__ == "__main__":
    print(peer_rate(Path(sys.argv[1]), Path(sys.argv[2])))
