"""A tiny shard set, a tiny model folder, and an evaluation of one on the other."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.common.logs import OWN_LOGGERS
from data_prep.shards.reader import ShardSet, open_shard_set
from pipeline.evaluate.cache import TaskCache
from pipeline.evaluate.context import Evaluation, start_accelerator
from pipeline.evaluate.options import Sizes
from pipeline.model_folder.convert import load_model_folder
from pipeline.weights.model_files import model_digest
from tests.pipeline.evaluate.tiny_sets import (
    random_images,
    random_palette,
    separable_images,
    write_model,
    write_shard_set,
)
from tests.pipeline.evaluate.toy_network import write_toy_network


@pytest.fixture(autouse=True)
def log_level(caplog: pytest.LogCaptureFixture) -> None:
    """What a test calls in its own process logs from INFO on, as the programs do."""
    for name in OWN_LOGGERS:
        caplog.set_level(logging.INFO, logger=name)


@pytest.fixture(scope="session")
def shards_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {
        "train": random_images(330, 1, unlabelled=7),
        "valid": random_images(110, 2),
        "test": random_images(130, 3, unlabelled=3),
    }
    return write_shard_set(tmp_path_factory.mktemp("shards"), splits, random_palette())


@pytest.fixture(scope="session")
def shards(shards_folder: Path) -> ShardSet:
    return open_shard_set(shards_folder)


@pytest.fixture(scope="session")
def separable(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A shard set with separable classes."""
    splits = {
        "train": separable_images(240, 1, unlabelled=40),
        "valid": separable_images(90, 2),
        "test": separable_images(100, 3),
    }
    return open_shard_set(write_shard_set(tmp_path_factory.mktemp("separable"), splits, random_palette()))


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each block."""
    root = tmp_path_factory.mktemp("models")
    return {block: write_model(root / block, block) for block in ("igpt", "gpt2")}


@pytest.fixture(scope="session")
def model_folder(model_folders: dict[str, Path]) -> Path:
    return model_folders["igpt"]


@pytest.fixture(scope="session")
def masked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked model."""
    return write_model(tmp_path_factory.mktemp("masked") / "model", objective="masked_color")


@pytest.fixture(scope="session")
def toy_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript file that gives mean colors: a quick feature network for the Fréchet distance."""
    return write_toy_network(tmp_path_factory.mktemp("network") / "toy.pt")


@pytest.fixture
def evaluation_of(shards: ShardSet, tmp_path: Path) -> Callable[..., Evaluation]:
    """Makes an evaluation of a model folder on the shard set (or on another), with any sizes."""

    def make(folder: Path, shards: ShardSet = shards, features: str = "features", **sizes: int) -> Evaluation:
        results = tmp_path / "results"
        return Evaluation(
            model=load_model_folder(folder),
            shards=shards,
            results=results,
            accelerator=start_accelerator("fp32"),
            seed=0,
            sizes=Sizes(**sizes),
            cache=TaskCache.of_task(results, "test", "0" * 64),
            features=tmp_path / features,
            model_digest=model_digest(folder),
        )

    return make


@pytest.fixture(scope="session")
def one_thread() -> dict[str, str]:
    """The environment of a process started by a test."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
