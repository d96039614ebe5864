"""The shard sets of a run in run.json: `shards`, and from which image on a mixture had which weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.training_set import TrainingSets

HISTORY = "mixture_history"
Change = dict[str, Any]
"""An entry: `step` and `images` before the first image that was drawn from `sets`, each with name, digest and
weight."""


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


def history_with(record: Mapping[str, Any], sets: TrainingSets, step: int, images: int) -> list[Change]:
    """The history of a run that continues after `images` with these sets; empty if it never had a mixture.

    record: run.json. Entries of images that the run has not seen, or sees again after a resume from an earlier step,
    are dropped.
    """
    weights = [{"name": each.name, "digest": each.shards.digest, "weight": each.weight} for each in sets.sets]
    seen = [change for change in record.get(HISTORY, []) if change["images"] < images]
    if not seen and not sets.is_mixture:
        return []
    if seen and seen[-1]["sets"] == weights:
        return seen
    return [*seen, {"step": step, "images": images, "sets": weights}]


def earlier_history(shards: Mapping[str, Any], sets: TrainingSets) -> list[Change]:
    """The history of a run that had one set, `shards` of its run.json, and resumes with a mixture."""
    names = {each.shards.digest: each.name for each in sets.sets}
    name = names.get(shards["digest"], shards.get("source", ""))
    return [{"step": 0, "images": 0, "sets": [{"name": name, "digest": shards["digest"], "weight": 1.0}]}]


def sets_until(history: Sequence[Change], images: int) -> list[dict[str, Any]]:
    """Name, digest and weight of each set that images were drawn from before `images`; weight 0 if it was removed."""
    seen = changes_until(history, images)
    sets = {each["digest"]: each | {"weight": 0.0} for change in seen for each in change["sets"]}
    return list((sets | {each["digest"]: each for change in seen[-1:] for each in change["sets"]}).values())


def changes_until(history: Sequence[Change], images: int) -> list[Change]:
    """The entries of a history before `images`."""
    return [change for change in history if change["images"] < images]


def describe_weights(sets: Sequence[Mapping[str, Any]]) -> str:
    """ "imagenet 22%, web 78%": the sets of an entry with their shares of the images."""
    return ", ".join(f"{each['name']} {100 * each['weight']:.3g}%" for each in sets)
