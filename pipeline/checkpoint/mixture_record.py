"""What run.json and checkpoints have of the shard sets of a run, and of the changes of a mixture."""

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import WEIGHT_PARTS
from pipeline.training_set import TrainingSets

if TYPE_CHECKING:
    from pipeline.checkpoint.format import CheckpointRecord  # it imports torch, which takes seconds


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
    """The sets that a run has read before `images`: `images` from which on, and `sets` with name, digest,
    weight and source.

    segments: `mixture` of checkpoint.json. Segments with the same sets and weights are one entry.
    """
    names = {member["digest"]: member["name"] for segment in segments for member in segment["members"]}
    sources = {one["digest"]: one.get("source", "") for segment in segments for one in segment["members"]}
    found: list[dict[str, Any]] = []
    for segment in segments:
        sets = [
            {
                "name": names[member["digest"]],
                "digest": member["digest"],
                "weight": member["parts"] / WEIGHT_PARTS,
                "source": sources[member["digest"]],
            }
            for member in segment["members"]
        ]
        sets.sort(key=lambda one: one["name"])
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


def names_of(segments: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The names by digest that a mixture's history has of its sets; segments: `mixture` of checkpoint.json."""
    members = (one for segment in segments if not segment["single"] for one in segment["members"])
    return {member["digest"]: member["name"] for member in members}


def made_with(record: "CheckpointRecord") -> dict[str, Any]:
    """The sets that a checkpoint's run read last, as for `check_shards`."""
    found = {"palette_sha256": record.palette_sha256, "digest": record.shards_digest}
    return found | ({"mixture": record.mixture[-1]["members"]} if record.mixture else {})


def check_shards(recorded: dict[str, Any], sets: TrainingSets, where: Path) -> None:
    """Raises ValueError naming both digests if a run or checkpoint was made with another palette or other shard sets.

    recorded: palette_sha256 and digest of its first set, and a list of such objects as `mixture` if there were several.
    Sets may come and go, but one must stay: it shows that this is the same run.
    """
    if recorded["palette_sha256"] != sets.palette_sha256:
        raise ValueError(
            f"{sets.first.path} has the palette {sets.palette_sha256[:12]}, but {where} was made with the palette "
            f"{recorded['palette_sha256'][:12]}; the palettes must be the same."
        )
    before = [one["digest"] for one in recorded.get("mixture") or [recorded]]
    if set(before) & set(sets.digests):
        return
    made_with = ", ".join(digest[:12] for digest in before)
    if sets.is_mixture or len(before) > 1:
        raise ValueError(
            f"{'data.mixture' if sets.is_mixture else sets.first.path} has none of the shard sets {made_with} that "
            f"{where} was made with; keep at least one of them, or start a new run."
        )
    raise ValueError(
        f"{sets.first.path} is the shard set {sets.first.digest[:12]}, but {where} was made with {made_with}; set "
        f"data.shards to the set that the run started with, or start a new run."
    )
