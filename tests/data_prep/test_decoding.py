import io

import numpy as np
import pytest
from PIL import Image

from data_prep.sources.base import decode_picture


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def photograph(small: tuple[np.ndarray, np.ndarray]) -> Image.Image:
    return Image.fromarray(small[0][0][:, :24])


def test_rgb_is_read_as_it_is(photograph: Image.Image) -> None:
    assert (decode_picture(encoded(photograph, "PNG"), "x") == np.asarray(photograph)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("orientation", "turn"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)])
def test_pictures_are_turned_upright(
    photograph: Image.Image, kind: str, orientation: int, turn: Image.Transpose
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode_picture(encoded(photograph, kind, exif=exif), "x")
    stored = decode_picture(encoded(photograph, kind), "x")
    assert (upright == np.asarray(Image.fromarray(stored).transpose(turn))).all()


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("P", "PNG"), ("L", "JPEG"), ("1", "PNG"), ("LA", "PNG")])
def test_other_modes_become_rgb_as_pillow_converts_them(photograph: Image.Image, mode: str, kind: str) -> None:
    content = encoded(photograph.convert(mode), kind)
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == mode
        assert (decode_picture(content, "x") == np.asarray(image.convert("RGB"))).all()


def test_transparency_is_dropped(photograph: Image.Image) -> None:
    clear = photograph.copy()
    clear.putalpha(0)
    assert (decode_picture(encoded(clear, "PNG"), "x") == np.asarray(photograph)).all()


def test_sixteen_bits_keep_the_upper_eight() -> None:
    grey = (np.arange(256, dtype=np.uint16) * 256 + 99).reshape(16, 16)
    picture = decode_picture(encoded(Image.fromarray(grey), "PNG"), "x")
    assert (picture == (grey >> 8)[:, :, None]).all()


def test_a_damaged_exif_block_does_not_spoil_the_picture(photograph: Image.Image) -> None:
    content = encoded(photograph, "JPEG", exif=b"Exif\x00\x00garbage that is no TIFF header")
    assert decode_picture(content, "x").shape == (32, 24, 3)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_an_unreadable_picture_is_named(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"some/file\.png is not a readable picture"):
        decode_picture(content, "some/file.png")


def test_a_truncated_picture_is_an_error_not_half_grey(photograph: Image.Image) -> None:
    content = encoded(photograph, "JPEG")
    with pytest.raises(ValueError, match=r"a\.jpg is not a readable picture"):
        decode_picture(content[: len(content) // 2], "a.jpg")
