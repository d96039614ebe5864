from pathlib import Path

import numpy as np
import pytest

from data_prep.palette.codec import (
    CODES,
    color_codes,
    decode,
    encode,
    fit_palette,
    load_palette,
    lookup_table,
    palette_sha256,
    save_palette,
)


def histogram_of(pixels: np.ndarray) -> np.ndarray:
    return np.bincount(color_codes(pixels).ravel(), minlength=CODES)


@pytest.fixture(scope="module")
def palette(small: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return fit_palette(histogram_of(small[0]), 512, seed=0)


def reference_tokens(images: np.ndarray, palette: np.ndarray) -> np.ndarray:
    from transformers import ImageGPTImageProcessor

    processor = ImageGPTImageProcessor(clusters=palette.tolist(), do_resize=False)
    return np.asarray(processor(list(images), return_tensors="np")["input_ids"])


def test_tokens_equal_the_image_processors(palette: np.ndarray, small: tuple[np.ndarray, np.ndarray]) -> None:
    table = lookup_table(palette)
    random = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)  # 10,240 random pixels
    for images in (random, small[0]):
        assert (encode(images, table) == reference_tokens(images, palette)).all()


def test_table_is_exact_everywhere(palette: np.ndarray) -> None:
    """Brute force in float64 for every color of 40 planes of the cube."""
    table = lookup_table(palette)
    colors = palette.astype(np.float64)
    for red in np.random.default_rng(1).choice(256, 40, replace=False):
        codes = np.arange(red << 16, (red << 16) + 65536, 7)
        channels = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)
        x = ((channels * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
        distances = (x.astype(np.float64) ** 2).sum(1)[:, None] - 2 * x @ colors.T + (colors**2).sum(1)
        assert (distances.argmin(axis=1) == table[codes]).all()


def test_equal_distances_give_the_lowest_index() -> None:
    symmetric = np.array([[0.5, -0.5, 0], [-0.5, 0.5, 0], [0.5, -0.5, 0], [-0.5, 0.5, 0]], np.float32)
    tokens = encode(
        np.array([[[[90, 90, 10], [255, 0, 0]], [[200, 200, 200], [0, 255, 0]]]], np.uint8), lookup_table(symmetric)
    )
    assert tokens.tolist() == [[0, 0, 0, 1]]


def test_decoding_rounds_as_in_the_paper(palette: np.ndarray) -> None:
    tokens = np.arange(512, dtype=np.uint16).reshape(2, 256)
    images = decode(tokens, palette, 16)
    assert images.dtype == np.uint8
    assert images.shape == (2, 16, 16, 3)
    expected = np.rint(127.5 * (palette.astype(np.float64) + 1))
    assert (images.reshape(-1, 3) == expected).all()


def test_tokens_survive_decoding(palette: np.ndarray) -> None:
    """Encoding decoded images returns the same colors: raster order and channel order are preserved."""
    tokens = np.random.default_rng(0).integers(0, 512, (3, 64))
    images = decode(tokens, palette, 8)
    assert (decode(encode(images, lookup_table(palette)), palette, 8) == images).all()


def mean_squared_error(pixels: np.ndarray, palette: np.ndarray) -> float:
    distances = ((pixels.reshape(-1, 1, 3) / 127.5 - 1 - palette) ** 2).sum(axis=2)
    return float(distances.min(axis=1).mean())


def test_fit_is_as_good_as_scikit_learns(small: tuple[np.ndarray, np.ndarray]) -> None:
    from sklearn.cluster import KMeans

    pixels = small[0][::6]
    ours = mean_squared_error(pixels, fit_palette(histogram_of(pixels), 64, seed=0))
    reference = KMeans(64, n_init=1, max_iter=25, random_state=0).fit(pixels.reshape(-1, 3) / 127.5 - 1)
    theirs = reference.inertia_ / pixels[..., 0].size
    assert ours < 1.08 * theirs


def test_fit_weights_colors_by_their_pixels() -> None:
    pixels = np.array([[0, 0, 0]] * 999 + [[4, 0, 0]] + [[255, 255, 255]] * 10, np.uint8)
    palette = fit_palette(histogram_of(pixels), 2, seed=0)
    dark = palette[palette[:, 1].argmin()]
    assert 127.5 * (dark[0] + 1) == pytest.approx(4 / 1000, abs=1e-3)


def test_fit_is_a_function_of_histogram_and_seed(small: tuple[np.ndarray, np.ndarray]) -> None:
    histogram = histogram_of(small[0])
    first = fit_palette(histogram, 32, seed=0)
    assert palette_sha256(fit_palette(histogram, 32, seed=0)) == palette_sha256(first)
    assert palette_sha256(fit_palette(histogram, 32, seed=1)) != palette_sha256(first)


def test_fewer_colors_than_palette_colors_are_stored_exactly() -> None:
    pixels = np.array([[[[0, 0, 0], [255, 0, 9]], [[17, 34, 51], [255, 0, 9]]]], np.uint8)
    palette = fit_palette(histogram_of(pixels), 8, seed=0)
    assert palette.shape == (8, 3)
    tokens = encode(pixels, lookup_table(palette))
    assert tokens.max() <= 2
    assert (decode(tokens, palette, 2) == pixels).all()


def test_saved_palette_is_read_back(tmp_path: Path, palette: np.ndarray) -> None:
    save_palette(tmp_path / "palette.npy", palette)
    assert (np.load(tmp_path / "palette.npy") == load_palette(tmp_path / "palette.npy", 512)).all()
    assert (np.load(tmp_path / "palette.npy") == palette).all()


@pytest.mark.parametrize(
    "content",
    [
        np.zeros((512, 3), np.float64),
        np.zeros((511, 3), np.float32),
        np.zeros((3, 512), np.float32),
        np.full((512, 3), 200, np.float32),
        np.full((512, 3), np.nan, np.float32),
    ],
)
def test_an_invalid_palette_is_an_error(tmp_path: Path, content: np.ndarray) -> None:
    np.save(tmp_path / "palette.npy", content)
    with pytest.raises(ValueError, match=r"palette\.file .*palette\.npy"):
        load_palette(tmp_path / "palette.npy", 512)
