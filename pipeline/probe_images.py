"""The labelled images of the probe: which ones, of which shard set, and what they must fulfil."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.common.seeding import generator
from data_prep.shards.reader import ShardSet, Split, open_shard_set
from pipeline.config import TrainConfig
from pipeline.training_set import TrainingSets

CANDIDATES = 8
"""Labelled images among which one is chosen: labels of so many times the images are read, not of a complete split."""


@dataclass(frozen=True)
class LabelledImages:
    """Some images of a split."""

    split: Split
    numbers: np.ndarray
    """Indices in the split, int64 (N,)."""
    labels: np.ndarray
    """int32 (N,)."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, which: slice | np.ndarray) -> "LabelledImages":
        return LabelledImages(self.split, self.numbers[which], self.labels[which])


@dataclass(frozen=True)
class ProbeImages:
    """The images of the probe, numbered in this order: those of train, of choice, and of test."""

    path: Path | str
    """The shard set, for messages."""
    train: LabelledImages
    """The images to which the classifiers are fitted."""
    choice: LabelledImages
    """Held-out images that choose the L2 strength of each layer, and the layer."""
    test: LabelledImages
    """Other held-out images, on which the accuracy is measured."""
    valid_in_train: int | None
    """How many images of the split valid are also in train; None if they were not counted."""

    def __len__(self) -> int:
        return len(self.train) + len(self.choice) + len(self.test)

    @property
    def classes(self) -> int:
        """The number of classes of the images of train."""
        return len(np.unique(self.train.labels))

    def tokens(self, numbers: np.ndarray) -> np.ndarray:
        """Palette indices uint16 (k, T) of the images with these numbers, int64 (k,)."""
        found = np.empty((len(numbers), self.train.split.positions), np.uint16)
        start = 0
        for part in (self.train, self.choice, self.test):
            inside = (numbers >= start) & (numbers < start + len(part))
            found[inside], _ = part.split.gather(part.numbers[numbers[inside] - start])
            start += len(part)
        return found


def open_probe_images(config: TrainConfig, sets: TrainingSets) -> ProbeImages | None:
    """Chooses the images of the probe; None if the run has no probe.

    The choice depends on the shard set and the numbers of images alone, so probes of several runs are comparable.
    Raises ValueError naming the key if no set is labelled, if probe.shards does not fit the training set, if its images
    of valid are all in train, or if it has too few labelled images or classes.
    """
    wanted = config.probe
    if not wanted.every_steps:
        return None
    shards = _open_own(config, sets) if wanted.shards is not None else _first_labelled(config, sets)
    _check_held_out(shards)
    train, held_out = (
        _candidates(shards.split(name), images)
        for name, images in (("train", wanted.train_images), ("valid", 2 * wanted.test_images))
    )
    classes = len(np.unique(train.labels))
    if len(train) < wanted.train_images:
        raise ValueError(
            f"probe.train_images is {wanted.train_images}, but {shards.path} has {len(train)} labelled images in "
            f"train; {_advice(len(train), classes)}."
        )
    if classes < 2:
        raise ValueError(
            f"{shards.path} has labelled images of a single class in train; the probe needs at least two: name another "
            f"labelled set as probe.shards, or set probe.every_steps to 0."
        )
    if wanted.train_images < classes:
        raise ValueError(
            f"probe.train_images is {wanted.train_images}; it must be at least {classes}, one for each class in train "
            f"of {shards.path}."
        )
    if len(held_out) < 2 * wanted.test_images:
        raise ValueError(
            f"probe.test_images is {wanted.test_images}, but {shards.path} has {len(held_out)} labelled images in "
            f"valid, half of which choose L2 strength and layer; {_advice(len(held_out) // 2, 1)}."
        )
    choice, test = (held_out[start::2][: wanted.test_images] for start in (0, 1))
    return ProbeImages(
        shards.path, _balanced(train, wanted.train_images), choice, test, shards.images_in_train.get("valid")
    )


def _check_held_out(shards: ShardSet) -> None:
    """Raises ValueError if the images of valid are also in train, so that none is held out."""
    config, images = shards.manifest.get("config", {}), shards.split("valid").images
    if config.get("fold_valid") or (images and shards.images_in_train.get("valid") == images):
        raise ValueError(
            f"{shards.path} has its images of valid in train too{' (fold_valid)' * bool(config.get('fold_valid'))}, so "
            f"none is held out from the probe; name another labelled set of the same palette and resolution as "
            f"probe.shards, or set probe.every_steps to 0."
        )


def _advice(most: int, least: int) -> str:
    """What to set instead of a number of images that a split does not have."""
    return f"it must be at most {most}" if most >= max(least, 1) else "name a larger labelled set as probe.shards"


def _open_own(config: TrainConfig, sets: TrainingSets) -> ShardSet:
    """Opens probe.shards. Raises ValueError or OSError naming the key."""
    assert config.probe.shards is not None
    try:
        shards = open_shard_set(config.probe.shards)
        for name in ("train", "valid"):
            shards.split(name)
    except (ValueError, OSError) as error:
        raise type(error)(f"probe.shards: {error}") from error
    if shards.resolution != config.model.resolution:
        raise ValueError(
            f"probe.shards is {shards.path}, of resolution {shards.resolution}; it must be model.resolution, "
            f"{config.model.resolution}."
        )
    if shards.palette_sha256 != sets.palette_sha256:
        raise ValueError(
            f"probe.shards is {shards.path}, of the palette {shards.palette_sha256[:12]}; it must have that of the "
            f"training set, {sets.palette_sha256[:12]}: prepare it with palette.file of {sets.first.path}."
        )
    if not shards.classes:
        raise ValueError(f"probe.shards is {shards.path}, which has no labels; name a labelled shard set.")
    return shards


def _first_labelled(config: TrainConfig, sets: TrainingSets) -> ShardSet:
    """The first training set with classes. Raises ValueError if none has."""
    for one in sets.sets:
        if one.shards.classes:
            return one.shards
    paths = ", ".join(str(one.shards.path) for one in sets.sets)
    raise ValueError(
        f"probe.every_steps is {config.probe.every_steps}, but {paths} has no labels; name a labelled shard set of the "
        f"same palette and resolution as probe.shards, or set probe.every_steps to 0."
    )


def _candidates(split: Split, wanted: int) -> LabelledImages:
    """Labelled images of a split in random order: CANDIDATES times as many as wanted, or all.

    Of a set at an address, those of its first shards that have enough: each shard would be downloaded.
    """
    count, random = len(split.record_images), generator(0, "probe", split.name)
    records = np.arange(count) if split.address is not None else random.permutation(count)
    enough = wanted if split.address is not None else CANDIDATES * wanted
    numbers, labels, found = [np.empty(0, np.int64)], [np.empty(0, np.int32)], 0
    for record in records:
        if found >= enough:
            break
        _, of_record = split.record(record)
        labelled = np.flatnonzero(of_record >= 0)
        numbers.append(split.record_starts[record] + labelled)
        labels.append(of_record[labelled])
        found += len(labelled)
    images = LabelledImages(split, np.concatenate(numbers), np.concatenate(labels))
    return images[random.permutation(found)]


def _balanced(images: LabelledImages, wanted: int) -> LabelledImages:
    """The first images of each class in turn: equally many of each class, as far as there are so many."""
    by_class = np.argsort(images.labels, kind="stable")
    _, starts, counts = np.unique(images.labels[by_class], return_index=True, return_counts=True)
    turns = np.empty(len(images), np.int64)
    turns[by_class] = np.arange(len(images)) - np.repeat(starts, counts)
    return images[np.argsort(turns, kind="stable")[:wanted]]
