"""What run.json has of the shard sets of a run, and of the changes of a mixture."""

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from pipeline.config import WEIGHT_PARTS
from pipeline.training_set import TrainingSets


def describe_sets(sets: TrainingSets) -> dict[str, Any]:
    """`shards` of run.json: path, digest, palette_sha256 and source of the first set.

    A mixture adds `mixture`: of each set the same, and its name, weight, and images of train and valid.
    """
    facts = [
        {
            "path": one.shards.address or str(Path(one.shards.path).resolve()),
            "digest": one.shards.digest,
            "palette_sha256": one.shards.palette_sha256,
            "source": one.shards.name,
            "name": one.name,
            "weight": one.weight,
            "images": {split: one.shards.split(split).images for split in ("train", "valid")},
        }
        for one in sets.sets
    ]
    first = {key: facts[0][key] for key in ("path", "digest", "palette_sha256", "source")}
    return first | ({"mixture": facts} if sets.is_mixture else {})


def changes(segments: Sequence[Mapping[str, Any]], images: float = inf) -> list[dict[str, Any]]:
    """The sets that a run has read before `images`: `images` from which on, and `sets` with name, digest and weight.

    segments: `mixture` of checkpoint.json. Segments with the same sets and weights are one entry.
    """
    names = {member["digest"]: member["name"] for segment in segments for member in segment["members"]}
    found: list[dict[str, Any]] = []
    for segment in segments:
        sets = [
            {"name": names[member["digest"]], "digest": member["digest"], "weight": member["parts"] / WEIGHT_PARTS}
            for member in segment["members"]
        ]
        if segment["start"] < images and not (found and found[-1]["sets"] == sets):
            found.append({"images": segment["start"], "sets": sets})
    return found


def sets_ever(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each set of `changes` with its last weight, which is 0 if the set was removed."""
    sets = {each["digest"]: each | {"weight": 0.0} for change in found for each in change["sets"]}
    return list((sets | {each["digest"]: each for change in found[-1:] for each in change["sets"]}).values())


def describe_weights(sets: Sequence[Mapping[str, Any]]) -> str:
    """ "imagenet 22%, web 78%": sets with their shares of the images."""
    return ", ".join(f"{each['name']} {100 * each['weight']:.3g}%" for each in sets)
