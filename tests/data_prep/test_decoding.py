import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_prep.decoding import BadPicture, Decoder
from data_prep.views import area_resize


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def photograph(small: tuple[np.ndarray, np.ndarray]) -> Image.Image:
    return Image.fromarray(small[0][0][:, :24])


def test_rgb_is_read_as_it_is(photograph: Image.Image) -> None:
    assert (Decoder()(encoded(photograph, "PNG"), "x") == np.asarray(photograph)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("orientation", "turn"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)])
def test_pictures_are_turned_upright(
    photograph: Image.Image, kind: str, orientation: int, turn: Image.Transpose
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Decoder()(encoded(photograph, kind, exif=exif), "x")
    stored = Decoder()(encoded(photograph, kind), "x")
    assert (upright == np.asarray(Image.fromarray(stored).transpose(turn))).all()


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("P", "PNG"), ("L", "JPEG"), ("1", "PNG"), ("LA", "PNG")])
def test_other_modes_become_rgb_as_pillow_converts_them(photograph: Image.Image, mode: str, kind: str) -> None:
    content = encoded(photograph.convert(mode), kind)
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == mode
        assert (Decoder()(content, "x") == np.asarray(image.convert("RGB"))).all()


def test_transparency_is_dropped(photograph: Image.Image) -> None:
    clear = photograph.copy()
    clear.putalpha(0)
    assert (Decoder()(encoded(clear, "PNG"), "x") == np.asarray(photograph)).all()


def test_sixteen_bits_keep_the_upper_eight() -> None:
    grey = (np.arange(256, dtype=np.uint16) * 256 + 99).reshape(16, 16)
    picture = Decoder()(encoded(Image.fromarray(grey), "PNG"), "x")
    assert (picture == (grey >> 8)[:, :, None]).all()


def test_a_damaged_exif_block_does_not_spoil_the_picture(photograph: Image.Image) -> None:
    content = encoded(photograph, "JPEG", exif=b"Exif\x00\x00garbage that is no TIFF header")
    assert Decoder()(content, "x").shape == (32, 24, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"no picture", "not a picture"), (b"\x89PNG\r\n\x1a\n" + bytes(20), "truncated")],
)
def test_what_is_no_picture_is_named_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(BadPicture) as caught:
        Decoder()(content, "some/file.png")
    assert (caught.value.name, caught.value.reason) == ("some/file.png", reason)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_a_truncated_picture_is_an_error_not_half_grey(photograph: Image.Image, kind: str) -> None:
    content = encoded(photograph, kind)
    with pytest.raises(BadPicture, match=r"a\.jpg is (truncated|damaged)"):
        Decoder()(content[: len(content) // 2], "a.jpg")


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"quality": 30}])
@pytest.mark.parametrize("size", [(256, 192), (37, 51), (1, 5), (8, 9)])
def test_jpegs_are_decoded_as_pillow_does(
    subsampling: int, options: dict[str, object], size: tuple[int, int], large: Image.Image
) -> None:
    """simplejpeg and Pillow share libjpeg's arithmetic, but not its version: single steps may differ."""
    content = encoded(large.resize(size), "JPEG", subsampling=subsampling, **options)
    ours, reference = Decoder()(content, "x").astype(int), np.asarray(Image.open(io.BytesIO(content))).astype(int)
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= 2
    assert np.abs(ours - reference).mean() < 0.02


@pytest.fixture(scope="session")
def large() -> Image.Image:
    """A whole photograph."""
    import skimage.data

    return Image.fromarray(skimage.data.astronaut())


@pytest.mark.parametrize("side", [20, 64, 100, 200, 600])
def test_scaled_decoding_keeps_the_side_it_is_asked_for(side: int, large: Image.Image) -> None:
    content = encoded(large, "JPEG", quality=90)
    scaled, exact = Decoder(side)(content, "x"), Decoder()(content, "x")
    assert min(scaled.shape[:2]) >= min(side, 512)
    assert (min(scaled.shape[:2]) < 512) == (side <= 200)
    views = [area_resize(picture, 16).astype(float) for picture in (scaled, exact)]
    assert np.square(views[0] - views[1]).mean() < 10


def test_upright_in_all_eight_orientations(large: Image.Image) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(large.resize((24, 16)), "JPEG", exif=exif)
        reference = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        assert np.abs(Decoder()(content, "x").astype(int) - np.asarray(reference).astype(int)).max() <= 2
