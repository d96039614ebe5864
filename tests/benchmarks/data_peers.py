"""The data tables of `make bench` beside what a user would pick instead: reading, resuming, mixtures, preparation.

Each contestant is a process with one thread, on the same images; they take turns alternately (peers/measure.py).
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
from tests.benchmarks import images
from tests.benchmarks.marks import Result, result
from tests.benchmarks.peers import measure
from tests.benchmarks.peers.measure import Measured, Script, compare
from tests.benchmarks.peers.reading import BATCH
from tests.benchmarks.peers.resuming import RANKS
from tests.benchmarks.peers.token_images import token_images
from tests.launch import ROOT, free_port

IMAGES, POSITIONS = 32_768, 32 * 32
"""Images of the token sets, and tokens of each: 67 MB, and of webdataset's shards one for each of four ranks."""
FEW_IMAGES = IMAGES // 2
"""Read in a turn by mosaicml-streaming, of which an epoch of all may take 20 s."""
S_TOKENS_A_SECOND = 0.45 * 989e12 / 0.606e9
"""Tokens per second of iGPT-S on one H100 at 45% of its peak, 0.606 GFLOP a token: a reader must be faster."""
SHARE = 0.7
"""Of the first set in the mixture."""
PREPARING_MARK = 1.5
"""Times the best peer."""
PREPARED, PREPARED_LARGE = 1_000, 200
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


def _script(kind: str, form: str, *arguments: object, note: str = "") -> Script:
    name, environment = FORMATS[form]
    module = f"tests.benchmarks.peers.{kind}"
    return Script(f"{name}{note}", module, (form, *arguments), environment, is_reference=form == "memmap")


def _token_file(folder: Path, name: str, first: int = 0, count: int = IMAGES) -> Path:
    file = folder / f"{name}.npy"
    np.save(file, token_images(count, POSITIONS, first))
    return file


def reading(folder: Path) -> Iterator[str | Result]:
    """Epochs of shuffled batches of 128, from files in the page cache."""
    tokens, few = _token_file(folder, "a"), _token_file(folder, "few", count=FEW_IMAGES)
    scripts = [_script("reading", "ours", tokens, 1), _script("reading", "memmap", tokens, 0)]
    # Only with a worker: two of its processes would clean each other's shared memory.
    scripts += [_script("reading", "mosaicml_streaming", few, 1, note=", one worker")]
    for form in ("litdata_chunks", "webdataset_tars"):
        scripts += [_script("reading", form, tokens, 1, note=", one worker")]
        scripts += [_script("reading", form, tokens, 0, note=", in the process")]
    measured = compare(*scripts)
    work, unit = "shuffled batches of 128", "Mtoken/s"
    yield measure.HEAD
    yield from measure.lines(work, unit, measured)
    yield from measure.lines(work, "Mtoken/CPU-s", measured, per="cpu_seconds")
    ours, memmap, *libraries = measured
    if ours.error is None and memmap.error is None:
        yield _behind_memmap(ours, memmap)
    limit = {"limit": _copying(tokens), "limited_by": "one copy in memory"}
    yield result(work, unit, [ours, *libraries], mark=1, **limit)
    yield result(f"{work}, beside np.memmap", unit, [ours, memmap], mark=0.5, **limit)


def _behind_memmap(ours: Measured, memmap: Measured) -> str:
    """What a batch costs more than with a file of the images alone, and what that is of a training step."""
    batch = BATCH * POSITIONS / 1e6
    seconds = [batch / statistics.median(one.rates("cpu_seconds")) for one in (ours, memmap)]
    more, step = seconds[0] - seconds[1], batch * 1e6 / S_TOKENS_A_SECOND
    return (
        f"\nA batch takes {seconds[0] * 1e6:,.0f} µs of CPU time, with np.memmap {seconds[1] * 1e6:,.0f}. The "
        f"difference finds each image in the records of its shard and hands the batch over from the thread that reads "
        f"ahead; it is {more / step:.2%} of a step of iGPT-S on one H100 at 45% of its peak."
    )


def _copying(tokens: Path) -> float:
    """Mtoken/s of copying the same bytes from memory to memory."""
    source = np.load(tokens)
    target, seconds = np.empty_like(source), []
    for _ in range(measure.TURNS + 1):
        began = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - began)
    return source.size / 1e6 / statistics.median(seconds[1:])


def resuming(folder: Path) -> Iterator[str | Result]:
    """Seconds to the first batch after half an epoch, and whether the batches that follow are the same."""
    tokens = _token_file(folder, "a")
    measured = compare(*(_script("resuming", form, tokens) for form in FORMATS))
    yield (
        "| reader | ranks | seconds to the first batch | of the next 20 global batches: same images | "
        "same images in the same order |\n|---|---|---|---|---|"
    )
    for one in measured:
        for ranks in RANKS:
            yield f"| {one.script.name} | {ranks} | {_resumed(one, ranks)} |"
    yield (
        "\nThe state was kept by one rank. The seconds begin with the fork of the ranks' processes, whose imports are "
        "done."
    )
    ours, _, *libraries = measured
    for ranks in RANKS:
        exact = [one for one in libraries if set(measure.values(one, f"same_order_{ranks}")) == {1.0}]
        work = f"resume in mid-epoch on {ranks} rank{'s' if ranks > 1 else ''}, exact: first batch"
        yield result(work, "s", [ours, *exact], f"first_batch_{ranks}", mark=1, more_is_better=False)
    for one in measured:
        if one.error is None:
            orders = [measure.values(one, f"same_order_{ranks}") for ranks in RANKS]
            one.turns["same_order"] = [min(map(statistics.median, orders))] if all(orders) else [0.0]
    work = "resume in mid-epoch on 1, 2 and 4 ranks: batches in the same order"
    yield result(work, "share, least of the 3", [ours, *libraries], "same_order", mark=1)


def _resumed(one: Measured, ranks: int) -> str:
    errors = [one.error] if one.error else one.turns.get(f"error_{ranks}", [])
    if errors:
        return f"fails: {measure.cell(errors[0])} | | "
    images, order = (statistics.median(one.turns[f"same_{what}_{ranks}"]) for what in ("images", "order"))
    return f"{measure.spread(one.turns[f'first_batch_{ranks}'])} | {images:.0%} | {order:.0%}"


def mixtures(folder: Path) -> Iterator[str | Result]:
    """A mixture of two sets, 7 to 3."""
    files = _token_file(folder, "a"), _token_file(folder, "b", IMAGES)
    scripts = [_script("mixing", form, *files, SHARE, 0) for form in ("ours", "memmap")]
    for form in ("webdataset_tars", "litdata_chunks"):  # mosaicml-streaming: as in reading
        scripts.append(_script("mixing", form, *files, SHARE, 0, note=", in the process"))
    for form in ("mosaicml_streaming", "litdata_chunks"):
        scripts.append(_script("mixing", form, *files, SHARE, 1, note=", one worker"))
    measured = compare(*scripts, turns=measure.SLOW_TURNS)
    work, unit = "mixture 7 : 3, batches of 128", "Mtoken/s"
    yield measure.HEAD
    yield from measure.lines(work, unit, measured)
    yield from measure.lines(work, "Mtoken/CPU-s", measured, per="cpu_seconds")
    yield "\n| reader | images read | of the first set, off by | in any 1,000 one after the other, off by |"
    yield "|---|---|---|---|"
    for one in measured:
        if one.error is None:
            figures = [statistics.median(one.turns[name]) for name in ("images", "off_total", "off_thousand")]
            yield f"| {one.script.name} | {figures[0]:,.0f} | {figures[1]:.1f} | {figures[2]:.0f} |"
    ours, _, *libraries = measured
    yield result(work, unit, [ours, *libraries], mark=1)
    off = {"mark": 1, "more_is_better": False}
    for figure, what in (("off_total", "in all"), ("off_thousand", "in any 1,000 consecutive images")):
        yield result(f"mixture 7 : 3, off by {what}", "images", [ours, *libraries], figure, **off)


DECODING = "libjpeg-turbo alone, decoding"
WAYS: Sequence[tuple[str, str, str | None]] = (
    ("ours", "ours", None),
    ("decoding", DECODING, None),
    ("litdata_pixels", "litdata optimize: pixels, no tokens", "litdata"),
    ("litdata_tokens", "litdata optimize with ImageGPTImageProcessor", "litdata"),
    ("datasets_map", "datasets.map with ImageGPTImageProcessor", "litdata"),
)
"""Functions of peers/preparing.py, their names in the table, and where they run: litdata's environment has the
torchvision that transformers' processor is fastest with."""
SLOW_WAY = ("img2dataset", "img2dataset, without its start: JPEGs, no tokens", "img2dataset")
"""It takes one turn, by itself, which takes half a minute; ten times as many images as the others have warm it up."""
TARS = ("ours_tars", "ours", None)


def preparing(folder: Path) -> Iterator[str | Result]:
    """Images to stored training samples, by the CPU-second; the large ones have ImageNet's mean size in bytes."""
    palette = folder / "palette.npy"
    save_palette(palette, np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32))
    name, all_small = images.small_images(folder / "all-small", PREPARED)
    small, large, tars = folder / "small", folder / "large", folder / "tars"
    _link_some(all_small, small, PREPARED)
    size = images.write_photographs(large, PREPARED_LARGE, LARGE, images.GRAIN)
    large_name = f"{PREPARED_LARGE:,} JPEGs of {LARGE[0]}x{LARGE[1]}, {size / 1000:,.0f} KB"
    yield measure.HEAD
    results = []
    for work, source, side in (
        (f"{PREPARED:,} {name} to 32x32", small, 32),
        (f"{large_name}, to 64x64", large, 64),
    ):
        measured = [*_prepared(source, palette, side, WAYS), *_prepared(source, palette, side, [SLOW_WAY], turns=1)]
        yield from measure.lines(work, "images/CPU-s", measured, per="cpu_seconds")
        results.append(_against_decoding(f"images to samples, {work}", measured))
    size = images.write_tars(tars)
    work = f"{images.WEB_IMAGES:,} JPEGs of {images.WEB_SIDE}x{images.WEB_SIDE}, {size / 1000:,.0f} KB, in a tar"
    [ours] = _prepared(tars, palette, 64, [TARS])
    results.append(result(f"images to samples, {work}, to 64x64", "images/CPU-s", [ours], "cpu_rate", mark=None))
    yield from results


def _link_some(source: Path, target: Path, count: int) -> None:
    """As many images of each class as make up `count`."""
    files = sorted(source.glob("train/*/*"))
    for file in files[:: max(1, len(files) // count)][:count]:
        link = target / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)


def _prepared(
    source: Path,
    palette: Path,
    side: int,
    ways: Sequence[tuple[str, str, str | None]],
    turns: int = measure.SLOW_TURNS,
) -> list[Measured]:
    module = "tests.benchmarks.peers.preparing"
    with _serving(source) as address:
        arguments = (source, palette, side, address)
        scripts = [
            Script(name, module, (way, *arguments), environment, is_reference=name == DECODING)
            for way, name, environment in ways
        ]
        return compare(*scripts, turns=turns, warm_up=turns > 1)


def _against_decoding(work: str, measured: list[Measured]) -> Result:
    """Ours beside the libraries; decoding alone is the limit."""
    ours, decoding, *libraries = measured
    found = measure.values(decoding, "cpu_rate")
    limit = {"limit": statistics.median(found), "limited_by": "decoding by libjpeg-turbo"} if found else {}
    return result(work, "images/CPU-s", [ours, *libraries], "cpu_rate", mark=PREPARING_MARK, **limit)


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
                urllib.request.urlopen(f"{address}/", timeout=5).close()
                break
            time.sleep(0.1)
        yield address
    finally:
        server.kill()
        server.wait()
