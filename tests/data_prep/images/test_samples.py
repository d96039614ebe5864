"""Samples of every type against the same values in numpy, by the rule in data_prep/README.md."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from data_prep.images.decode import BadImage, Decoder
from tests.data_prep.images.encoded_images import encoded, tiff

GRAY = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
COLOR = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
WIDE = COLOR.astype("<u2") * 256 + 99
FRACTIONS = GRAY / 255


def decoded(content: bytes) -> np.ndarray:
    with warnings.catch_warnings(action="error"):
        return Decoder()(content, "x")


def twelve_bits(values: np.ndarray) -> bytes:
    """Two values in three bytes."""
    high, low = values.reshape(-1, 2).astype(int).T
    return np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], 1).astype(np.uint8).tobytes()


def pixmap(kind: bytes, numbers: bytes, pixels: np.ndarray) -> bytes:
    return kind + b"\n16 16\n" + numbers + b"\n" + pixels.tobytes()


SCALED = {
    # full range: the upper eight bits
    "16 bits": (tiff(GRAY.astype("<u2") * 256 + 99, 16), GRAY),
    "16 bits, big-endian": (tiff((GRAY.astype("u2") * 256 + 99).astype(">u2"), 16, order=">"), GRAY),
    "12 bits": (tiff(twelve_bits(GRAY.astype(int) * 16 + 9), 12), GRAY),
    "12 bits, compressed": (tiff(twelve_bits(GRAY.astype(int) * 16 + 9), 12, compression=8), GRAY),
    "16 bits, white is zero": (tiff(65535 - (GRAY.astype("<u2") * 256 + 99), 16, photometric=0), GRAY),
    "16 bits, white is zero, compressed": (
        tiff(65535 - GRAY.astype("<u2") * 257, 16, photometric=0, compression=8),
        GRAY,
    ),
    "16 bits of color": (tiff(WIDE, 16, 3, photometric=2), COLOR),
    "16 bits of color, planes": (
        tiff(WIDE.transpose(2, 0, 1).copy(), 16, 3, photometric=2, planes=2, compression=8),
        COLOR,
    ),
    "pixmap of 4095": (pixmap(b"P5", b"4095", (GRAY.astype("<u2") * 16).astype(">u2")), GRAY),
    "JPEG 2000": (encoded(Image.fromarray(GRAY.astype(np.uint16) * 257), "JPEG2000"), GRAY),
    # no full range: 0 to 255 as they are, floats from 0 to 1 times 255
    "8 bits, signed": (tiff((GRAY >> 1).astype("i1"), 8, kind=2), GRAY >> 1),
    "16 bits, signed": (tiff(GRAY.astype("<i2"), 16, kind=2), GRAY),
    "16 bits, signed, big-endian": (tiff(GRAY.astype(">i2"), 16, kind=2, order=">"), GRAY),
    "32 bits": (tiff(GRAY.astype("<u4"), 32), GRAY),
    "32 bits, signed": (tiff(GRAY.astype("<i4"), 32, kind=2, compression=8), GRAY),
    "float to 255": (tiff(GRAY.astype("<f4"), 32, kind=3), GRAY),
    "float to 1": (tiff(FRACTIONS.astype("<f4"), 32, kind=3), GRAY),
    "float to 1, big-endian": (tiff(FRACTIONS.astype(">f4"), 32, kind=3, order=">"), GRAY),
    "float to 1, compressed": (tiff(FRACTIONS.astype("<f4"), 32, kind=3, compression=8), GRAY),
    "float to 1, white is zero": (tiff((1 - FRACTIONS).astype("<f4"), 32, kind=3, photometric=0), GRAY),
    "float pixmap": (pixmap(b"Pf", b"-1.0", FRACTIONS.astype("<f4")[::-1]), GRAY),
    "black float": (tiff(np.zeros((16, 16), "<f4"), 32, kind=3), np.zeros((16, 16), np.uint8)),
}


@pytest.mark.parametrize("form", SCALED)
def test_samples_become_eight_bits(form: str) -> None:
    content, expected = SCALED[form]
    expected = np.repeat(expected[:, :, None], 3, 2) if expected.ndim == 2 else expected
    assert (decoded(content) == expected).all()


TWELVE_BIT_JPEG = encoded(Image.fromarray(COLOR), "JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c")
HOLES = np.where(GRAY < 9, np.nan, FRACTIONS)
UNSUPPORTED = {
    "16 bits, signed": (tiff(GRAY.astype("<i2") * 128, 16, kind=2), r"signed or 32-bit samples from \d+ to \d+; they "),
    "8 bits, signed": (tiff(GRAY, 8, kind=2), "signed or 32-bit samples from -128 to 127; they must be 0 to 255"),
    "32 bits": (tiff(GRAY.astype("<u4") << 23, 32), "signed or 32-bit samples from 0 to "),
    "float": (
        tiff((FRACTIONS - 0.5).astype("<f4"), 32, kind=3),
        "float samples from -0.5 to 0.5; .* 0 to 255, or 0 to 1",
    ),
    "NaN": (tiff(HOLES.astype("<f4"), 32, kind=3), "float samples from nan to nan"),
    "three gray samples": (
        tiff(WIDE, 16, 3),
        "a TIFF with 3 x 16 bits a pixel, unsigned, photometric 1, compression 1",
    ),
    "thirteen bands": (tiff(np.zeros((16, 16, 13), "<u2"), 16, 13), "a TIFF with 13 x 16 bits a pixel, unsigned"),
    "bands in planes": (tiff(np.zeros((4, 16, 16), "u1"), 8, 4, planes=2), "a TIFF with 4 x 8 bits a pixel"),
    "color of floats": (tiff(WIDE.astype("<f4"), 32, 3, kind=3, photometric=2), "3 x 32 bits a pixel, float"),
    "double": (tiff(FRACTIONS, 64, kind=3), "64 bits a pixel, float"),
    "half": (tiff(FRACTIONS.astype("<f2"), 16, kind=3), "16 bits a pixel, float"),
    "14 bits": (tiff(bytes(448), 14), "14 bits a pixel, unsigned"),
    "unknown compression": (
        tiff(GRAY, 8, compression=34712),
        "8 bits a pixel, unsigned, photometric 1, compression 34712",
    ),
    # what Pillow reads to other values
    "planes of 16 bits": (
        tiff(WIDE.transpose(2, 0, 1).copy(), 16, 3, photometric=2, planes=2),
        "16 bits.*separate planes",
    ),
    "big-endian": (tiff(FRACTIONS.astype(">f4"), 32, kind=3, order=">", compression=8), "32 bits.*big-endian"),
    "JPEG": (TWELVE_BIT_JPEG, "cannot handle 12-bit layers"),
}


@pytest.mark.parametrize("form", UNSUPPORTED)
def test_samples_without_a_rule_are_unsupported(form: str, capfd: pytest.CaptureFixture[str]) -> None:
    content, detail = UNSUPPORTED[form]
    with pytest.raises(BadImage, match=detail) as caught:
        decoded(content)
    assert caught.value.reason == "unsupported"
    assert capfd.readouterr() == ("", "")


def test_large_tiffs_are_described_too() -> None:
    buffer = io.BytesIO()
    Image.fromarray(GRAY).save(buffer, "TIFF", big_tiff=True)
    assert (decoded(buffer.getvalue())[:, :, 0] == GRAY).all()
    content = buffer.getvalue().replace(b"\x02\x01\x03\0\1\0\0\0\0\0\0\0\x08", b"\x02\x01\x03\0\1\0\0\0\0\0\0\0\x07")
    with pytest.raises(BadImage, match=r"x is unsupported \(a TIFF with 7 bits a pixel"):
        decoded(content)
