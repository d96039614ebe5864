"""Windows of the colour photographs that scikit-image's and scikit-learn's packages bring along.

A class is a photograph. Training windows lie in its left 70%, test windows in its right 30%; a window on
the border is dropped, so no pixel is in both. A validation split taken off the training windows overlaps
them: it measures the fit, the test split what generalises.
"""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from data_prep.config import SourceConfig
from data_prep.sources.base import Source, decode_picture, fingerprint

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
WINDOW_SEED = 0
"""The windows are part of the data set: the configuration's seed does not move them."""


class Windows:
    """Square windows of a few photographs."""

    def __init__(self, files: list[Path], labels: np.ndarray, boxes: np.ndarray) -> None:
        """labels: which photograph (N,); boxes: left, top, side in pixels (N, 3)."""
        self.files, self.boxes, self.labels = files, boxes, labels.astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> np.ndarray:
        left, top, side = self.boxes[index]
        return _photograph(self.files[self.labels[index]])[top : top + side, left : left + side]


def open_source(config: SourceConfig) -> Source:
    """Cuts `train_per_class` and `test_per_class` windows of 64 to 256 pixels from each photograph."""
    files = [_package_folder(package) / name for package, name in PHOTOGRAPHS.values()]
    train, test = [], []
    for label, file in enumerate(files):
        height, width = _photograph(file).shape[:2]
        left, right = cut_windows(width, height, config.train_per_class, config.test_per_class, label)
        train.append(left)
        test.append(right)
    return Source(
        name="photographs",
        classes=list(PHOTOGRAPHS),
        splits={"train": _windows(files, train), "test": _windows(files, test)},
        streams={},
        fingerprint=fingerprint([*PHOTOGRAPHS, config.train_per_class, config.test_per_class]),
        cropped=True,
    )


def cut_windows(width: int, height: int, train: int, test: int, label: int) -> tuple[np.ndarray, np.ndarray]:
    """Random windows of a photograph until both counts are reached: left, top, side as (train, 3), (test, 3)."""
    random = np.random.default_rng([WINDOW_SEED, label])
    border = int(TRAIN_PART * width)
    kept: list[list[tuple[int, int, int]]] = [[], []]
    wanted = (train, test)
    while any(len(have) < want for have, want in zip(kept, wanted, strict=True)):
        side = int(random.integers(SMALLEST, min(LARGEST, height) + 1))
        left, top = int(random.integers(0, width - side + 1)), int(random.integers(0, height - side + 1))
        if left < border < left + side:
            continue
        part = int(left >= border)
        if len(kept[part]) < wanted[part]:
            kept[part].append((left, top, side))
    return np.array(kept[0]), np.array(kept[1])


def _windows(files: list[Path], boxes: list[np.ndarray]) -> Windows:
    labels = np.repeat(np.arange(len(files)), [len(some) for some in boxes])
    return Windows(files, labels, np.concatenate(boxes))


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"source.kind photographs needs the package {package}; install requirements.txt.")
    return Path(spec.origin).parent


@lru_cache(maxsize=len(PHOTOGRAPHS))
def _photograph(file: Path) -> np.ndarray:
    return decode_picture(file.read_bytes(), str(file))
