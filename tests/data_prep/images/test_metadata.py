"""Metadata, damaged or large, never keeps the pixels of an image from being read, and its orientation is applied."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.images.decode import BadImage, Decoder
from tests.data_prep.images.encoded_images import by_pillow, chunk, encoded, oriented, tiff

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
PNG = encoded(Image.fromarray(PIXELS), "PNG")
LARGE = zlib.compress(bytes(1_500_000))
EXIF = oriented(6).tobytes()
TURNED = np.rot90(PIXELS, -1)


def with_chunks(before: bytes, after: bytes = b"") -> bytes:
    """The PNG with chunks ahead of its pixels and behind them."""
    return PNG[:33] + before + PNG[33:-12] + after + PNG[-12:]


def wrong_checksum(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


LARGE_TEXT, LARGE_PROFILE = chunk(b"zTXt", b"history\0\0" + LARGE), chunk(b"iCCP", b"lut\0\0" + LARGE)
RAW_PROFILE = f"\nexif\n{len(EXIF):8}\n{EXIF.hex()}\n".encode()
PLAIN = {
    "text": with_chunks(LARGE_TEXT),
    "text behind the pixels": with_chunks(b"", LARGE_TEXT),
    "international text": with_chunks(chunk(b"iTXt", b"history\0\1\0\0\0" + LARGE)),
    "profile": with_chunks(LARGE_PROFILE),
    "many texts": with_chunks(66 * chunk(b"tEXt", b"a\0" + bytes(1_000_000))),
    "checksum of a text": with_chunks(wrong_checksum(chunk(b"tEXt", b"a\0b"))),
    "short resolution": with_chunks(chunk(b"pHYs", b"\0")),
    "unknown compression": with_chunks(chunk(b"zTXt", b"a\0\7b")),
    "damaged Exif": with_chunks(LARGE_PROFILE + wrong_checksum(chunk(b"eXIf", EXIF[6:]))),
}


@pytest.mark.parametrize("form", PLAIN)
def test_a_png_is_read_whatever_its_metadata(form: str) -> None:
    assert (Decoder()(PLAIN[form], "x") == PIXELS).all()


@pytest.mark.parametrize(
    "orientation",
    [
        chunk(b"eXIf", EXIF[6:]),
        chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta tiff:Orientation="6"/>'),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_PROFILE)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE) + chunk(b"eXIf", EXIF[6:]),
    ],
    ids=["Exif", "XMP", "raw profile", "large XMP"],
)
def test_its_orientation_is_applied(orientation: bytes) -> None:
    assert (Decoder()(with_chunks(orientation + LARGE_PROFILE), "x") == TURNED).all()


def test_damaged_pixels_are_still_damaged() -> None:
    text = with_chunks(LARGE_TEXT)
    for content, reason in ((text[:-500], "truncated"), (text[:29] + bytes(4) + text[33:], "damaged")):
        with pytest.raises(BadImage) as caught:
            Decoder()(content, "x")
        assert caught.value.reason == reason


def test_a_jpeg_that_pillow_reads_is_read_whatever_its_metadata() -> None:
    inks = encoded(Image.fromarray(PIXELS).convert("CMYK"), "JPEG", exif=oriented(6))
    short_profile = b"\xff\xe2\0\x0eICC_PROFILE\0"
    assert (Decoder()(inks[:2] + short_profile + inks[2:], "x") == by_pillow(inks)).all()


@pytest.mark.parametrize("tag", [270, 274, 282, 34675])
@pytest.mark.parametrize("field", [(77, 1, 0), (2, 1_000_000, 0), (4, 50, 0xFFFFFFFF)])
def test_a_tiff_is_read_whatever_its_other_tags(tag: int, field: tuple[int, int, int]) -> None:
    """A field has a type, a count and an offset."""
    options = {"description": 99 * "d", "dpi": (300, 300), "icc_profile": bytes(300)}
    # Pillow forgets the tags behind a damaged one, such as 317, the predictor.
    options |= {"compression": "tiff_adobe_deflate", "tiffinfo": {274: 1, 317: 2}}
    content = encoded(Image.fromarray(PIXELS), "TIFF", **options)
    entries = range(struct.unpack_from("<I", content, 4)[0] + 2, len(content) - 12, 12)
    place = next(entry for entry in entries if struct.unpack_from("<H", content, entry) == (tag,))
    damaged = content[:place] + struct.pack("<HHII", tag, *field) + content[place + 12 :]
    assert (Decoder()(damaged, "x") == PIXELS).all()


@pytest.mark.parametrize(("kind", "values"), [(2, "<i2"), (3, "<f4")])
def test_a_tiff_without_its_last_tags_is_truncated(kind: int, values: str) -> None:
    """Without the type of its samples it would be read to other values."""
    samples = (PIXELS[:16, :16, 0] / (1 if kind == 2 else 255)).astype(values)
    content = tiff(samples, 8 * samples.itemsize, kind=kind)
    directory = struct.unpack_from("<I", content, 4)[0]
    for end in range(directory, len(content) - 4):
        with pytest.raises(BadImage) as caught:
            Decoder()(content[:end], "x")
        assert caught.value.reason in ("truncated", "damaged")
    assert (Decoder()(content, "x")[:, :, 0] == PIXELS[:16, :16, 0]).all()


def test_scans_are_not_counted_in_metadata_or_behind_the_image() -> None:
    content = encoded(Image.new("RGB", (4000, 4000), (90, 120, 30)), "JPEG", progressive=True)
    scans = 300 * b"\xff\xda"
    preview = b"\xff\xef" + (len(scans) + 2).to_bytes(2, "big") + scans
    for one in (content[:2] + preview + content[2:], content + scans):
        assert Decoder()(one, "x").shape == (4000, 4000, 3)
