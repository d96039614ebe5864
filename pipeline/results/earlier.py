"""Results of an earlier version: the title and headlines that it did not write into a task's JSON, from the numbers.

They are derived as results are read, so that a folder stays as it was measured, and for all who show it: evaluate's
report and publish's card. A task's own class says the same of new results, but publish may not import it. So this is
the one place outside evaluate that knows how tasks are shown by their names; a new task has no place here.
"""

from dataclasses import asdict
from typing import Any

from pipeline.results.headline import Headline, accuracy_headlines
from pipeline.results.published import FINE_TUNING, LOW_DATA, NATS, PROBE
from pipeline.results.text import words

TITLES = {"distill": "Distillation", "fine_tune": "Fine-tuning", "knn": "k-NN", "low_data": "Few labels"}
MEASURES = {"linear_probe": PROBE, "fine_tune": FINE_TUNING, "low_data": LOW_DATA}


def completed(result: dict[str, Any]) -> dict[str, Any]:
    """A task's JSON with title and headlines; as it is if it has them."""
    if "headlines" in result:
        return result
    title = TITLES.get(result["task"], words(result["task"]).capitalize())
    return result | {"title": title, "headlines": [asdict(headline) for headline in _headlines(result, title)]}


def _headlines(result: dict[str, Any], title: str) -> list[Headline]:
    if result["task"] == "density" and result["masked"]:
        masks = f"{result['draws']} masks an image"
        return [Headline("Nats per hidden color", result["nats_per_color"], "nats", detail=masks)]
    if result["task"] == "density":
        return [Headline("Nats per color", result["nats_per_color"], "nats", detail=result["split"], measure=NATS)]
    if result["task"] == "completions":
        distance = result["distance"]
        bounds = distance and f"floor {distance['originals']:.3f}, shuffled {distance['shuffled_lower_halves']:.3f}"
        name = "Fréchet distance of completions"
        return [Headline(name, distance["completions"], "distance", detail=bounds)] if distance else []
    return accuracy_headlines(result, title, MEASURES.get(result["task"], ""))
