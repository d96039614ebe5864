"""CIFAR-10 and CIFAR-100 as published: python or binary version, from the extracted folder or the archive.

https://www.cs.toronto.edu/~kriz/cifar.html describes both layouts.
"""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_prep.config import SourceConfig
from data_prep.sources.base import ImageArray, Source, fingerprint, open_archive

SIDE = 32
PIXEL_BYTES = 3 * SIDE * SIDE


@dataclass(frozen=True)
class Layout:
    """The file names and keys in one version of one dataset."""

    train: tuple[str, ...]
    test: str
    meta: str
    label_key: bytes
    """python version: the key of the labels."""
    names_key: bytes
    """python version: the key of the class names in `meta`."""
    label_bytes: int
    """binary version: number of label bytes before each image, of which the last is used; python version: 0."""
    classes: int

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.meta)


_FIVE = range(1, 6)
LAYOUTS = {
    "cifar10": (
        Layout(tuple(f"data_batch_{n}" for n in _FIVE), "test_batch", "batches.meta", b"labels", b"label_names", 0, 10),
        Layout(tuple(f"data_batch_{n}.bin" for n in _FIVE), "test_batch.bin", "batches.meta.txt", b"", b"", 1, 10),
    ),
    "cifar100": (
        Layout(("train",), "test", "meta", b"fine_labels", b"fine_label_names", 0, 100),
        Layout(("train.bin",), "test.bin", "fine_label_names.txt", b"", b"", 2, 100),
    ),
}


def open_source(config: SourceConfig) -> Source:
    """Reads all images into memory. Raises ValueError naming the file that is missing or damaged."""
    assert config.path is not None
    path = Path(config.path)
    if not path.exists():
        raise ValueError(f"source.path {path} does not exist; it must be the folder or archive of {config.kind}.")
    contents = _folder_contents(path, config.kind) if path.is_dir() else _archive_contents(path, config.kind)
    layout = _layout(contents, config.kind, path)
    classes = _class_names(contents[layout.meta], layout, layout.meta)
    train = [_batch(contents[name], layout, name) for name in layout.train]
    splits = {
        "train": ImageArray(np.concatenate([p for p, _ in train]), np.concatenate([n for _, n in train])),
        "test": ImageArray(*_batch(contents[layout.test], layout, layout.test)),
    }
    sizes = [f"{name} {len(contents[name])}" for name in layout.files]
    return Source(
        {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[config.kind], classes, {**splits}, {}, fingerprint(sizes)
    )


def _wanted(kind: str) -> set[str]:
    return {name for layout in LAYOUTS[kind] for name in layout.files}


def _folder_contents(folder: Path, kind: str) -> dict[str, bytes]:
    """The wanted files in `folder`, or in its one subfolder that has any."""
    for parent in (folder, *sorted(child for child in folder.iterdir() if child.is_dir())):
        found = {name: (parent / name).read_bytes() for name in _wanted(kind) if (parent / name).is_file()}
        if found:
            return found
    return {}


def _archive_contents(archive: Path, kind: str) -> dict[str, bytes]:
    contents = {}
    with open_archive(archive, f"source.path {archive}") as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            if member.isfile() and name in _wanted(kind):
                file = tar.extractfile(member)
                assert file is not None
                contents[name] = file.read()
    return contents


def _layout(contents: dict[str, bytes], kind: str, path: Path) -> Layout:
    layouts = [layout for layout in LAYOUTS[kind] if all(name in contents for name in layout.files)]
    if layouts:
        return layouts[0]
    closest = max(LAYOUTS[kind], key=lambda layout: sum(name in contents for name in layout.files))
    missing = ", ".join(name for name in closest.files if name not in contents)
    raise ValueError(f"source.path {path} has no {missing}; it must contain {kind} in its python or binary version.")


def _class_names(content: bytes, layout: Layout, name: str) -> list[str]:
    if layout.label_bytes:
        names = content.decode("utf-8-sig", "replace").split()
    else:
        names = [str(word, "ascii", "replace") for word in _unpickle(content, name).get(layout.names_key, [])]
    if len(names) != layout.classes:
        raise ValueError(f"{name} has {len(names)} classes, but must have {layout.classes}; download it again.")
    return names


def _batch(content: bytes, layout: Layout, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 32, 32, 3) and labels (N,) of one file."""
    if layout.label_bytes:
        row_bytes = layout.label_bytes + PIXEL_BYTES
        if not content or len(content) % row_bytes:
            raise ValueError(f"{name} has {len(content)} bytes, not a multiple of {row_bytes}; download it again.")
        rows = np.frombuffer(content, np.uint8).reshape(-1, row_bytes)
        labels, flat = rows[:, layout.label_bytes - 1], rows[:, layout.label_bytes :]
    else:
        batch = _unpickle(content, name)
        labels, flat = np.asarray(batch.get(layout.label_key, [])), np.asarray(batch.get(b"data", []))
        if labels.dtype.kind not in "iu" or flat.dtype != np.uint8 or flat.shape != (len(labels), PIXEL_BYTES):
            raise ValueError(f"{name} does not have {PIXEL_BYTES} bytes and a label per image; download it again.")
    if labels.min() < 0 or labels.max() >= layout.classes:
        raise ValueError(f"{name} has a label outside 0 to {layout.classes - 1}; download it again.")
    pixels = flat.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)  # planes of red, green, blue
    return np.ascontiguousarray(pixels), labels


class _ArraysOnly(pickle.Unpickler):
    """Unpickles only the parts of numpy arrays, so that an untrusted file can't run code."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickle(content: bytes, name: str) -> dict[bytes, Any]:
    try:
        value = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise any exception
        raise ValueError(f"{name} is not a batch of CIFAR's python version ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a batch of CIFAR's python version; download it again.")
    return value
