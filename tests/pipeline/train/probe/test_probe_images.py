"""Which images are probed, and sets that can't be: one sentence before any process group starts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.common.files import read_json, write_json
from pipeline.config import DataConfig, MixtureEntry, ModelConfig, TrainConfig
from pipeline.probe_config import ProbeConfig
from pipeline.probe_images import ProbeImages, open_probe_images
from pipeline.training_set import open_training_sets
from tests.pipeline.evaluate.tiny_sets import RESOLUTION, random_images, random_palette, write_shard_set


def labelled(folder: Path, train: int = 120, valid: int = 60, unlabelled: int = 0, **options: int) -> Path:
    splits = {name: random_images(count, 7, unlabelled) for name, count in (("train", train), ("valid", valid))}
    palette = random_palette(seed=options.pop("palette", 0))
    if resolution := options.get("resolution"):
        splits = {
            name: (np.zeros((len(labels), resolution**2), np.uint16), labels) for name, (_, labels) in splits.items()
        }
    return write_shard_set(folder, splits, palette, **options)


def without_labels(folder: Path) -> Path:
    """An unlabelled set, as `data_prep shards` writes it."""
    labelled(folder, unlabelled=1000)
    write_json(folder / "shards.json", read_json(folder / "shards.json") | {"classes": []})
    return folder


def chosen(training: Path | list[Path], **options: object) -> ProbeImages:
    data = DataConfig(shards=str(training)) if isinstance(training, Path) else mixture(training)
    probe = ProbeConfig(**{"every_steps": 5, "train_images": 30, "test_images": 20} | options)  # type: ignore[arg-type]
    config = TrainConfig(model=ModelConfig(layers=1, width=8, heads=1, resolution=RESOLUTION), data=data, probe=probe)
    images = open_probe_images(config, open_training_sets(config))
    assert open_probe_images(replace(config, probe=ProbeConfig()), open_training_sets(config)) is None
    assert images is not None
    return images


def with_facts(folder: Path, in_train: int, **config: object) -> Path:
    """A set whose manifest counts images of valid that are also in train."""
    manifest = read_json(labelled(folder) / "shards.json")
    manifest["splits"]["valid"]["images_in_train"] = in_train
    write_json(folder / "shards.json", manifest | {"config": config})
    return folder


@pytest.mark.parametrize(("in_train", "folded", "reason"), [(60, True, " (fold_valid)"), (60, False, "")])
def test_images_that_are_not_held_out_are_refused(in_train: int, folded: bool, reason: str, tmp_path: Path) -> None:
    folder = with_facts(tmp_path / "set", in_train, fold_valid=folded)
    sentence = (
        f"{folder} has its images of valid in train too{reason}, so none is held out from the probe; name another "
        f"labelled set of the same palette and resolution as probe.shards, or set probe.every_steps to 0."
    )
    for options in ({}, {"shards": str(folder)}):
        with pytest.raises(ValueError, match="none is held out") as caught:
            chosen(folder, **options)
        assert str(caught.value) == sentence
    assert chosen(folder, shards=str(labelled(tmp_path / "other", train=121))).path == tmp_path / "other"


def test_copies_are_counted(tmp_path: Path) -> None:
    assert chosen(with_facts(tmp_path / "some", 7)).valid_in_train == 7
    assert chosen(labelled(tmp_path / "unknown")).valid_in_train is None


def mixture(folders: list[Path]) -> DataConfig:
    return DataConfig(mixture=[MixtureEntry(shards=str(folder), weight=1) for folder in folders])


def test_the_images_are_distinct_labelled_and_of_balanced_classes(tmp_path: Path) -> None:
    images = chosen(labelled(tmp_path / "set", unlabelled=15))
    assert [len(part) for part in (images.train, images.choice, images.test)] == [30, 20, 20]
    assert np.bincount(images.train.labels).tolist() == [10, 10, 10]
    assert len(set(images.choice.numbers) | set(images.test.numbers)) == 40
    tokens = images.tokens(np.arange(len(images)))
    for start, part in ((0, images.train), (30, images.choice), (50, images.test)):
        expected, labels = part.split.gather(part.numbers)
        assert (tokens[start : start + len(part)] == expected).all()
        assert (labels == part.labels).all()
        assert (part.labels >= 0).all()


def test_the_first_labelled_set_of_a_mixture_or_the_set_of_ones_own(tmp_path: Path) -> None:
    plain, other = without_labels(tmp_path / "plain"), labelled(tmp_path / "other")
    third = labelled(tmp_path / "third", train=121)
    assert chosen([plain, other, third]).path == other
    assert chosen([plain, other], shards=str(third)).path == third
    assert chosen(plain, shards=str(third)).path == third


@pytest.mark.parametrize(
    ("case", "options", "sentence"),
    [
        ("plain", {}, "probe.every_steps is 5, but {set} has no labels; name a labelled shard set of the same palette"),
        ("set", {"shards": "{plain}"}, "probe.shards is {plain}, which has no labels; name a labelled shard set."),
        ("set", {"shards": "{palette}"}, "probe.shards is {palette}, of the palette "),
        ("set", {"shards": "{resolution}"}, "probe.shards is {resolution}, of resolution 5; it must be model.resolut"
         "ion, 6."),
        ("set", {"shards": "/nowhere"}, "probe.shards: /nowhere does not exist; it must be a folder written by"),
        ("set", {"train_images": 500}, "probe.train_images is 500, but {set} has 120 labelled images in train; it must "
         "be at most 120."),
        ("set", {"test_images": 31}, "probe.test_images is 31, but {set} has 60 labelled images in valid, half of "
         "which choose L2 strength and layer; it must be at most 30."),
        ("set", {"train_images": 2}, "probe.train_images is 2; it must be at least 3, one for each class in train of "
         "{set}."),
        ("few", {}, "probe.train_images is 30, but {set} has 0 labelled images in train; name a larger labelled set "
         "as probe.shards."),
        ("single", {}, "{set} has labelled images of a single class in train; the probe needs at least two: name "),
        ("set", {"every_steps": -1}, "probe.every_steps is -1; it must be at least 0."),
        ("set", {"train_images": 0}, "probe.train_images is 0; it must be at least 2."),
        ("set", {"test_images": -3}, "probe.test_images is -3; it must be at least 1."),
    ],
)  # fmt: skip
def test_a_set_that_can_not_be_probed(case: str, options: dict[str, object], sentence: str, tmp_path: Path) -> None:
    folders = {"set": labelled(tmp_path / "set"), "plain": without_labels(tmp_path / "plain")}
    folders["few"] = labelled(tmp_path / "few", unlabelled=1000)
    folders["palette"] = labelled(tmp_path / "palette", palette=1)
    folders["resolution"] = labelled(tmp_path / "resolution", resolution=5)
    tokens, labels = random_images(120, 7)
    splits = {name: (tokens, np.zeros_like(labels)) for name in ("train", "valid")}
    folders["single"] = write_shard_set(tmp_path / "single", splits, random_palette())
    options = {key: value.format_map(folders) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(ValueError, match="probe") as caught:
        chosen(folders[case], **options)
    assert str(caught.value).startswith(sentence.format_map(folders | {"set": folders[case]}))
    assert "\n" not in str(caught.value)
