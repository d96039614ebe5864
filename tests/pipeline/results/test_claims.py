"""Sentences and tables that follow from the results."""

from typing import Any

import pytest

from pipeline.results.claims import training_images_sentence, where_baselines_win
from pipeline.results.earlier import with_headlines
from pipeline.results.numbers import legend, numbers_table
from pipeline.results.published import LOW_DATA, NATS, PROBE, compared_with_published, our_rows

ON = {"dataset": "dots", "dataset_digest": "ours"}
PROBED = with_headlines(ON | {
    "task": "linear_probe", "test_images": 1000, "best_layer": 3, "test_accuracy": 0.8475,
    "test_accuracy_interval": [0.824, 0.869], "test_mean_per_class_accuracy": 0.75,
    "concatenated": {"layers": [2, 3], "test_accuracy": 0.9, "test_accuracy_interval": [0.88, 0.92]},
    "raw_pixel_test_accuracy": 0.669, "color_histogram_test_accuracy": 0.88, "majority_class_test_accuracy": 0.1,
})  # fmt: skip
NATS_OF = {"uniform_nats_per_color": 6.2, "unigram_nats_per_color": 5.9, "bigram_nats_per_color": 2.9,
           "left_times_above_nats_per_color": 2.5}  # fmt: skip


def density(nats: float | None, split: str = "test", **other: Any) -> dict[str, Any]:
    result = ON | NATS_OF | {"task": "density", "split": split, "images": 130, "masked": False, "nats_per_color": nats}
    return with_headlines(result | other)


def few(*names: str) -> dict[str, Any]:
    settings = [{"name": name, "test_accuracy": 0.5, "test_accuracy_deviation": 0.01} for name in names]
    return with_headlines(ON | {"task": "low_data", "test_images": 20, "settings": settings})


def test_the_table_has_the_baselines_and_n_beside_each_number() -> None:
    numbers = numbers_table({"linear_probe": PROBED, "density": density(2.25)}, {"density": density(6.2)})
    assert numbers.head == [
        "Measure", "Chosen", "This model", "Random weights", "Raw pixels", "Color histogram", "Most common class",
        "Color counts", "Mean per class", "Better", "n",
    ]  # fmt: skip
    assert numbers.rows == [
        ["Linear probe", "layer 3", "84.8 % (82.4–86.9)", "–", "66.9 %", "88.0 %", "10.0 %", "–", "75.0 %", "higher",
         "1,000"],
        ["Linear probe: concatenated", "layers 2, 3", "90.0 % (88.0–92.0)", "–", "66.9 %", "88.0 %", "10.0 %", "–",
         "–", "higher", "1,000"],
        ["Nats per color", "test", "2.2500", "6.2000", "–", "–", "–", "2.5000", "–", "lower", "130"],
    ]  # fmt: skip
    assert "In brackets: the 95% Wilson interval" in legend(numbers)
    assert "±" not in legend(numbers)
    assert "In brackets" not in legend(numbers_table({"low_data": few("4 per class")}, {}))


def test_baselines_that_reach_the_model_are_named() -> None:
    results = {"linear_probe": PROBED, "density": density(2.9)}
    assert where_baselines_win(results, {}) == [
        "Linear probe, 84.8 % (82.4–86.9): at least as good is color histogram (88.0 %).",
        "Nats per color, 2.9000: at least as good are previous color (2.9000) and two neighboring colors (2.5000).",
    ]
    better = {"density": density(2.0)}
    assert where_baselines_win(better, {}) == []
    assert where_baselines_win(better, better) == [
        "Nats per color, 2.0000: at least as good is initial weights (2.0000)."
    ]
    assert where_baselines_win({"density": density(9.0, masked=True, draws=5)}, {}) == []  # another quantity
    assert where_baselines_win({"density": density(None)}, {"density": density(None)}) == []
    far = {"completions": 2.0, "originals": 0.5, "shuffled_lower_halves": 1.5, "images": 50}
    [sentence] = where_baselines_win({"completions": with_headlines({"task": "completions", "distance": far})}, {})
    assert sentence.endswith(": at least as good is originals with shuffled lower halves (1.500).")


def test_a_student_is_compared_with_labels_alone() -> None:
    scores = {"teacher": 0.9, "student": 0.6, "labels_alone": 0.7}
    result = {"task": "distill", "test_images": 50} | {key: {"test_accuracy": value} for key, value in scores.items()}
    [sentence] = where_baselines_win(
        {"distill": with_headlines(ON | result | {"majority_class_test_accuracy": 0.1})}, {}
    )
    assert "student" in sentence.split(",")[0]
    assert sentence.endswith(": at least as good is labels alone (70.0 %).")


def test_initial_weights_are_compared_only_on_the_same_images() -> None:
    ours = {"density": density(2.0)}
    for other in (density(1.0, "valid"), density(1.0, images=99)):
        assert where_baselines_win(ours, {"density": other}) == []
        assert "Random weights" not in numbers_table(ours, {"density": other}).head


def test_one_image_is_shown_without_an_error() -> None:
    """As an earlier version wrote it, with a standard error of 0, and as it is written now."""
    earlier = {"task": "linear_probe", "test_accuracy": 1.0, "test_standard_error": 0.0, "test_images": 1}
    for result in (earlier, earlier | {"test_standard_error": None, "test_accuracy_interval": None}):
        [row] = numbers_table({"linear_probe": with_headlines(ON | result)}, {}).rows
        assert row == ["Linear probe", "", "100.0 %", "higher", "1"]


@pytest.mark.parametrize(
    ("results", "arguments", "sentence"),
    [
        ({}, (["ours"], None), ""),
        ([density(2.0)], (["ours"], None),
         "The numbers were measured on test, whose images it was not trained on."),
        ([PROBED, density(2.0, "valid")], (["ours"], None),
         "on test and valid; 0 of the 100 images of test and 5 of the 50 images of valid are also in train."),
        ([density(2.0, "valid2")], (["ours"], None), "on valid2; whether images of valid2 are also in train was not"),
        ([PROBED, density(2.0, "train")], (["ours"], None),
         "not trained on. The numbers of Density are of train, the images that it was trained on."),
        ([density(2.0, "train")], (["ours"], None), "measured on train, the images that it was trained on."),
        ([PROBED], (["theirs"], None), "trained on another shard set than it was measured on"),
        ([PROBED], ([], None), "does not record the images that it was trained on"),
        ([PROBED], (["ours"], "hub:lab/model"), "training started from another model's weights"),
        ([density(2.0)], (["theirs", "ours"], None),
         "The numbers were measured on test of a shard set that it was trained on, whose images are not in its train; "
         "whether its other training sets have images of them too was not checked."),
        ([density(2.0, "valid")], (["theirs", "ours"], None),
         "trained on; 5 of the 50 images of valid are also in train; whether its other training sets have"),
        ([density(2.0, "train")], (["theirs", "ours"], None), "measured on train, the images that it was trained on."),
        ([PROBED], (["theirs", "others"], None), "trained on other shard sets than it was measured on"),
    ],
)  # fmt: skip
def test_whether_it_was_trained_on_the_images(results: Any, arguments: tuple, sentence: str) -> None:
    by_task = {result["task"]: result for result in results}
    dataset = {"images": {"test": 100, "valid": 50}, "images_in_train": {"test": 0, "valid": 5}}
    found = training_images_sentence(by_task, *arguments, dataset)
    assert found == sentence or (sentence and sentence in found)
    assert "not trained" in training_images_sentence({"density": density(2.0)}, [], None, {}, trained=False)


def test_published_numbers_are_beside_the_same_measurement_only() -> None:
    """Also if the stored headline claims more, as earlier versions wrote it."""
    assert NATS in compared_with_published({"density": density(2.0)})
    for split in ("train", "valid"):
        claimed = density(2.0, split)
        claimed["headlines"][0]["measure"] = NATS
        assert compared_with_published({"density": claimed}) == {}
    found = compared_with_published({"low_data": few("4 per class", "400 per class", "5 per class", "1%")})
    assert [row.name for _, row in found[LOW_DATA][0]] == ["Few labels: 4 per class", "Few labels: 400 per class"]
    assert compared_with_published({"low_data": few("1%", "14 per class")}) == {}


def test_baselines_follow_the_models_rows_beside_the_published() -> None:
    ours, _ = compared_with_published({"linear_probe": PROBED})[PROBE]
    assert [(name, number, is_model) for _, name, number, is_model in our_rows(ours)] == [
        ("this model: Linear probe", "84.8 % (82.4–86.9)", True),
        ("this model: Linear probe: concatenated", "90.0 % (88.0–92.0)", True),
        ("raw pixels", "66.9 %", False),
        ("color histogram", "88.0 %", False),
        ("most common class", "10.0 %", False),
    ]
