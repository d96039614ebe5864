"""Opens the shard sets of a training configuration: one, or those of a mixture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from data_prep.shards.reader import ShardSet, open_shard_set
from pipeline.config import TrainConfig, require_resolution


@dataclass(frozen=True)
class WeightedSet:
    """A shard set and its share of the training images."""

    name: str
    """The last part of its path; if several sets have the same, with the parts before it; as in `unique_names`."""
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

    def named(self, recorded: Mapping[str, str]) -> "TrainingSets":
        """The same sets, with the names by digest that a run has given them before."""
        names = unique_names([one.shards for one in self.sets], recorded)
        sets = (replace(one, name=name) for one, name in zip(self.sets, names, strict=True))
        return replace(self, sets=tuple(sets))

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
        [name] = unique_names([shards], {})
        return TrainingSets((WeightedSet(name, shards, 1.0),), is_mixture=False)
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
    return TrainingSets(tuple(map(WeightedSet, unique_names(opened, {}), opened, weights)), is_mixture=True)


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


def unique_names(sets: Sequence[ShardSet], recorded: Mapping[str, str]) -> list[str]:
    """Names of the sets, which do not depend on their order; recorded: names that sets have already, by digest.

    The last part of the path or URL; of sets that would have the same, as many of the last parts as they differ in.
    """
    parts, lengths = [_parts(one) for one in sets], [1] * len(sets)
    while True:
        ends = ["/".join(all_parts[-length:]) for all_parts, length in zip(parts, lengths, strict=True)]
        names = [recorded.get(one.digest, end) for one, end in zip(sets, ends, strict=True)]
        taken = [*names, *(name for digest, name in recorded.items() if digest not in {one.digest for one in sets})]
        same = [i for i, one in enumerate(sets) if one.digest not in recorded and taken.count(names[i]) > 1]
        if not any(lengths[i] < len(parts[i]) for i in same):
            break
        for i in same:
            lengths[i] += 1
    return [
        f"{name} {one.digest[:6]}" if i in same else name for i, (name, one) in enumerate(zip(names, sets, strict=True))
    ]


def _parts(shards: ShardSet) -> list[str]:
    """The parts of a set's path, or the host and those of its URL; without a path the name of its source."""
    path = str(shards.path)
    if path.startswith("pipe:"):
        return [shards.name]
    if "://" not in path:
        return list(Path(path).absolute().parts[1:]) or [shards.name]
    url = urlsplit(path)
    parts = [part for part in url.path.split("/") if part]
    return [url.netloc.rpartition("@")[2], *parts] if parts else [shards.name]
