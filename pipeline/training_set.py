"""Opens the shard sets of a training configuration: one, or those of a mixture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from data_prep.shards.reader import ShardSet, open_shard_set
from pipeline.config import TrainConfig, require_resolution


@dataclass(frozen=True)
class WeightedSet:
    """A shard set and its share of the training images."""

    name: str
    """The last part of its path; if several sets have the same, with a number behind it."""
    shards: ShardSet
    weight: float
    """Share of the training images; the weights of all sets add up to 1."""


@dataclass(frozen=True)
class TrainingSets:
    """The shard sets of a run, of one palette and resolution: data.shards, or those of data.mixture in their order."""

    sets: tuple[WeightedSet, ...]
    is_mixture: bool
    """Whether they come from data.mixture, which may also name a single set."""

    @property
    def first(self) -> ShardSet:
        """The first set: the check image of checkpoints is an image of its valid split."""
        return self.sets[0].shards

    @property
    def palette(self) -> np.ndarray:
        """float32 (V, 3)."""
        return self.first.palette

    @property
    def palette_sha256(self) -> str:
        return self.first.palette_sha256

    @property
    def colors(self) -> int:
        return self.first.colors

    @property
    def resolution(self) -> int:
        return self.first.resolution

    @property
    def digests(self) -> list[str]:
        """The digest of each set."""
        return [one.shards.digest for one in self.sets]

    @property
    def train_images(self) -> int:
        """Images in the train splits of all sets."""
        return sum(one.shards.split("train").images for one in self.sets)

    def locations(self, numbers: Sequence[int]) -> list[str]:
        """Locations of training images, numbered set by set, for messages; of a mixture with the name of the set."""
        splits = [one.shards.split("train") for one in self.sets]
        starts = np.cumsum([0, *(split.images for split in splits)])
        found = []
        for number in numbers:
            one = int(np.searchsorted(starts, number, side="right")) - 1
            [location] = splits[one].locations([number - int(starts[one])])
            found.append(f"{self.sets[one].name}: {location}" if self.is_mixture else location)
        return found

    @property
    def streamed(self) -> bool:
        """Whether the train split of any set is streamed."""
        return any(one.shards.address is not None for one in self.sets)


def open_training_sets(config: TrainConfig) -> TrainingSets:
    """Opens data.shards, or the sets of data.mixture, and checks what does not depend on the ranks.

    Raises ValueError naming the key, if neither is set, or if one is not a shard set, has another resolution than the
    model or another palette than the first set, lacks images that training reads, or is in the mixture twice.
    """
    if config.data.mixture is None:
        if config.data.shards is None:
            raise ValueError(
                "data.shards is not set; give the folder of a shard set (python -m data_prep shards), or several as "
                "data.mixture."
            )
        shards = open_shard_set(config.data.shards)
        require_resolution(config, shards.resolution, shards.path)
        _require_images(shards, "")
        return TrainingSets((WeightedSet(_last_part(shards), shards, 1.0),), is_mixture=False)
    opened: list[ShardSet] = []
    for number, entry in enumerate(config.data.mixture):
        key = f"data.mixture[{number}]"
        try:
            shards = open_shard_set(entry.shards)
        except (ValueError, OSError) as error:
            raise type(error)(f"{key}.shards: {error}") from error
        _check_member(config, shards, key, opened)
        opened.append(shards)
    total = sum(entry.weight for entry in config.data.mixture)
    weights = [entry.weight / total for entry in config.data.mixture]
    return TrainingSets(tuple(map(WeightedSet, _unique_names(opened), opened, weights)), is_mixture=True)


def _check_member(config: TrainConfig, shards: ShardSet, key: str, before: list[ShardSet]) -> None:
    """Raises ValueError if a set of a mixture does not fit the model or the sets before it."""
    if shards.resolution != config.model.resolution:
        raise ValueError(
            f"{key}.shards is {shards.path}, of resolution {shards.resolution}; it must be model.resolution, "
            f"{config.model.resolution}."
        )
    for number, other in enumerate(before):
        if other.digest == shards.digest:
            raise ValueError(
                f"{key}.shards is {shards.path}, the same shard set as data.mixture[{number}]; name it once, with the "
                f"sum of the weights."
            )
    if before and shards.palette_sha256 != before[0].palette_sha256:
        raise ValueError(
            f"{key}.shards is {shards.path}, of the palette {shards.palette_sha256[:12]}; it must have that of "
            f"data.mixture[0], {before[0].palette_sha256[:12]}: prepare it with palette.file of {before[0].path}."
        )
    _require_images(shards, f"{key}.shards: ")


def _require_images(shards: ShardSet, prefix: str) -> None:
    for name in ("train", "valid"):
        if name not in shards.splits or shards.split(name).images == 0:
            raise ValueError(
                f"{prefix}{shards.path} has no images in its split {name!r}; training reads train and valid."
            )


def _last_part(shards: ShardSet) -> str:
    """The last part of a set's path or URL; of a pipe the name of its source."""
    last = PurePath(str(shards.path).partition("?")[0]).name
    return shards.name if str(shards.path).startswith("pipe:") or not last else last


def _unique_names(sets: list[ShardSet]) -> list[str]:
    names: list[str] = []
    for last in map(_last_part, sets):
        name, number = last, 2
        while name in names:
            name, number = f"{last}-{number}", number + 1
        names.append(name)
    return names
