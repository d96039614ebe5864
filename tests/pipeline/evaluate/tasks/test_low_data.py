"""Few labels: the subsets, the choice within their labels against scikit-learn, skipped settings, and invalid input."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from data_prep.common.seeding import generator
from data_prep.shards.reader import ShardSet, open_shard_set
from pipeline.evaluate.cache import clear_unfinished
from pipeline.evaluate.features.labelled import Labelled
from pipeline.evaluate.features.pooled import pooled_features
from pipeline.evaluate.options import LowDataOptions
from pipeline.evaluate.tasks.low_data import LowData, Setting, balanced, choose, settings_for
from tests.pipeline.evaluate.tiny_sets import random_images, random_palette, write_shard_set

LABELS = np.repeat([0, 1, 2], [120, 60, 5])


def scikit_learn(strength: float, count: int) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=1 / (strength * count), tol=1e-6, max_iter=5000))


def test_a_total_is_spread_evenly_as_far_as_classes_reach() -> None:
    available, random = np.array([120, 60, 5]), np.random.default_rng(0)
    assert balanced(available, 12, random).tolist() == [4, 4, 4]
    assert balanced(available, 45, random).tolist() == [20, 20, 5]
    assert balanced(available, 185, random).tolist() == [120, 60, 5]
    for total in range(1, 186):
        taken = balanced(available, total, random)
        assert taken.sum() == total and (taken <= available).all()
        others = taken[taken < available]
        assert not others.size or taken.max() - others.min() <= 1


def test_a_subset_has_so_many_of_each_class_and_is_random() -> None:
    setting = Setting("4 per class", 4, None, 12)
    rows = [setting.draw(LABELS, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.bincount(LABELS[rows[0]]).tolist() == [4, 4, 4]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert len(np.unique(rows[0])) == 12
    assert not np.array_equal(rows[0], rows[2])


def test_default_settings_are_skipped_if_a_class_has_too_few_labels() -> None:
    settings, left_out = settings_for(LABELS, LowDataOptions(), "SHARDS")
    assert [(setting.name, setting.labels) for setting in settings] == [("4 per class", 12), ("10%", 18)]
    assert left_out == [
        {"name": "25 per class", "reason": "the rarest class has 5 labels in train"},
        {"name": "400 per class", "reason": "the rarest class has 5 labels in train"},
        {"name": "1%", "reason": "2 of train's 185 labels are fewer than 2 for each class"},
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"per_class": [4, 6]},
            "to use 6 per class, but in SHARDS the rarest class has 5 labels in train",
        ),
        ({"fractions": [0.02]}, "use 2%, but in SHARDS 4 of train's 185 labels are fewer than 2 for each class"),
    ],
)
def test_explicit_settings_are_not_skipped(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_for(LABELS, LowDataOptions(**options), "SHARDS")


def test_a_set_with_too_few_labels_is_an_error() -> None:
    with pytest.raises(ValueError, match="SHARDS has 6 labels in train, too few for low_data; the rarest class has 3"):
        settings_for(np.repeat([0, 1], 3), LowDataOptions(), "SHARDS")


@pytest.mark.parametrize("choose_on", ["labels", "valid"])
def test_layer_and_strength_have_the_lowest_loss_by_scikit_learn(choose_on: str) -> None:
    random = np.random.default_rng(3)
    labels = np.repeat([0, 1, 2], 20)
    centres = random.normal(size=(3, 8))
    subset, valid = [], []
    for noise in (4.0, 1.5, 3.0):  # layers of unlike worth
        for layers in (subset, valid):
            features = centres[labels] + noise * random.normal(size=(60, 8))
            layers.append(Labelled(features.astype(np.float32), labels))
    strengths = [1.0, 0.03, 0.001]
    options = LowDataOptions(l2=strengths, choose_on=choose_on)
    layer, strength = choose(subset, valid if choose_on == "valid" else None, options, seed=11)

    def loss(layer: int, strength: float) -> float:
        train = subset[layer].features.astype(np.float64)
        if choose_on == "valid":
            probability = scikit_learn(strength, 60).fit(train, labels).predict_proba(valid[layer].features)
        else:
            folds = StratifiedKFold(5, shuffle=True, random_state=11)
            probability = cross_val_predict(scikit_learn(strength, 48), train, labels, cv=folds, method="predict_proba")
        return -np.log(probability[np.arange(60), labels]).mean()

    grid = {(number, each): loss(number, each) for number in range(3) for each in strengths}
    assert (layer, strength) == min(grid, key=lambda pair: grid[pair])
    assert layer == 1


def test_the_only_label_of_a_class_is_learned_from() -> None:
    random = np.random.default_rng(0)
    labels = np.array([0] * 6 + [1] * 3 + [2])
    subset = [Labelled(random.normal(size=(10, 4)).astype(np.float32), labels)]
    assert choose(subset, None, LowDataOptions(l2=[0.1]), seed=0) == (0, 0.1)


def test_the_task_against_scikit_learn(model_folder: Path, evaluation_of: Callable) -> None:
    """With the layer and the strength given, the mean over the same subsets; the test images in full."""
    evaluation = evaluation_of(model_folder)
    options = LowDataOptions(per_class=[4, 25], fractions=[0.5], subsets=3, layer=2, l2=[0.1])
    result = LowData(options).measure(evaluation)
    train, test = (evaluation.images(name, labelled=True) for name in ("train", "test"))
    known, asked = (pooled_features(evaluation, images)[2] for images in (train, test))
    assert [setting["name"] for setting in result["settings"]] == ["4 per class", "25 per class", "50%"]
    assert [setting["labels"] for setting in result["settings"]] == [12, 75, 162]
    settings, _ = settings_for(train.labels, options, "")
    for setting, found in zip(settings, result["settings"], strict=True):
        accuracies = []
        for subset in range(3):
            rows = setting.draw(train.labels, generator(0, "low_data", setting.name, subset))
            fitted = scikit_learn(0.1, len(rows)).fit(known[rows].astype(np.float64), train.labels[rows])
            accuracies.append(fitted.score(asked, test.labels))
        assert [subset["test_accuracy"] for subset in found["subsets"]] == pytest.approx(accuracies, abs=1 / 127)
        assert found["test_accuracy"] == pytest.approx(np.mean(accuracies), abs=1 / 127)
        spread = np.std([subset["test_accuracy"] for subset in found["subsets"]], ddof=1)
        assert found["test_accuracy_deviation"] == pytest.approx(spread)
        assert len(set(accuracies)) > 1
    assert result["choice"].startswith("layer 2 given")
    assert (evaluation.results / "low_data.png").read_bytes().startswith(b"\x89PNG")


def mislabelled(folder: Path, split: str) -> ShardSet:
    """The shard set of the fixture with the labels of one split shifted by a class."""
    splits = {
        "train": random_images(330, 1, unlabelled=7),
        "valid": random_images(110, 2),
        "test": random_images(130, 3, unlabelled=3),
    }
    tokens, labels = splits[split]
    splits[split] = tokens, np.where(labels < 0, labels, (labels + 1) % 3)
    return open_shard_set(write_shard_set(folder, splits, random_palette()))


def test_other_labels_are_used_only_if_the_result_records_it(
    model_folder: Path, evaluation_of: Callable, shards: ShardSet, tmp_path: Path
) -> None:
    def measured(choose_on: str, shards: ShardSet, name: str) -> dict:
        evaluation = evaluation_of(model_folder, shards, features=name)
        clear_unfinished(evaluation.results, "test")
        return LowData(
            LowDataOptions(per_class=[25], fractions=[], subsets=1, l2=[1, 0.01], choose_on=choose_on)
        ).measure(evaluation)

    other_valid, other_test = (mislabelled(tmp_path / split, split) for split in ("valid", "test"))
    honest = measured("labels", shards, "first")
    assert honest["labels_for_choice"] == 0
    assert measured("labels", other_valid, "second")["settings"] == honest["settings"]
    tested = measured("labels", other_test, "third")["settings"][0]["subsets"]
    for ours, theirs in zip(honest["settings"][0]["subsets"], tested, strict=True):
        assert (ours["layer"], ours["l2"]) == (theirs["layer"], theirs["l2"])
        assert ours["test_accuracy"] != theirs["test_accuracy"]

    open_choice = measured("valid", shards, "first")
    assert open_choice["labels_for_choice"] == 110
    assert "on the split valid" in open_choice["choice"]
    assert measured("valid", other_valid, "second")["settings"] != open_choice["settings"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"per_class": [4, 1]},
            r"with choose_on labels each must be at least 2 \(1 with choose_on valid\)",
        ),
        ({"per_class": [0], "choose_on": "valid"}, r"with choose_on valid each must be at least 1\."),
        ({"fractions": [1.5]}, r"fractions is \[1\.5\]; each must be above 0 and at most 1"),
        ({"per_class": [], "fractions": []}, "are both empty"),
        ({"per_class": [4, 4]}, r"per_class is \[4, 4\]; each may be listed only once"),
        ({"subsets": 0}, "subsets is 0; it must be at least 1"),
        ({"l2": []}, r"low_data\.l2 is \[\]"),
    ],
)
def test_invalid_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowDataOptions(**options)


def test_a_layer_that_the_model_lacks_is_an_error(model_folder: Path, evaluation_of: Callable) -> None:
    with pytest.raises(ValueError, match=r"low_data\.layer is 4; it must be 0 to 3"):
        LowData(LowDataOptions(layer=4)).measure(evaluation_of(model_folder))


def with_valid(folder: Path, labels: list[int]) -> ShardSet:
    """Train has the classes 0 and 1, valid the labels given."""
    (train, known), (test, asked) = random_images(120, 1), random_images(60, 3)
    splits = {"train": (train, known % 2), "test": (test, asked % 2)}
    if labels:
        splits["valid"] = random_images(len(labels), 2)[0], np.array(labels, np.int32)
    return open_shard_set(write_shard_set(folder, splits, random_palette()))


@pytest.mark.parametrize("labels", [[], [-1] * 30, [2] * 30])
def test_valid_is_needed_only_if_it_is_used(
    labels: list[int], model_folder: Path, evaluation_of: Callable, tmp_path: Path
) -> None:
    """Absent, unlabelled, or of a class that train lacks."""
    evaluation = evaluation_of(model_folder, with_valid(tmp_path / "shards", labels))
    honest = LowDataOptions(per_class=[4], fractions=[], subsets=1, l2=[0.1], layer=1)
    assert LowData(honest).unfit(evaluation) is None
    assert "valid_images" not in LowData(honest).measure(evaluation)
    with pytest.raises(ValueError, match=r"split .?valid|no labelled image of valid is of a class"):
        LowData(LowDataOptions(per_class=[4], fractions=[], subsets=1, l2=[0.1], choose_on="valid")).measure(evaluation)
