"""Sentences of the report and the card that follow from the results: on which images, and where a baseline wins."""

from collections.abc import Collection, Mapping
from typing import Any

from pipeline.results.headline import Headline, Results, headlines_of, images_of, measured_split
from pipeline.results.text import percent

ACCURACY_BASELINES = {
    "Raw pixels": "raw_pixel_test_accuracy",
    "Color histogram": "color_histogram_test_accuracy",
    "Most common class": "majority_class_test_accuracy",
}
"""Baselines that do not use the model, and their keys in the probes' JSON."""
COUNT_BASELINES = {
    "Uniform colors": "uniform_nats_per_color",
    "Color frequencies": "unigram_nats_per_color",
    "Previous color": "bigram_nats_per_color",
    "Two neighboring colors": "left_times_above_nats_per_color",
}
"""Baselines of density, from weak to strong, and their keys in its JSON."""


def value_of(result: dict[str, Any], key: str) -> float | None:
    """A number in a task's JSON; None if it has none under this key."""
    value = result.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def training_images_sentence(
    results: Results,
    trained_on: Collection[str],
    started_from: str | None,
    dataset: Mapping[str, Any],
    *,
    trained: bool = True,
) -> str:
    """Whether the model was trained on the images that were measured, as far as it is recorded.

    trained_on: digests of the training's shard sets, several for a mixture; empty if unknown. started_from: the model
    that the training started from, if any. dataset: `images` and `images_in_train` by split, as in results.json; may be
    empty. trained: False for initial weights. "" if there are no results.
    """
    if not results:
        return ""
    if not trained:
        return "Its weights are initial weights: it was not trained."
    measured_on = {result["dataset_digest"] for result in results.values()}
    if started_from is not None:
        return (
            "Its training started from another model's weights, and it is not recorded here which images that model "
            "was trained on: some of the measured images may be among them."
        )
    if not trained_on:
        return (
            "The model does not record the images that it was trained on: some of the measured images may be among "
            "them."
        )
    mixed = len(trained_on) > 1
    if not measured_on <= set(trained_on):
        other = "other shard sets" if mixed else "another shard set"
        return f"It was trained on {other} than it was measured on: whether some images are in both was not checked."
    splits = dict.fromkeys(measured_split(result) for result in results.values())
    others = [split for split in splits if split != "train"]
    if not others:
        return "The numbers were measured on train, the images that it was trained on."
    seen = [result["title"] for result in results.values() if measured_split(result) == "train"]
    of_train = f" The numbers of {_listed(seen)} are of train, the images that it was trained on." if seen else ""
    where = f"{_listed(others)} of a shard set that it was trained on" if mixed else _listed(others)
    unchecked = "; whether its other training sets have images of them too was not checked" if mixed else ""
    also = _also_in_train(others, dataset if len(measured_on) == 1 else {}, mixed)
    return f"The numbers were measured on {where}{also}{unchecked}.{of_train}"


def _also_in_train(splits: list[str], dataset: Mapping[str, Any], mixed: bool) -> str:
    """The end of a sentence: how many images of these splits are also in train; mixed: in that of this set alone."""
    counts = {split: value_of(dataset.get("images_in_train", {}), split) for split in splits}
    if all(count == 0 for count in counts.values()):
        return ", whose images are not in its train" if mixed else ", whose images it was not trained on"
    images = {split: value_of(dataset.get("images", {}), split) or 0 for split in splits}
    counted = [
        f"{n:,.0f} of the {images[split]:,.0f} images of {split}" for split, n in counts.items() if n is not None
    ]
    unknown = [split for split, count in counts.items() if count is None]
    return (f"; {_listed(counted)} are also in train" if counted else "") + (
        f"; whether images of {_listed(unknown)} are also in train was not counted" if unknown else ""
    )


def where_baselines_win(results: Results, random_weights: Results) -> list[str]:
    """A sentence for each number that a baseline reaches or beats."""
    sentences = []
    for task, result in results.items():
        for row in headlines_of(result):
            if row.value is None:
                continue
            better = _better_baselines(row, result)
            random = untrained_row(row, result, random_weights.get(task))
            if random is not None and random.value is not None and _wins(random.value, row.value, row.unit):
                better.append(f"initial weights ({random.text})")
            if better:
                verb = "is" if len(better) == 1 else "are"
                sentences.append(f"{row.name}, {row.text}: at least as good {verb} {_listed(better)}.")
    return sentences


def untrained_row(row: Headline, result: dict[str, Any], untrained: dict[str, Any] | None) -> Headline | None:
    """The headline of initial weights that was measured as `row` was, on the same split and number of images."""
    if untrained is None or measured_split(untrained) != measured_split(result):
        return None
    for other in headlines_of(untrained):
        if other.name == row.name and images_of(untrained, other) == images_of(result, row):
            return other
    return None


def _better_baselines(row: Headline, result: dict[str, Any]) -> list[str]:
    """The baselines that reach or beat a headline, with their numbers."""
    if row.unit == "accuracy":
        values = {name: value_of(result, key) for name, key in ACCURACY_BASELINES.items()}
        if row.name.endswith(": student") and isinstance(result.get("labels_alone"), dict):  # of distillation
            values["Labels alone"] = value_of(result["labels_alone"], "test_accuracy")
        texts = {name: percent(value) for name, value in values.items() if value is not None}
    elif row.unit == "nats" and not result.get("masked"):
        values = {name: value_of(result, key) for name, key in COUNT_BASELINES.items()}
        texts = {name: f"{value:.4f}" for name, value in values.items() if value is not None}
    elif row.unit == "distance" and isinstance(result.get("distance"), dict):
        values = {"originals with shuffled lower halves": value_of(result["distance"], "shuffled_lower_halves")}
        texts = {name: f"{value:.3f}" for name, value in values.items() if value is not None}
    else:
        return []
    assert row.value is not None
    return [
        f"{name.lower()} ({texts[name]})"
        for name, value in values.items()
        if value is not None and _wins(value, row.value, row.unit)
    ]


def _wins(baseline: float, model: float, unit: str) -> bool:
    return baseline >= model if unit == "accuracy" else baseline <= model


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
