"""Headlines: of every accuracy in a result, read back from JSON, and of earlier versions."""

import json
from dataclasses import asdict

import pytest

from pipeline.evaluate.registry import TASKS, task_class
from pipeline.results.earlier import with_headlines
from pipeline.results.headline import Headline, accuracy_headlines, headlines_of
from pipeline.results.published import NATS, compared_with_published


def test_every_accuracy_is_a_headline() -> None:
    """Of the task itself, of objects within it; a masked model's vote too; and what was chosen."""
    score = {"test_accuracy": 0.5, "test_standard_error": 0.02, "ensembled_test_accuracy": 0.75}
    result = score | {"best_layer": 7, "best_k": 20, "concatenated": {"layers": [6, 7, 8], "test_accuracy": 0.625}}
    rows = accuracy_headlines(result, "Some probe", "As published")
    assert [(row.name, row.text, row.detail) for row in rows] == [
        ("Some probe", "50.0 % ± 2.0", "layer 7, k 20"),
        ("Some probe, vote over masks", "75.0 %", "layer 7, k 20"),
        ("Some probe: concatenated", "62.5 %", "layers 6, 7, 8"),
    ]
    assert {row.measure for row in rows} == {"As published"}
    tried = {"best_layer": 7, "layers": [3, 7], "test_accuracy": 0.5}
    assert [row.detail for row in accuracy_headlines(tried, "Some probe")] == ["layer 7"]


@pytest.mark.parametrize(
    ("headline", "text"),
    [
        (Headline("Probe", 0.8475, "accuracy", 0.01, "layer 7", "As published"), "84.8 % ± 1.0"),
        (Headline("Vote", 0.5, "accuracy"), "50.0 %"),
        (Headline("One", 1.0, "accuracy", 0.0), "100.0 %"),
        (Headline("All", 1.0, "accuracy", interval=(0.9286, 1.0), per_class=1.0), "100.0 % (92.9–100.0)"),
        (Headline("Nats", 2.301, "nats", 0.002), "2.3010"),
        (Headline("Completions", 0.1234, "distance"), "0.123"),
    ],
)
def test_a_headline_is_read_back_from_json(headline: Headline, text: str) -> None:
    stored = json.loads(json.dumps(asdict(headline)))
    assert headlines_of({"task": "some_probe", "headlines": [stored | {"of a later version": 1}]}) == [headline]
    assert headline.text == text


def test_headlines_of_an_earlier_version_have_the_current_names() -> None:
    """So that they are paired with newer results of initial weights, and compared with the published numbers."""
    stored = {"value": 2.0, "unit": "nats", "name": "Nats per colour", "measure": "Test loss, nats per colour"}
    masked = {"value": 3.0, "unit": "nats", "name": "Nats per hidden colour"}
    result = {"task": "density", "headlines": [stored, masked]}
    current = [Headline("Nats per color", 2.0, "nats", measure=NATS), Headline("Nats per masked pixel", 3.0, "nats")]
    assert headlines_of(result) == current
    measures = compared_with_published({"density": result})
    assert measures[NATS][0] == [(result, current[0])]


def test_results_of_an_earlier_version_get_headlines() -> None:
    """Without title and headlines in its JSON, a task of no known name has its name and its accuracies."""
    earlier = with_headlines({"task": "some_probe", "test_accuracy": 0.5})
    assert earlier["title"] == "Some probe"
    assert headlines_of(earlier) == [Headline("Some probe", 0.5, "accuracy")]
    written = {"task": "some_probe", "test_accuracy": 0.5, "title": "SoP", "headlines": []}
    assert with_headlines(written) == written


@pytest.mark.parametrize("name", sorted(TASKS))
def test_added_headlines_equal_the_tasks_headlines(name: str) -> None:
    """Titles of all tasks, and published measures; other headlines are compared on what was measured."""
    if TASKS[name].options is not None:
        score = {"task": name, "test_accuracy": 0.5, "nats_per_color": 2.0, "masked": False, "split": "test"}
        result = score | {"distance": {"completions": 0.5, "originals": 0.25, "shuffled_lower_halves": 1.0}}
        task, found = task_class(name), with_headlines(result)
        assert (found["title"], headlines_of(found)) == (task.title, task.headlines(result))
        masked, nothing = result | {"masked": True, "draws": 3}, result | {"distance": None}
        for other in (masked, nothing):
            assert headlines_of(with_headlines(other)) == task.headlines(other)
