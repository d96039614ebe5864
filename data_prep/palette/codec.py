"""The palette: fitting, saving and loading it, and encoding images to tokens and back.

A palette is float32 (V, 3): red, green, blue in [-1, 1], the convention of `ImageGPTImageProcessor.clusters`.
A token is the index of the nearest color by squared distance in that space.
"""

import hashlib
import io
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_prep.common.contents import described
from data_prep.common.files import atomic_write
from data_prep.common.seeding import generator

CODES = 1 << 24
"""Number of 24-bit colors; a code is red << 16 | green << 8 | blue."""
ITERATIONS = 25
START_PIXELS = 1 << 16
"""Number of pixels in the sample from which the initial centroids are drawn."""
ENCODE_BATCH = 65_536
"""Pixels encoded at a time: few enough for their codes to fit into the processor's cache."""
CELL = 16
"""The lookup table is built in cubes of CELL x CELL x CELL colors."""


def palette_sha256(palette: np.ndarray) -> str:
    """sha256 of the palette's values, in hex. Shards, runs, models and results record it."""
    return hashlib.sha256(np.ascontiguousarray(palette, "<f4").tobytes()).hexdigest()


def save_palette(path: Path, palette: np.ndarray) -> None:
    """Writes a palette as .npy, atomically."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, palette.astype("<f4"), allow_pickle=False)


def load_palette(path: Path, colors: int, key: str = "palette.file") -> np.ndarray:
    """float32 (colors, 3). Raises ValueError naming `key` and the file if it isn't a palette with that many colors."""
    if not path.is_file():
        raise ValueError(f"{key} {path} does not exist; it must be a palette.npy.")
    return parse_palette(path.read_bytes(), f"{key} {path}", colors)


def parse_palette(content: bytes, name: str, colors: int) -> np.ndarray:
    """Like `load_palette`, from the content of a palette.npy; `name` is for messages."""
    try:
        palette = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        what = f"it is {known}" if (known := described(content)) else error
        raise ValueError(f"{name} is not a valid .npy file ({what}); it must be a palette.npy.") from error
    found = f"{palette.dtype} {palette.shape}" if isinstance(palette, np.ndarray) else "an archive"
    if not isinstance(palette, np.ndarray) or palette.dtype != np.float32 or palette.shape != (colors, 3):
        rows = palette.shape[0] if isinstance(palette, np.ndarray) and palette.shape[1:] == (3,) else None
        mend = f"set palette.colors to {rows}, or name another file" if rows else "with palette.colors rows"
        raise ValueError(f"{name} contains {found}; it must contain float32 ({colors}, 3) in [-1, 1]: {mend}.")
    if not (np.abs(palette) <= 1).all():
        raise ValueError(f"{name} has values outside [-1, 1]; it must contain colors scaled to [-1, 1].")
    return palette


def color_codes(pixels: np.ndarray) -> np.ndarray:
    """Pixels uint8 (..., 3) to their codes uint32 (...)."""
    codes = pixels[..., 0].astype(np.uint32)
    for channel in (1, 2):
        codes <<= 8
        codes |= pixels[..., channel]
    return codes


def code_levels(codes: np.ndarray) -> np.ndarray:
    """Codes (N,) to their colors in [-1, 1], float32 (N, 3)."""
    channels = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1)
    return _levels().astype(np.float32)[channels]


def _levels() -> np.ndarray:
    """The 256 values of a channel in [-1, 1], rounded to float32 at the same steps as in `ImageGPTImageProcessor`."""
    rescaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    return ((rescaled - np.float32(0.5)) / np.float32(0.5)).astype(np.float64)


def fit_palette(histogram: np.ndarray, colors: int, seed: int) -> np.ndarray:
    """k-means on all pixels at once: each distinct color is weighted by its number of pixels.

    histogram: int64 (2**24,), pixels of each code. Returns float32 (colors, 3), the same bytes for the same
    histogram. If there are no more than `colors` distinct colors, each is stored exactly, and the last one is
    repeated to fill the palette; no token refers to these copies.
    """
    codes = np.flatnonzero(histogram)
    assert len(codes)
    points, counts = code_levels(codes), histogram[codes]
    if len(codes) <= colors:
        return points[np.minimum(np.arange(colors), len(codes) - 1)]
    import faiss

    # With threads, the order of additions and so the last bits would depend on the number of cores.
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans = faiss.Kmeans(
            3, colors, niter=ITERATIONS, seed=seed % 2**31, min_points_per_centroid=1, max_points_per_centroid=CODES
        )
        kmeans.train(
            points, weights=counts.astype(np.float32), init_centroids=_initial_centroids(points, counts, colors, seed)
        )
    finally:
        faiss.omp_set_num_threads(threads)
    assert kmeans.centroids is not None
    return np.clip(kmeans.centroids, -1, 1).astype(np.float32)


def _initial_centroids(points: np.ndarray, counts: np.ndarray, colors: int, seed: int) -> np.ndarray:
    """k-means++: each centroid is drawn from a sample of pixels, by squared distance to the earlier centroids."""
    random = generator(seed, "palette")
    sample = points
    weights = counts.astype(np.float64)
    if len(points) > START_PIXELS:
        drawn = random.choice(len(points), START_PIXELS, p=weights / weights.sum())
        chosen, times = np.unique(drawn, return_counts=True)
        sample, weights = points[chosen], times.astype(np.float64)
    distances = np.full(len(sample), np.inf)
    centroids = np.empty((colors, 3), np.float32)
    for number in range(colors):
        mass = np.cumsum(weights if number == 0 else weights * distances)
        centroids[number] = sample[np.searchsorted(mass, random.random() * mass[-1], side="right")]
        distances = np.minimum(distances, ((sample - centroids[number]) ** 2).sum(axis=1))
    return centroids


def lookup_table(palette: np.ndarray) -> np.ndarray:
    """The nearest color of every 24-bit code: uint16 (2**24,). Exact; of equal distances, the lowest index wins.

    Takes a second; the last two tables are cached.
    """
    return _lookup_table(np.ascontiguousarray(palette, "<f4").tobytes())


@lru_cache(maxsize=2)
def _lookup_table(palette_bytes: bytes) -> np.ndarray:
    palette = np.frombuffer(palette_bytes, "<f4").reshape(-1, 3).astype(np.float64)
    levels = _levels()
    table = np.empty((256, 256, 256), np.uint16)
    starts = range(0, 256, CELL)
    centers = np.array([levels[start : start + CELL].mean() for start in starts])
    # Each color of a cell is within `radius` of the cell's center, so its nearest palette entry is at most
    # two radii further from the center than the entry nearest to the center.
    radius = np.sqrt(3) * max(np.abs(levels[:CELL] - centers[0])) * 1.001
    for red in starts:
        for green in starts:
            row = np.stack(np.broadcast_arrays(centers[red // CELL], centers[green // CELL], centers), axis=1)
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
    # Sums that should be equal may differ in their last bits. Scaling by a power of two is exact, and rounding then
    # makes them equal, so that argmin takes the first.
    red, green, blue = (
        (axis[:, None] - colors[:, channel]) ** 2 * 2.0**44 for channel, axis in enumerate(axes)
    )  # each (CELL, C)
    distances = (red[:, None] + green)[:, :, None] + blue  # (CELL, CELL, CELL, C)
    return np.rint(distances, out=distances).argmin(axis=-1)


def encode(images: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Images uint8 (..., H, W, 3) to tokens uint16 (..., H*W) in raster order; `table` is from `lookup_table`."""
    *batch, height, width, _ = images.shape
    colors = images.reshape(-1, 3)
    tokens = np.empty(len(colors), np.uint16)
    for start in range(0, len(colors), ENCODE_BATCH):
        part = slice(start, start + ENCODE_BATCH)
        np.take(table, color_codes(colors[part]), out=tokens[part], mode="clip")  # no code is out of range
    return tokens.reshape(*batch, height * width)


def decode(tokens: np.ndarray, palette: np.ndarray, resolution: int) -> np.ndarray:
    """Tokens (..., T) to images uint8 (..., H, W, 3), with H = W = resolution."""
    colors = np.rint(127.5 * (palette.astype(np.float64) + 1)).astype(np.uint8)
    return np.take(colors, tokens, axis=0).reshape(*tokens.shape[:-1], resolution, resolution, 3)
