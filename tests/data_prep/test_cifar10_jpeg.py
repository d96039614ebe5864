"""60,000 real images, if CIFAR10_JPEG names an archive of CIFAR-10 as JPEG files: train/<class>/*, test/<class>/*."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.build.plan import make_plan
from data_prep.images.crops import EVALUATION, views_of
from data_prep.palette.codec import encode, lookup_table
from data_prep.shards.reader import open_shard_set
from data_prep.sources.open import open_source

ROOT = Path(__file__).parents[2]
ARCHIVE = Path(os.environ.get("CIFAR10_JPEG", ""))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ARCHIVE.is_file(), reason="CIFAR10_JPEG names no archive of CIFAR-10 as JPEG files"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar10")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder / "pictures", filter="data")
    command = [sys.executable, "-m", "data_prep", "shards", "--source.kind", "image_folder", "--workers", "2"]
    subprocess.run([*command, "--source.path", folder / "pictures", "--out", folder / "set"], cwd=ROOT, check=True)
    return folder / "set"


def test_sixty_thousand_images(prepared: Path) -> None:
    shard_set = open_shard_set(prepared)
    shard_set.verify()
    assert {name: shard_set.split(name).images for name in shard_set.splits} == {
        "train": 45_000,
        "valid": 5_000,
        "test": 10_000,
    }
    assert shard_set.manifest["splits"]["train"]["palette_mean_squared_error"] < 25  # 24.0 by long k-means


def test_tokens_equal_the_image_processors(prepared: Path) -> None:
    from transformers import ImageGPTImageProcessor

    from data_prep.config import DataConfig

    shard_set = open_shard_set(prepared)
    config = DataConfig.from_dict(shard_set.manifest["config"])
    source = open_source(config.source)
    plan = make_plan(source, config)
    views = views_of(source, config, "test")
    pixels = np.stack([views.view(int(image), EVALUATION) for image in plan.splits["test"].source_indices[:2000]])
    processor = ImageGPTImageProcessor(clusters=shard_set.palette.tolist(), do_resize=False)
    reference = np.concatenate(
        [processor(list(part), return_tensors="np")["input_ids"] for part in np.array_split(pixels, 40)]
    )
    assert (encode(pixels, lookup_table(shard_set.palette)) == reference).all()
    assert (shard_set.split("test").gather(np.arange(2000))[0] == reference).all()
