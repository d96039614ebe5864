"""Small datasets made of crops of the embedded photographs, in the layouts that the sources read."""

import pickle
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_prep.config import SourceConfig
from data_prep.images.crops import area_resize
from data_prep.images.decode import Decoder
from data_prep.sources.open import open_source
from tests.data_prep.small_data import planes, write_folder


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs `python -m data_prep ARGUMENTS` in this process."""

    def run_command(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["data_prep", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            runpy.run_module("data_prep", run_name="__main__", alter_sys=True)
        return Result(int(caught.value.code or 0), *capfd.readouterr())

    return run_command


@pytest.fixture(scope="session")
def small() -> tuple[np.ndarray, np.ndarray]:
    """Photographs' windows at 32x32: uint8 (60, 32, 32, 3) and labels 0 to 2, as CIFAR has them."""
    windows = open_source(SourceConfig(kind="photographs", train_per_class=20)).splits["train"]
    return np.stack([area_resize(windows.image(i, Decoder()), 32) for i in range(60)]), windows.labels[:60]


@pytest.fixture
def folder(tmp_path: Path, small: tuple[np.ndarray, np.ndarray]) -> Path:
    """An image folder of 48 training and 12 test images."""
    pixels, labels = small
    test = np.arange(60) % 5 == 0
    write_folder(tmp_path / "pictures/train", pixels[~test], labels[~test])
    write_folder(tmp_path / "pictures/test", pixels[test], labels[test])
    return tmp_path / "pictures"


@pytest.fixture
def options(folder: Path) -> list[str]:
    """The options of a quick preparation of that folder."""
    return [
        *("--source.kind", "image_folder", "--source.path", str(folder), "--resolution", "8"),
        *("--palette.colors", "16", "--valid_fraction", "0.25", "--workers", "1"),
    ]


@pytest.fixture
def shards(tmp_path: Path, options: list[str], run: Callable[..., Result]) -> Path:
    """A shard set of that folder."""
    out = tmp_path / "shards"
    assert run("shards", *options, "--out", out).code == 0
    return out


@pytest.fixture
def write_cifar(tmp_path: Path, small: tuple[np.ndarray, np.ndarray]) -> Callable[[str, str], Path]:
    """Writes 50 training and 10 test images in an official layout: (kind, version) to its folder."""

    def write(kind: str, version: str) -> Path:
        pixels, labels = small
        batches = {"cifar10": [f"data_batch_{n}" for n in range(1, 6)], "cifar100": ["train"]}[kind]
        parts = dict(zip(batches, np.array_split(np.arange(50), len(batches)), strict=True))
        parts["test_batch" if kind == "cifar10" else "test"] = np.arange(50, 60)
        folder = tmp_path / {"cifar10": "cifar-10", "cifar100": "cifar-100"}[kind] / version
        folder.mkdir(parents=True)
        names = [f"class{n}" for n in range(10 if kind == "cifar10" else 100)]
        if version == "binary":
            for name, part in parts.items():
                columns = [labels[part, None]] if kind == "cifar10" else [labels[part, None] + 7, labels[part, None]]
                rows = np.concatenate([*columns, planes(pixels[part])], axis=1).astype(np.uint8)
                (folder / f"{name}.bin").write_bytes(rows.tobytes())
            meta = "batches.meta.txt" if kind == "cifar10" else "fine_label_names.txt"
            (folder / meta).write_text("\n".join(names) + "\n\n")
            return folder
        key = b"labels" if kind == "cifar10" else b"fine_labels"
        for name, part in parts.items():
            batch = {b"data": planes(pixels[part]), key: labels[part].tolist(), b"filenames": [b"a.png"] * len(part)}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        meta, key = ("batches.meta", b"label_names") if kind == "cifar10" else ("meta", b"fine_label_names")
        (folder / meta).write_bytes(pickle.dumps({key: [name.encode() for name in names]}, protocol=2))
        return folder

    return write
