"""Decoded images against Pillow's decoding of the same bytes."""

import pickle

import cv2
import numpy as np
import pytest
from PIL import Image

from data_prep.config import SourceConfig
from data_prep.images.crops import area_resize
from data_prep.images.decode import MAX_PIXELS, BadImage, Decoder
from data_prep.sources.open import open_source
from tests.data_prep.images.encoded_images import by_pillow, encoded, oriented, png

SIZES = [(160, 120), (159, 121), (17, 16), (7, 200), (33, 97), (2, 5), (1, 1)]


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """A window of each photograph, at least 64 pixels a side."""
    windows = open_source(SourceConfig(kind="photographs", train_per_class=1)).splits["train"]
    return [Image.fromarray(windows.image(index, Decoder())) for index in range(len(windows))]


@pytest.fixture(scope="module")
def photograph(photographs: list[Image.Image]) -> Image.Image:
    return photographs[1].resize((160, 120))


def same_as_pillow(content: bytes) -> bool:
    image, reference = Decoder()(content, "x"), by_pillow(content)
    return image.shape == reference.shape and image.dtype == np.uint8 and bool((image == reference).all())


# --- JPEG: every form that simplejpeg decodes gives Pillow's pixels, bit for bit


@pytest.mark.parametrize("sampling", ["444", "422", "420", "411", "440"])
@pytest.mark.parametrize("progressive", [0, 1])
@pytest.mark.parametrize("restart", [0, 3])
def test_color_jpegs_have_pillows_pixels(
    sampling: str, progressive: int, restart: int, photographs: list[Image.Image]
) -> None:
    factor = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{sampling}")
    options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive]
    for number, image in enumerate(photographs):
        for size in SIZES:
            bgr = np.asarray(image.resize(size))[:, :, ::-1]
            quality = [cv2.IMWRITE_JPEG_QUALITY, 30 + 7 * number, cv2.IMWRITE_JPEG_RST_INTERVAL, restart]
            content = cv2.imencode(".jpg", bgr, options + quality)[1].tobytes()
            assert Decoder()._jpeg(content, "x") is not None, "simplejpeg is not asked"
            assert same_as_pillow(content), (number, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("progressive", [False, True])
def test_gray_and_rgb_jpegs_have_pillows_pixels(
    size: tuple[int, int], progressive: bool, photographs: list[Image.Image]
) -> None:
    for image in photographs:
        small = image.resize(size)
        gray = encoded(small.convert("L"), "JPEG", progressive=progressive)
        rgb = encoded(small, "JPEG", progressive=progressive, keep_rgb=True)  # Adobe's marker, without YCbCr
        for content in (gray, rgb):
            assert Decoder()._jpeg(content, "x") is not None, "simplejpeg is not asked"
            assert same_as_pillow(content)


@pytest.mark.parametrize("mode", ["CMYK", "YCCK"])
def test_cmyk_is_decoded_by_pillow(mode: str, photograph: Image.Image) -> None:
    content = encoded(photograph.convert("CMYK"), "JPEG")
    if mode == "YCCK":  # Adobe's marker says how the inks are stored in its last byte
        end = content.index(b"Adobe") + 12
        content = content[: end - 1] + b"\x02" + content[end:]
    assert Decoder()._jpeg(content, "x") is None
    assert same_as_pillow(content)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_jpegs_is_applied(mode: str, orientation: int, photograph: Image.Image) -> None:
    assert same_as_pillow(encoded(photograph.convert(mode), "JPEG", exif=oriented(orientation)))


@pytest.mark.parametrize("orientation", [3, 6])
def test_orientation_in_xmp_is_applied(orientation: int, photograph: Image.Image) -> None:
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="{orientation}"/>'.encode()
    content = encoded(photograph, "JPEG", xmp=xmp)
    assert same_as_pillow(content)
    assert not (Decoder()(content, "x").shape[0] == 120 and orientation == 6)


def test_orientation_after_other_segments_is_found(photograph: Image.Image) -> None:
    content = encoded(photograph, "JPEG", exif=oriented(6))
    exif = content.index(b"\xff\xe1")
    padding = b"\xff\xfe\xff\xff" + bytes(65533)
    content = content[:exif] + 3 * padding + content[exif:]
    assert Decoder()(content, "x").shape == (160, 120, 3)
    assert same_as_pillow(content)


def test_an_image_with_a_damaged_exif_block_is_decoded(photograph: Image.Image) -> None:
    content = encoded(photograph, "JPEG", exif=b"Exif\x00\x00garbage that is no TIFF header")
    assert (Decoder()(content, "x") == Decoder()(encoded(photograph, "JPEG"), "x")).all()


# --- scaled decode


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (501, 377), (900, 70), (640, 480)])
@pytest.mark.parametrize("smallest", [1, 32, 64, 100, 200, 400])
def test_scaled_decode_leaves_at_least_the_smallest_side(
    size: tuple[int, int], smallest: int, progressive: bool, photographs: list[Image.Image]
) -> None:
    content = encoded(photographs[4].resize(size), "JPEG", progressive=progressive)
    height, width = Decoder(smallest)(content, "x").shape[:2]
    assert min(height, width) >= min(smallest, *size)
    scale = min(eighths for eighths in (1, 2, 4, 8) if -(-min(size) * eighths // 8) >= smallest or eighths == 8)
    assert (width, height) == tuple(-(-side * scale // 8) for side in size)


def test_scaled_decode_stays_close_to_the_exact_image(photographs: list[Image.Image]) -> None:
    """The entire image as 32 x 32: libjpeg's scaling against the area average of all pixels."""
    errors = []
    for image in photographs:
        content = encoded(image.resize((512, 512), Image.Resampling.LANCZOS), "JPEG", quality=90)
        exact = area_resize(Decoder()(content, "x"), 32).astype(int)
        scaled = Decoder(64)(content, "x")
        assert scaled.shape == (64, 64, 3)
        errors.append(((area_resize(scaled, 32) - exact) ** 2).mean())
    assert 0 < np.mean(errors) < 6
    assert max(errors) < 15


def test_scaled_decode_applies_the_orientation(photograph: Image.Image) -> None:
    content = encoded(photograph.resize((500, 375)), "JPEG", exif=oriented(6))
    scaled, exact = Decoder(64)(content, "x"), Decoder()(content, "x")
    assert (scaled.shape, exact.shape) == ((125, 94, 3), (500, 375, 3))
    reduced = cv2.resize(np.ascontiguousarray(exact), (94, 125), interpolation=cv2.INTER_AREA)
    assert np.abs(scaled.astype(int) - reduced).mean() < 4


def test_only_jpegs_are_scaled(photograph: Image.Image) -> None:
    assert Decoder(32)(encoded(photograph, "PNG"), "x").shape == (120, 160, 3)


# --- other formats and modes

LOSSLESS = ["PNG", "TIFF", "BMP", "PPM", "GIF"]
FORMATS = [*LOSSLESS, "WEBP", "AVIF", "JPEG2000", "ICO"]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_has_pillows_pixels(kind: str, photograph: Image.Image) -> None:
    assert same_as_pillow(encoded(photograph, kind))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_other_formats_is_applied(kind: str, orientation: int, photograph: Image.Image) -> None:
    assert same_as_pillow(encoded(photograph, kind, exif=oriented(orientation)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_other_modes_become_rgb_as_pillow_converts_them(mode: str, photograph: Image.Image) -> None:
    image = photograph.convert(mode)
    if mode == "I;16":  # within 8 bits, where Pillow clips nothing
        image = Image.fromarray(np.asarray(photograph.convert("L")).astype(np.uint16) * 256)
        expected = np.repeat(np.asarray(photograph.convert("L"))[:, :, None], 3, axis=2)
        assert (Decoder()(encoded(image, "PNG"), "x") == expected).all()
        return
    assert same_as_pillow(encoded(image, "PNG"))


def test_transparency_is_dropped(photograph: Image.Image) -> None:
    clear = photograph.copy()
    clear.putalpha(0)
    assert (Decoder()(encoded(clear, "PNG"), "x") == np.asarray(photograph)).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_gray_keep_the_upper_eight(kind: str) -> None:
    gray = (np.arange(256, dtype=np.uint16) * 256 + 99).reshape(16, 16)
    image = Decoder()(encoded(Image.fromarray(gray), kind), "x")
    assert (image == (gray >> 8)[:, :, None]).all()


def test_sixteen_bits_of_color_keep_the_upper_eight(photograph: Image.Image) -> None:
    pixels = np.asarray(photograph)
    wide = pixels.astype(">u2") * 256 + 99
    lines = b"".join(b"\0" + line.tobytes() for line in wide.astype(">u2"))
    content = png(160, 120, lines, bits=16)
    assert (Decoder()(content, "x") == pixels).all()
    assert same_as_pillow(content)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_is_used(kind: str, photographs: list[Image.Image]) -> None:
    frames = [image.resize((40, 30)) for image in photographs[:3]]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert same_as_pillow(content)
    if kind != "GIF":
        assert (Decoder()(content, "x") == np.asarray(frames[0])).all()


# --- bad images


def test_a_bad_image_can_be_pickled() -> None:
    bad = pickle.loads(pickle.dumps(BadImage("a/b.jpg", "damaged", "so\n and   so")))
    assert (bad.name, bad.reason, bad.detail) == ("a/b.jpg", "damaged", "so and so")
    assert str(bad) == "a/b.jpg is damaged (so and so)"


@pytest.mark.parametrize("scans", [200, 2000])
def test_a_progressive_jpeg_with_too_many_scans_is_rejected(scans: int) -> None:
    content = encoded(Image.new("RGB", (4000, 4000), (90, 120, 30)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    bomb = content[:last] + scans * content[last:-2] + content[-2:]
    with pytest.raises(BadImage, match=r"x is too large \(2?,?\d+ scans of 4000x4000 pixels\)"):
        Decoder()(bomb, "x")
    assert Decoder()(content, "x").shape == (4000, 4000, 3)


def test_the_limit_of_pixels_is_pillows() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert 2 * Image.MAX_IMAGE_PIXELS == MAX_PIXELS


# --- bytes changed at random: the outcome is Pillow's, whatever was hit


@pytest.mark.parametrize("form", ["baseline", "progressive", "turned", "gray", "inks", "restarts"])
def test_randomly_changed_jpegs_are_decoded_or_rejected_as_by_pillow(form: str, photograph: Image.Image) -> None:
    options: dict[str, object] = {"progressive": form == "progressive"}
    if form == "turned":
        options["exif"] = oriented(6)
    if form == "restarts":
        options["restart_marker_blocks"] = 4
    image = photograph.convert({"gray": "L", "inks": "CMYK"}.get(form, "RGB"))
    whole = encoded(image, "JPEG", **options)
    random = np.random.default_rng(7)
    outcomes = {"read": 0, "refused": 0}
    for turn in range(120):
        content = bytearray(whole)
        reach = 700 if turn % 3 else len(content)  # most of the harm is done in the headers
        for place in random.integers(2, reach, 3):
            content[place] = random.integers(256)
        if turn % 5 == 0:
            del content[int(random.integers(100, len(content))) :]
        try:
            expected = by_pillow(bytes(content))
        except Exception:
            expected = None
        if expected is None:
            outcomes["refused"] += 1
            with pytest.raises(BadImage):
                Decoder()(bytes(content), "x")
        else:
            outcomes["read"] += 1
            assert (Decoder()(bytes(content), "x") == expected).all()
    assert min(outcomes.values()) > 10
