"""Square crops (windows) of the color photographs in the packages scikit-image and scikit-learn.

Each photograph is a class. Training windows are in its left 70%, validation windows in the upper half of the right
30%, and test windows in the lower half of the right 30%. Windows that cross a border are dropped, so no pixel is in
two splits. The smallest of these parts, 136 x 150 pixels of the cat, has room for windows of 64 pixels.

With `source.regions: grid` the windows are in the cells of a grid of 4 x 4 instead (GRID), so that the splits share no
pixel but show similar parts. The smallest cell, 112 x 75 pixels of the cat, has room for windows of 48 pixels.

With `source.equalized_side` the windows are gray, and each brightness occurs equally often in every window. Then color
histograms are equal for all windows, and only the arrangement of the pixels tells the photographs apart.
"""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from data_prep.config import SourceConfig
from data_prep.images.crops import area_resize
from data_prep.images.decode import Decode, Decoder
from data_prep.sources.base import Images, Source, fingerprint

PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
}
TRAIN_PART = 0.7
SMALLEST, LARGEST = 64, 256
"""A window's side in pixels."""
GRID = (
    ("train", "test", "valid", "train"),
    ("valid", "train", "train", "test"),
    ("test", "train", "train", "valid"),
    ("train", "valid", "test", "train"),
)
"""The split of each cell, with `regions: grid`."""
SMALLEST_IN_CELL = 48
LUMINANCE = (299, 587, 114)
"""Weights of red, green and blue (Rec. 601), in thousandths: sums of integers are the same on every machine."""
WINDOW_SEED = 0
"""The windows are part of the dataset: they do not depend on the configuration's seed."""


class Windows(Images):
    """Square windows of a few photographs."""

    def __init__(self, files: list[Path], labels: np.ndarray, boxes: np.ndarray, equalized_side: int = 0) -> None:
        """labels: the index of the photograph (N,); boxes: left, top, side in pixels (N, 3).

        equalized_side: the side in pixels of gray windows with equalized histograms; 0 for color at full size."""
        self.files, self.boxes, self.labels = files, boxes, labels.astype(np.int32)
        self.equalized_side = equalized_side

    def image(self, index: int, decode: Decode) -> np.ndarray:
        """The window; `decode` is not used, since the boxes are for the full size."""
        left, top, side = self.boxes[index]
        window = _photograph(self.files[self.labels[index]])[top : top + side, left : left + side]
        return equalized(area_resize(window, self.equalized_side)) if self.equalized_side else window


def open_source(config: SourceConfig) -> Source:
    """Draws `train_per_class`, `valid_per_class`, `test_per_class` windows of up to 256 pixels per photograph."""
    files = [_package_folder(package) / name for package, name in PHOTOGRAPHS.values()]
    counts = {"train": config.train_per_class, "valid": config.valid_per_class, "test": config.test_per_class}
    sizes = [_photograph(file).shape[:2] for file in files]
    draw = draw_in_cells if config.regions == "grid" else draw_windows
    drawn = [draw(height, width, counts, label) for label, (height, width) in enumerate(sizes)]
    splits: dict[str, Images] = {
        split: Windows(
            files,
            np.repeat(np.arange(len(files)), count),
            np.concatenate([boxes[split] for boxes in drawn]),
            config.equalized_side,
        )
        for split, count in counts.items()
    }
    changes = [
        *(["grid"] if config.regions == "grid" else []),
        *([f"equalized {config.equalized_side}"] if config.equalized_side else []),
    ]
    known = fingerprint([*PHOTOGRAPHS, counts, *changes])
    return Source("photographs", list(PHOTOGRAPHS), splits, {}, known, cropped=True)


def parts(height: int, width: int) -> dict[str, tuple[int, int, int, int]]:
    """The part of a photograph for the windows of each split: left, top, right, bottom in pixels."""
    border, middle = int(TRAIN_PART * width), height // 2
    return {
        "train": (0, 0, border, height),
        "valid": (border, 0, width, middle),
        "test": (border, middle, width, height),
    }


def draw_windows(height: int, width: int, counts: dict[str, int], label: int) -> dict[str, np.ndarray]:
    """Random windows of a photograph, `counts` of each split: left, top, side as int64 (count, 3)."""
    random = np.random.default_rng([WINDOW_SEED, label])
    areas = parts(height, width)
    accepted: dict[str, list[tuple[int, int, int]]] = {split: [] for split in counts}
    while any(len(accepted[split]) < count for split, count in counts.items()):
        side = int(random.integers(SMALLEST, min(LARGEST, height) + 1))
        left, top = int(random.integers(0, width - side + 1)), int(random.integers(0, height - side + 1))
        for split, (first_x, first_y, last_x, last_y) in areas.items():
            inside = first_x <= left and left + side <= last_x and first_y <= top and top + side <= last_y
            if inside and len(accepted[split]) < counts[split]:
                accepted[split].append((left, top, side))
    return {split: np.array(boxes) for split, boxes in accepted.items()}


def draw_in_cells(height: int, width: int, counts: dict[str, int], label: int) -> dict[str, np.ndarray]:
    """Random windows within the cells of GRID, `counts` of each split: left, top, side as int64 (count, 3)."""
    cell_height, cell_width = height // len(GRID), width // len(GRID)
    boxes = {}
    for split, count in counts.items():
        random = np.random.default_rng([WINDOW_SEED, label, list(counts).index(split)])
        cells = np.argwhere(np.array(GRID) == split)  # (cells, 2): row and column
        rows, columns = cells[random.integers(0, len(cells), count)].T  # (count,)
        sides = random.integers(SMALLEST_IN_CELL, min(LARGEST, cell_height, cell_width) + 1, count)
        left = columns * cell_width + random.integers(0, cell_width - sides + 1)
        top = rows * cell_height + random.integers(0, cell_height - sides + 1)
        boxes[split] = np.stack([left, top, sides], axis=1)
    return boxes


def equalized(window: np.ndarray) -> np.ndarray:
    """A window uint8 (S, S, 3) in gray with an equalized histogram, of the same shape.

    A pixel's gray is its rank by luminance, from 0 for the darkest to 255 for the brightest. Equal ones are ranked in
    reading order, so that every window has exactly the same grays: at 16 x 16 pixels, each of the 256 once.
    """
    luminance = window.reshape(-1, 3).astype(np.int64) @ np.array(LUMINANCE)  # (S * S,)
    grays = np.empty(len(luminance), np.uint8)
    grays[np.argsort(luminance, kind="stable")] = np.arange(len(luminance)) * 256 // len(luminance)
    return np.repeat(grays.reshape(*window.shape[:2], 1), 3, axis=2)


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"source.kind photographs needs the package {package}; install requirements.txt.")
    return Path(spec.origin).parent


@lru_cache(maxsize=len(PHOTOGRAPHS))
def _photograph(file: Path) -> np.ndarray:
    return Decoder()(file.read_bytes(), str(file))
