"""The data tables of `make bench` beside what a user would pick instead: reading, resuming, mixtures, preparation.

Each contestant is a process with one thread, on the same images; they take five turns alternately (peers/measure.py).
Every table names what the machine allows at best beside our row, and our share of it.
"""

import contextlib
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.palette.codec import save_palette
from tests.benchmarks.data import small_images, write_photographs
from tests.benchmarks.peers import measure
from tests.benchmarks.peers.measure import Measured, Script, compare
from tests.benchmarks.peers.resuming import RANKS
from tests.benchmarks.peers.token_images import token_images
from tests.launch import ROOT, free_port

IMAGES, POSITIONS = 49_152, 32 * 32
"""Images of the token sets, and tokens of each: as many as CIFAR-10's, 101 MB."""
SHARE = 0.7
"""Of the first set in the mixture."""
PREPARED, PREPARED_LARGE = 3_000, 600
"""Images of 32x32 and of 500x375 that are prepared in a turn."""
LARGE = (500, 375)
FORMATS = {
    "ours": ("ours", None),
    "memmap": ("np.memmap, by hand", None),
    "webdataset_tars": ("webdataset", None),
    "mosaicml_streaming": ("mosaicml-streaming", "mosaicml-streaming"),
    "litdata_chunks": ("litdata", "litdata"),
}
"""The name in the tables and the environment of each module of peers/formats/."""
WORKER = "mosaicml_streaming", "litdata_chunks", "webdataset_tars"
"""Formats that can read in a process of their own, one worker; all can read in the process that trains."""


def _script(kind: str, form: str, *arguments: object, note: str = "") -> Script:
    name, environment = FORMATS[form]
    return Script(f"{name}{note}", f"tests.benchmarks.peers.{kind}", (form, *arguments), environment)


def _token_file(folder: Path, name: str, first: int = 0) -> Path:
    file = folder / f"{name}.npy"
    np.save(file, token_images(IMAGES, POSITIONS, first))
    return file


def reading(folder: Path) -> Iterator[str]:
    """Epochs of shuffled batches of 128, from files in the page cache."""
    tokens = _token_file(folder, "a")
    scripts = [_script("reading", "ours", tokens, 1), _script("reading", "memmap", tokens, 0)]
    for form in WORKER:
        scripts += [_script("reading", form, tokens, 1, note=", one worker")]
        scripts += [_script("reading", form, tokens, 0, note=", in the process")]
    measured = compare(*scripts)
    yield measure.HEAD
    yield from measure.lines("shuffled batches of 128", "Mtoken/s", measured)
    yield from measure.lines("shuffled batches of 128", "Mtoken/CPU-s", measured, per="cpu_seconds")
    yield from _copying(measured[0], tokens)


def _copying(ours: Measured, tokens: Path) -> Iterator[str]:
    """What copying the same bytes from memory to memory allows."""
    if ours.error is not None:
        return
    source = np.load(tokens)
    target, seconds = np.empty_like(source), []
    for _ in range(measure.TURNS + 1):
        began = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - began)
    limit, rate = source.size / 1e6 / statistics.median(seconds[1:]), statistics.median(ours.rates())
    yield f"\nOne copy in memory of the same bytes makes {limit:,.0f} Mtoken/s; ours reach {rate / limit:.0%} of that."


def resuming(folder: Path) -> Iterator[str]:
    """Seconds to the first batch after half an epoch, and whether the batches that follow are the same."""
    tokens = _token_file(folder, "a")
    scripts = [_script("resuming", form, tokens) for form in FORMATS]
    yield (
        "| reader | ranks | seconds to the first batch | of the next 20 global batches: same images | "
        "same images in the same order |\n|---|---|---|---|---|"
    )
    for one in compare(*scripts):
        for ranks in RANKS:
            yield f"| {one.script.name} | {ranks} | {_resumed(one, ranks)} |"
    yield (
        "\nThe state was kept by one rank. The seconds begin with the fork of the ranks' processes, whose imports are "
        "done."
    )


def _resumed(one: Measured, ranks: int) -> str:
    errors = [one.error] if one.error else one.turns.get(f"error_{ranks}", [])
    if errors:
        return f"fails: {errors[0].replace('|', '/')} | | "
    images, order = (statistics.median(one.turns[f"same_{what}_{ranks}"]) for what in ("images", "order"))
    return f"{measure.spread(one.turns[f'first_batch_{ranks}'])} | {images:.0%} | {order:.0%}"


def mixtures(folder: Path) -> Iterator[str]:
    """A mixture of two sets, 7 to 3."""
    files = _token_file(folder, "a"), _token_file(folder, "b", IMAGES)
    measured = compare(*(_script("mixing", form, *files, SHARE) for form in FORMATS))
    yield measure.HEAD
    yield from measure.lines("mixture 7 : 3, batches of 128", "Mtoken/s", measured)
    yield from measure.lines("mixture 7 : 3, batches of 128", "Mtoken/CPU-s", measured, per="cpu_seconds")
    yield "\n| reader | images read | of the first set, off by | in any 1,000 one after the other, off by |"
    yield "|---|---|---|---|"
    for one in measured:
        if one.error is None:
            figures = [statistics.median(one.turns[name]) for name in ("images", "off_total", "off_thousand")]
            yield f"| {one.script.name} | {figures[0]:,.0f} | {figures[1]:.1f} | {figures[2]:.0f} |"


WAYS: Sequence[tuple[str, str, str | None]] = (
    ("ours", "ours", None),
    ("decoding", "libjpeg-turbo alone, decoding", None),
    ("img2dataset", "img2dataset: JPEGs, no tokens", "img2dataset"),
    ("litdata_pixels", "litdata optimize: pixels, no tokens", "litdata"),
    ("litdata_tokens", "litdata optimize with ImageGPTImageProcessor", "litdata"),
    ("datasets_map", "datasets.map with ImageGPTImageProcessor", "litdata"),
)
"""Functions of peers/preparing.py, their names in the table, and where they run: litdata's environment has the
torchvision that transformers' processor is fastest with."""


def preparing(folder: Path) -> Iterator[str]:
    """Images to stored training samples, by the CPU-second."""
    palette = folder / "palette.npy"
    save_palette(palette, np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32))
    name, all_small = small_images(folder / "all-small")
    small, large = folder / "small", folder / "large"
    _link_some(all_small, small, PREPARED)
    write_photographs(large, PREPARED_LARGE, LARGE)
    yield measure.HEAD
    yield from _prepared(f"{PREPARED:,} of {name} to 32x32", small, palette, 32)
    yield from _prepared(f"{PREPARED_LARGE:,} JPEGs of {LARGE[0]}x{LARGE[1]} to 64x64", large, palette, 64)


def _link_some(source: Path, target: Path, count: int) -> None:
    """As many images of each class as make up `count`."""
    files = sorted(source.glob("train/*/*"))
    for file in files[:: max(1, len(files) // count)][:count]:
        link = target / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)


def _prepared(work: str, images: Path, palette: Path, side: int) -> Iterator[str]:
    module = "tests.benchmarks.peers.preparing"
    with _serving(images) as address:
        arguments = (images, palette, side, address)
        scripts = [Script(name, module, (way, *arguments), environment) for way, name, environment in WAYS]
        measured = compare(*scripts)
    yield from measure.lines(work, "images/CPU-s", measured, per="cpu_seconds")
    if measured[0].error is None and measured[1].error is None:
        ours, limit = (statistics.median(one.rates("cpu_seconds")) for one in measured[:2])
        yield f"| {work} | of what decoding alone allows | {ours / limit:.0%} | | | |"


@contextlib.contextmanager
def _serving(folder: Path) -> Iterator[str]:
    """The address at which a server on this machine has a folder; its CPU time is in no figure."""
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{address}/train/", timeout=5).close()
                break
            time.sleep(0.1)
        yield address
    finally:
        server.kill()
        server.wait()
