"""The palette: fitted, stored, and used to turn pictures into tokens and back.

A palette is float32 (V, 3): red, green, blue in [-1, 1], the convention of `ImageGPTImageProcessor.clusters`.
A token is the number of the nearest colour by squared distance in that space.
"""

import hashlib
import io
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_prep.common.files import atomic_write
from data_prep.common.seeding import generator

CODES = 1 << 24
"""Number of 24-bit colours; a code is red << 16 | green << 8 | blue."""
ITERATIONS = 25
START_PIXELS = 1 << 16
"""Pixels among which the fit's first centres are drawn."""
ENCODED_AT_ONCE = 65_536
"""Pixels: few enough for the codes to stay in the processor's cache."""
CELL = 16
"""The lookup table is built in cubes of CELL x CELL x CELL colours."""


def palette_sha256(palette: np.ndarray) -> str:
    """Hex digest of the palette's numbers: what shards, runs, models and results carry along."""
    return hashlib.sha256(np.ascontiguousarray(palette, "<f4").tobytes()).hexdigest()


def save_palette(path: Path, palette: np.ndarray) -> None:
    """Writes a palette as .npy, atomically."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, palette.astype("<f4"), allow_pickle=False)


def load_palette(path: Path, colors: int, key: str = "palette.file") -> np.ndarray:
    """float32 (colors, 3). Raises ValueError naming `key` and the file if it isn't a palette of that many colours."""
    if not path.is_file():
        raise ValueError(f"{key} {path} does not exist; it must be a palette.npy.")
    return parse_palette(path.read_bytes(), f"{key} {path}", colors)


def parse_palette(content: bytes, name: str, colors: int) -> np.ndarray:
    """As `load_palette`, from the content of a palette.npy; `name` stands in messages."""
    try:
        palette = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{name} is not readable as .npy ({error}).") from error
    found = f"{palette.dtype} {palette.shape}" if isinstance(palette, np.ndarray) else "an archive"
    if not isinstance(palette, np.ndarray) or palette.dtype != np.float32 or palette.shape != (colors, 3):
        raise ValueError(
            f"{name} holds {found}; it must hold float32 ({colors}, 3), by palette.colors, scaled to [-1, 1]."
        )
    if not (np.abs(palette) <= 1).all():
        raise ValueError(f"{name} has numbers outside [-1, 1]; it must hold colours scaled to [-1, 1].")
    return palette


def color_codes(pixels: np.ndarray) -> np.ndarray:
    """uint8 (..., 3) to uint32 (...)."""
    codes = pixels[..., 0].astype(np.uint32)
    for channel in (1, 2):
        codes <<= 8
        codes |= pixels[..., channel]
    return codes


def code_levels(codes: np.ndarray) -> np.ndarray:
    """Codes (N,) to their colours in [-1, 1], float32 (N, 3)."""
    channels = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1)
    return _levels().astype(np.float32)[channels]


def _levels() -> np.ndarray:
    """The 256 values of a channel in [-1, 1], rounded where `ImageGPTImageProcessor` rounds them (float32)."""
    rescaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    return ((rescaled - np.float32(0.5)) / np.float32(0.5)).astype(np.float64)


def fit_palette(histogram: np.ndarray, colors: int, seed: int) -> np.ndarray:
    """k-means on all pixels at once: each distinct colour weighted by how often it occurs.

    histogram: int64 (2**24,), pixels of each code. Returns float32 (colors, 3), the same bytes for the same
    histogram. Images of no more than `colors` distinct colours keep each exactly, and the last one is
    repeated in the places left over, which no token then names.
    """
    codes = np.flatnonzero(histogram)
    assert len(codes)
    points, counts = code_levels(codes), histogram[codes]
    if len(codes) <= colors:
        return points[np.minimum(np.arange(colors), len(codes) - 1)]
    import faiss

    # Threads would add the same numbers in another order, and the last bits would depend on the machine's cores.
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans = faiss.Kmeans(
            3, colors, niter=ITERATIONS, seed=seed % 2**31, min_points_per_centroid=1, max_points_per_centroid=CODES
        )
        kmeans.train(
            points, weights=counts.astype(np.float32), init_centroids=_first_centres(points, counts, colors, seed)
        )
    finally:
        faiss.omp_set_num_threads(threads)
    assert kmeans.centroids is not None
    return np.clip(kmeans.centroids, -1, 1).astype(np.float32)


def _first_centres(points: np.ndarray, counts: np.ndarray, colors: int, seed: int) -> np.ndarray:
    """k-means++: each centre drawn from a sample of pixels, by squared distance to the centres so far."""
    random = generator(seed, "palette")
    sample = points
    weights = counts.astype(np.float64)
    if len(points) > START_PIXELS:
        drawn = random.choice(len(points), START_PIXELS, p=weights / weights.sum())
        chosen, times = np.unique(drawn, return_counts=True)
        sample, weights = points[chosen], times.astype(np.float64)
    distances = np.full(len(sample), np.inf)
    centres = np.empty((colors, 3), np.float32)
    for number in range(colors):
        mass = np.cumsum(weights if number == 0 else weights * distances)
        centres[number] = sample[np.searchsorted(mass, random.random() * mass[-1], side="right")]
        distances = np.minimum(distances, ((sample - centres[number]) ** 2).sum(axis=1))
    return centres


def lookup_table(palette: np.ndarray) -> np.ndarray:
    """The nearest colour of every 24-bit code: uint16 (2**24,). Exact; equal distances give the lowest number.

    Takes a second; the last few are kept in memory.
    """
    return _lookup_table(np.ascontiguousarray(palette, "<f4").tobytes())


@lru_cache(maxsize=2)
def _lookup_table(palette_bytes: bytes) -> np.ndarray:
    palette = np.frombuffer(palette_bytes, "<f4").reshape(-1, 3).astype(np.float64)
    levels = _levels()
    table = np.empty((256, 256, 256), np.uint16)
    starts = range(0, 256, CELL)
    centres = np.array([levels[start : start + CELL].mean() for start in starts])
    # A colour of a cell lies within `radius` of the cell's centre, so its nearest palette entry is at most
    # two radii further from the centre than the entry nearest to the centre.
    radius = np.sqrt(3) * max(np.abs(levels[:CELL] - centres[0])) * 1.001
    for red in starts:
        for green in starts:
            row = np.stack(np.broadcast_arrays(centres[red // CELL], centres[green // CELL], centres), axis=1)
            distances = np.sqrt(((row[:, None] - palette) ** 2).sum(axis=2))  # (256 / CELL, V)
            near = distances <= distances.min(axis=1, keepdims=True) + 2 * radius
            for blue, candidates in zip(starts, map(np.flatnonzero, near), strict=True):
                cell = tuple(slice(start, start + CELL) for start in (red, green, blue))
                table[cell] = candidates[_nearest([levels[part] for part in cell], palette[candidates])]
    flat = table.reshape(CODES)
    flat.flags.writeable = False
    return flat


def _nearest(axes: list[np.ndarray], colors: np.ndarray) -> np.ndarray:
    """The nearest of `colors` (C, 3) for each point of the grid that three axes span."""
    # Scaling by a power of two is exact. Rounding then makes equal what is equal but for the last bits of the sum,
    # and argmin takes the first.
    red, green, blue = (
        (axis[:, None] - colors[:, channel]) ** 2 * 2.0**44 for channel, axis in enumerate(axes)
    )  # each (CELL, C)
    distances = (red[:, None] + green)[:, :, None] + blue  # (CELL, CELL, CELL, C)
    return np.rint(distances, out=distances).argmin(axis=-1)


def encode(pictures: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Images uint8 (..., H, W, 3) to tokens uint16 (..., H*W) in raster order; `table` is `lookup_table`'s."""
    *batch, height, width, _ = pictures.shape
    colors = pictures.reshape(-1, 3)
    tokens = np.empty(len(colors), np.uint16)
    for start in range(0, len(colors), ENCODED_AT_ONCE):
        part = slice(start, start + ENCODED_AT_ONCE)
        np.take(table, color_codes(colors[part]), out=tokens[part], mode="clip")  # no code is out of range
    return tokens.reshape(*batch, height * width)


def decode(tokens: np.ndarray, palette: np.ndarray, resolution: int) -> np.ndarray:
    """Tokens (..., T) to pictures uint8 (..., H, W, 3), with H = W = resolution."""
    colors = np.rint(127.5 * (palette.astype(np.float64) + 1)).astype(np.uint8)
    return np.take(colors, tokens, axis=0).reshape(*tokens.shape[:-1], resolution, resolution, 3)
