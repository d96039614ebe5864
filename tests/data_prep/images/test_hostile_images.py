"""Files that are not what their names say, damaged, oversized or strange: converted as by Pillow, or skipped."""

import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.config import SourceConfig
from data_prep.images.decode import BadPicture, Decoder
from data_prep.shards.reader import open_shard_set
from data_prep.sources.open import open_source
from tests.data_prep.images.encoded_images import by_pillow, chunk, encoded, oriented, png

SECONDS = 5
"""In which any one file must be done with."""
MEGABYTES = 300
"""Which the whole corpus may add to a process's peak memory."""

AS_PILLOW, BY_UPPER_BITS = "as Pillow", "by its upper bits"
"""What becomes of a file that is not skipped."""


def corpus(image: Image.Image) -> dict[str, tuple[bytes, str]]:
    """File name: content, and what is to become of it: AS_PILLOW, BY_UPPER_BITS or the reason for a skip."""
    jpeg, png_, gif = encoded(image, "JPEG"), encoded(image, "PNG"), encoded(image, "GIF")
    webp, tiff, bmp = encoded(image, "WEBP"), encoded(image, "TIFF"), encoded(image, "BMP")
    return (
        truncated(jpeg, png_, gif, webp, tiff, bmp, image)
        | no_pictures(image)
        | other_forms(image)
        | oversized(png_)
        | damaged(jpeg, png_, webp, image)
    )


def truncated(
    jpeg: bytes, png_: bytes, gif: bytes, webp: bytes, tiff: bytes, bmp: bytes, image: Image.Image
) -> dict[str, tuple[bytes, str]]:
    deflated = encoded(image, "TIFF", compression="tiff_adobe_deflate")
    files = {
        "jpeg_half.jpg": jpeg[: len(jpeg) // 2],
        "jpeg_header_only.jpg": jpeg[:200],
        "jpeg_magic_only.jpg": jpeg[:4],
        "jpeg_no_end.jpg": jpeg[:-2],
        "progressive_half.jpg": encoded(image, "JPEG", progressive=True)[:2000],
        "png_half.png": png_[: len(png_) // 2],
        "png_header_only.png": png_[:33],
        "png_signature_only.png": png_[:8],
        "gif_half.gif": gif[: len(gif) // 2],
        "gif_in_palette.gif": gif[:100],
        "webp_half.webp": webp[: len(webp) // 2],
        "webp_last_byte.webp": webp[:-1],
        "webp_header_only.webp": webp[:12],
        "tiff_half.tif": tiff[: len(tiff) // 2],
        "tiff_lost_directory.tiff": deflated[: len(deflated) // 2],
        "bmp_half.bmp": bmp[: len(bmp) // 2],
        "avif_half.jpg": encoded(image, "AVIF")[:2000],
        "jpeg2000_half.jpg": encoded(image, "JPEG2000")[:2000],
        "pixmap_half.ppm": encoded(image, "PPM")[:2000],
    }
    return {name: (content, "truncated") for name, content in files.items()} | {
        "png_no_end.png": (png_[:-12], AS_PILLOW)  # all its pixels are there
    }


def no_pictures(image: Image.Image) -> dict[str, tuple[bytes, str]]:
    files = {
        "one_byte.jpg": b"\xff",
        "text.jpg": b"Not Found\n",
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg"><circle r="5"/></svg>',
        "document.jpg": b"%PDF-1.7\n1 0 obj << >> endobj\n%%EOF\n",
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF\n",
        "phone.jpg": struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic") + bytes(500),
        "noise.jpg": np.random.default_rng(3).bytes(4000),
        "zeros.png": bytes(4000),
        "sound.webp": b"RIFF" + struct.pack("<I", 40) + b"WAVEfmt " + bytes(32),
        "archive.jpg": b"PK\x03\x04" + bytes(100),
        "targa.jpg": encoded(image, "TGA"),  # has no signature that would tell it from noise
    }
    return {name: (content, "not a picture") for name, content in files.items()} | {"nothing.jpg": (b"", "empty")}


def other_forms(image: Image.Image) -> dict[str, tuple[bytes, str]]:
    """Strange, and whole."""
    pixels = np.asarray(image)
    grey16 = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 200)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels.astype(">u2") * 200)
    clear = image.copy()
    clear.putalpha(Image.fromarray(pixels[:, :, 0]))
    frames = [image.rotate(90 * turn) for turn in range(3)]
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    inks = encoded(image.convert("CMYK"), "JPEG")
    adobe = inks.index(b"Adobe") + 11
    float_pixels = Image.fromarray(pixels[:, :, 0].astype(np.float32))
    two_pages = {"save_all": True, "append_images": frames[1:]}
    files = {
        "png_named.jpg": encoded(image, "PNG"),
        "jpeg_named.png": encoded(image, "JPEG"),
        "webp_named.gif": encoded(image, "WEBP"),
        "avif_named.jpg": encoded(image, "AVIF"),
        "jpeg2000_named.jpg": encoded(image, "JPEG2000"),
        "inks.jpg": inks,
        "inks_converted.jpg": inks[:adobe] + b"\x02" + inks[adobe + 1 :],
        "color16.png": png(*image.size, lines, bits=16),
        "one_bit.png": encoded(image.convert("1"), "PNG"),
        "one_bit.tif": encoded(image.convert("1"), "TIFF", compression="group4"),
        "palette_clear.png": encoded(palette, "PNG", transparency=3),
        "palette_clears.png": encoded(palette, "PNG", transparency=bytes(range(256))),
        "grey_alpha.png": encoded(clear.convert("LA"), "PNG"),
        "alpha.png": encoded(clear, "PNG"),
        "alpha.webp": encoded(clear, "WEBP"),
        "grey.jpg": encoded(image.convert("L"), "JPEG"),
        "moving.gif": encoded(frames[0], "GIF", **two_pages),
        "moving.webp": encoded(frames[0], "WEBP", **two_pages),
        "moving.png": encoded(frames[0], "PNG", **two_pages),
        "pages.tif": encoded(frames[0], "TIFF", **two_pages),
        "float.tif": encoded(float_pixels, "TIFF"),
        "whole_numbers.tif": encoded(Image.fromarray(pixels[:, :, 0].astype(np.int32)), "TIFF"),
        "inks.tif": encoded(image.convert("CMYK"), "TIFF"),
        "lab.tif": encoded(Image.frombytes("LAB", image.size, pixels.tobytes()), "TIFF"),
        "jpeg_within.tif": encoded(image, "TIFF", compression="jpeg"),
        "turned.jpg": encoded(image, "JPEG", exif=oriented(6)),
        "mirrored.png": encoded(image, "PNG", exif=oriented(5)),
        "orientation_99.jpg": encoded(image, "JPEG", exif=oriented(99)),
        "bad_exif.jpg": encoded(image, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage"),
        "junk_behind.jpg": encoded(image, "JPEG") + b"junk" * 500,
        "two_pictures.jpg": encoded(image, "MPO", **two_pages),
        "icon.bmp": encoded(image, "ICO", sizes=[(48, 36), (16, 16)]),
        "palette.bmp": encoded(palette, "BMP"),
        "upside_down.bmp": upside_down(encoded(image, "BMP")),
        "one_pixel.png": encoded(image.resize((1, 1)), "PNG"),
        "one_pixel.jpg": encoded(image.resize((1, 1)), "JPEG"),
        "column.jpg": encoded(image.resize((1, 5000)), "JPEG"),
        "row.png": encoded(image.resize((5000, 1)), "PNG"),
        "text_pixels.ppm": b"P3\n2 2\n255\n" + b" ".join(b"%d" % value for value in range(12)),
    }
    return {name: (content, AS_PILLOW) for name, content in files.items()} | {
        "grey16.png": (encoded(grey16, "PNG"), BY_UPPER_BITS),
        "grey16.tif": (encoded(grey16, "TIFF"), BY_UPPER_BITS),
    }


def upside_down(bmp: bytes) -> bytes:
    """A BMP whose rows are stored from above: its height is negative."""
    (height,) = struct.unpack_from("<i", bmp, 22)
    return bmp[:22] + struct.pack("<i", -height) + bmp[26:]


def oversized(png_: bytes) -> dict[str, tuple[bytes, str]]:
    jpeg = encoded(Image.new("RGB", (16, 16)), "JPEG")
    frame = jpeg.index(b"\xff\xc0") + 5
    many_scans = encoded(Image.new("RGB", (3000, 3000)), "JPEG", progressive=True)
    last = many_scans.rindex(b"\xff\xda")
    zeros = zlib.compress(bytes(100_000_000), 9)
    files = {
        "png_50000.png": png(50_000, 50_000, b"0"),
        "png_2_billion.png": png(2**31 - 1, 2**31 - 1, b"0"),
        "jpeg_65500.jpg": jpeg[:frame] + struct.pack(">HH", 65500, 65500) + jpeg[frame + 4 :],
        "gif_65535.gif": b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
        + b",\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;",
        "bmp_bomb.bmp": b"BM" + struct.pack("<IIIIiiHHIIIIII", 70, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0),
        "text_bomb.png": png_[:33] + chunk(b"zTXt", b"a\0\0" + zeros) + png_[33:],
        "international_text_bomb.png": png_[:33] + chunk(b"iTXt", b"a\0\1\0\0\0" + zeros) + png_[33:],
        "profile_bomb.png": png_[:33] + chunk(b"iCCP", b"a\0\0" + zeros) + png_[33:],
        "scans.jpg": many_scans[:last] + 2000 * many_scans[last:-2] + many_scans[-2:],
    }
    return {name: (content, "too large") for name, content in files.items()} | {
        # within the limit of pixels, with next to none behind the header
        "png_13000.png": (png(13_000, 13_000, b"0"), "truncated"),
    }


def damaged(jpeg: bytes, png_: bytes, webp: bytes, image: Image.Image) -> dict[str, tuple[bytes, str]]:
    def changed(content: bytes, place: int, by: int = 0xFF) -> bytes:
        return content[:place] + bytes([content[place] ^ by]) + content[place + 1 :]

    scan, quantization, frame = jpeg.index(b"\xff\xda"), jpeg.index(b"\xff\xdb"), jpeg.index(b"\xff\xc0")
    tables = jpeg.index(b"\xff\xc4")
    idat = png_.index(b"IDAT")
    flipped = {f"flipped_{step}.jpg": changed(jpeg, scan + 40 + 37 * step, 1 << step % 8) for step in range(8)}
    files = {
        "bad_tables.jpg": changed(jpeg, tables + 6),
        "bad_quantization.jpg": changed(jpeg, quantization + 4),
        "no_quantization.jpg": jpeg[:quantization] + jpeg[frame:],
        "no_components.jpg": changed(jpeg, frame + 9, jpeg[frame + 9]),
        "arithmetic_in_name.jpg": changed(jpeg, frame + 1, 0xC0 ^ 0xC9),
        "lossless_in_name.jpg": changed(jpeg, frame + 1, 0xC0 ^ 0xC3),
        "bad_crc.png": changed(png_, idat - 5),
        "bad_pixels_crc.png": changed(png_, len(png_) - 13),
        "bad_deflate.png": png_[: idat + 200] + bytes(200) + png_[idat + 400 :],
        "bad_bits.png": png(4, 4, b"\0" * 16, bits=3),
        "no_palette.png": png(4, 4, b"\0" * 20, color=3),
        "no_width.png": png(0, 4, b"\0" * 20),
        "bad_webp.webp": webp[:30] + bytes(len(webp) - 30),
        "bad_tiff.tif": b"II*\0" + struct.pack("<I", 8) + b"\xff" * 60,
    }
    # What Pillow makes of a damaged file is its own business; ours is to make the same of it, or to skip it.
    return {name: (content, pillows_verdict(content)) for name, content in (files | flipped).items()}


def pillows_verdict(content: bytes) -> str:
    try:
        by_pillow(content)
    except Exception:
        return "damaged"
    return AS_PILLOW


@pytest.fixture(scope="module")
def files() -> dict[str, tuple[bytes, str]]:
    windows = open_source(SourceConfig(kind="photographs", train_per_class=1)).splits["train"]
    return corpus(Image.fromarray(windows.picture(1, Decoder())).resize((160, 120)))


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Ends what takes longer, wherever it waits."""

    def expire(signum: int, frame: object) -> None:
        raise TimeoutError(f"not done with in {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(content: bytes, name: str) -> str:
    """What became of a file, in the corpus's words."""
    try:
        with time_limit(SECONDS):
            picture = Decoder()(content, name)
    except BadPicture as bad:
        assert bad.name == name
        assert "\n" not in str(bad)
        return bad.reason
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
        if image.mode.startswith("I;16"):
            assert (picture == (np.asarray(image) >> 8)[:, :, None]).all()
            return BY_UPPER_BITS
    reference = by_pillow(content)
    assert picture.shape == reference.shape
    assert (picture == reference).all()
    return AS_PILLOW


def test_the_corpus_is_as_large_and_as_mixed_as_promised(files: dict[str, tuple[bytes, str]]) -> None:
    reasons = Counter(expected for _, expected in files.values())
    assert len(files) >= 100
    assert set(reasons) == {AS_PILLOW, BY_UPPER_BITS, "truncated", "not a picture", "empty", "too large", "damaged"}


def test_every_file_is_converted_as_by_pillow_or_skipped_for_its_reason(files: dict[str, tuple[bytes, str]]) -> None:
    found = {name: outcome(content, name) for name, (content, _) in files.items()}
    assert found == {name: expected for name, (_, expected) in files.items()}


@pytest.mark.parametrize("smallest", [1, 64])
def test_scaled_decode_skips_the_same_files(smallest: int, files: dict[str, tuple[bytes, str]]) -> None:
    for name, (content, expected) in files.items():
        try:
            with time_limit(SECONDS):
                Decoder(smallest)(content, name)
        except BadPicture as bad:
            assert (name, bad.reason) == (name, expected)
        else:
            assert expected in (AS_PILLOW, BY_UPPER_BITS), name


def test_memory_stays_within_bounds(files: dict[str, tuple[bytes, str]], tmp_path: Path) -> None:
    """In a process of its own, whose peak is the corpus's."""
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    script = """
import resource, sys
from pathlib import Path
from data_prep.images.decode import BadPicture, Decoder
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def decode(file):
    try: Decoder()(file.read_bytes(), file.name)
    except BadPicture: pass
decode(Path(sys.argv[1]) / "png_named.jpg")
before = peak()
for file in Path(sys.argv[1]).iterdir(): decode(file)
print(peak() - before)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, cwd=Path(__file__).parents[3]
    )
    assert int(done.stdout) < MEGABYTES


# --- what is no file, and names


@pytest.fixture
def strange_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The image folder's train/cat with all that a file system can hold under a picture's name."""
    cat = folder / "train/cat"
    os.mkfifo(cat / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(cat)  # a socket's path may have 107 bytes only
        server.bind("socket.jpg")
        monkeypatch.undo()
    (cat / "device.jpg").symlink_to("/dev/zero")
    (cat / "circle.jpg").symlink_to("circle.jpg")
    (cat / "nowhere.png").symlink_to("missing.png")
    (cat / "up").symlink_to("..")
    (cat / "round").symlink_to(".")
    (cat / "above").symlink_to(folder.parent)
    (cat / "folder.jpg").mkdir()
    (cat / "empty_folder.jpg").mkdir()
    good = next(cat.glob("0*.png")).read_bytes()
    (cat / "folder.jpg/inside.png").write_bytes(good)
    (cat / "link.png").symlink_to("folder.jpg/inside.png")
    Path(os.fsdecode(os.fsencode(cat) + b"/caf\xe9 \xff\n.png")).write_bytes(good)
    with (cat / "sparse.jpg").open("wb") as file:
        file.truncate(3 << 30)
    (folder / "train/circle").symlink_to("circle")
    return folder


STRANGE_SKIPS = {"circle.jpg": "unreadable", "nowhere.png": "unreadable", "sparse.jpg": "too large"}
STRANGE_PICTURES = 3
"""folder.jpg/inside.png, link.png, and the one whose name is not UTF-8."""


def test_only_files_are_listed_and_none_is_waited_for(strange_folder: Path) -> None:
    with time_limit(SECONDS):
        pictures = open_source(SourceConfig(kind="image_folder", path=str(strange_folder))).splits["train"]
        before = len(list((strange_folder / "train").glob("*/[0-9]*.png")))
        assert len(pictures) == before + STRANGE_PICTURES + len(STRANGE_SKIPS)
        found, skips = 0, {}
        for index in range(len(pictures)):
            try:
                assert pictures.picture(index, Decoder()).shape == (32, 32, 3)
                found += 1
            except BadPicture as bad:
                skips[Path(bad.name).name] = bad.reason
    assert (found, skips) == (before + STRANGE_PICTURES, STRANGE_SKIPS)


def test_a_folder_that_is_a_link_is_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "train/cat").rename(tmp_path / "elsewhere")
    (folder / "train/cat").symlink_to(tmp_path / "elsewhere")
    pictures = open_source(SourceConfig(kind="image_folder", path=str(folder))).splits["train"]
    assert (len(pictures), set(pictures.labels.tolist())) == (48, {0, 1, 2})


# --- the whole way


@pytest.fixture
def hostile_folder(strange_folder: Path, files: dict[str, tuple[bytes, str]]) -> Path:
    """The corpus among the good pictures and the strange names."""
    (strange_folder / "train/hostile").mkdir()
    for name, (content, _) in files.items():
        (strange_folder / "train/hostile" / name).write_bytes(content)
    return strange_folder


@pytest.mark.parametrize("workers", [1, 2])
def test_a_preparation_counts_what_it_skips(
    workers: int, hostile_folder: Path, files: dict[str, tuple[bytes, str]], tmp_path: Path, run: Callable[..., Any]
) -> None:
    options = [
        "--source.kind",
        "image_folder",
        "--source.path",
        hostile_folder,
        "--resolution",
        8,
        "--valid_fraction",
        0,
    ]
    options += ["--palette.colors", 16, "--workers", workers, "--max_skipped", 1, "--out", tmp_path / "shards"]
    with time_limit(60):
        result = run("shards", *options)
    assert result.code == 0, result.err
    train = hostile_folder / "train"
    expected = {str(train / "cat" / name): reason for name, reason in STRANGE_SKIPS.items()} | {
        str(train / "hostile" / name): reason
        for name, (_, reason) in files.items()
        if reason not in (AS_PILLOW, BY_UPPER_BITS)
    }
    shard_set = open_shard_set(tmp_path / "shards")
    assert shard_set.manifest["skipped"] == {"train": dict(Counter(expected.values()))}
    lines = [json.loads(line) for line in (tmp_path / "shards/skipped.jsonl").read_text().splitlines()]
    assert all(set(line) == {"split", "name", "reason", "detail"} and line["split"] == "train" for line in lines)
    assert {line["name"]: line["reason"] for line in lines} == expected
    assert len(lines) == len(expected)
    listed = len(open_source(SourceConfig(kind="image_folder", path=str(hostile_folder))).splits["train"])
    assert shard_set.split("train").images == listed - len(expected)
    labels = shard_set.split("train").gather(np.arange(listed - len(expected)))[1]
    assert (labels == shard_set.classes.index("hostile")).sum() == len(files) - len(expected) + len(STRANGE_SKIPS)


def test_too_many_skips_stop_a_preparation_with_one_sentence(
    hostile_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    options = ["--source.kind", "image_folder", "--source.path", hostile_folder, "--resolution", 8, "--workers", 1]
    result = run("shards", *options, "--palette.colors", 16, "--out", tmp_path / "shards")
    assert result.code == 2
    assert [line.startswith("error: ") for line in result.err.splitlines()][-2:] == [False, True]  # after the progress
    assert "can't be used, more than max_skipped 0.01 allows" in result.err
    assert "raise --max_skipped" in result.err
    assert not (tmp_path / "shards/shards.json").exists()


def test_the_picture_of_a_split_stands_beside_its_own_source(
    hostile_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    """`show` passes over the skipped, as the preparation did."""
    options = ["--source.kind", "image_folder", "--source.path", hostile_folder, "--resolution", 8, "--max_skipped", 1]
    assert run("shards", *options, "--palette.colors", 16, "--workers", 1, "--out", tmp_path / "shards").code == 0
    for split in ("train", "valid"):
        result = run("show", tmp_path / "shards", "--split", split, "--images", 1000, "--out", tmp_path / "grid.png")
        assert (result.code, "left the source's view" in result.out) == (0, True), result.err
