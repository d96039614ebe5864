"""Results of an earlier version: adds the title and the headlines, which it did not write into a task's JSON.

They are derived when results are read, so the files stay unchanged, both for evaluate's report and for publish's card.
For new results the task's class defines them, but publish may not import task classes. So this is the only file outside
evaluate that depends on the names of tasks. Do not add new tasks here.
"""

from dataclasses import asdict
from typing import Any

from pipeline.results.headline import Headline, accuracy_headlines
from pipeline.results.published import FINE_TUNING, LOW_DATA, NATS, PROBE
from pipeline.results.text import words

TITLES = {"distill": "Distillation", "fine_tune": "Fine-tuning", "knn": "k-NN", "low_data": "Few labels"}
MEASURES = {"linear_probe": PROBE, "fine_tune": FINE_TUNING, "low_data": LOW_DATA}


def with_headlines(result: dict[str, Any]) -> dict[str, Any]:
    """A task's JSON with title and headlines; unchanged if it has them."""
    if "headlines" in result:
        return result
    title = TITLES.get(result["task"], words(result["task"]).capitalize())
    return result | {"title": title, "headlines": [asdict(headline) for headline in _headlines(result, title)]}


def _headlines(result: dict[str, Any], title: str) -> list[Headline]:
    if result["task"] == "density" and result["masked"]:
        masks = f"{result['draws']} masks per image"
        return [Headline("Nats per masked pixel", result["nats_per_color"], "nats", detail=masks)]
    if result["task"] == "density":
        measure = NATS if result["split"] == "test" else ""
        return [Headline("Nats per color", result["nats_per_color"], "nats", detail=result["split"], measure=measure)]
    if result["task"] == "completions":
        distance = result["distance"]
        bounds = distance and f"floor {distance['originals']:.3f}, shuffled {distance['shuffled_lower_halves']:.3f}"
        name = "Fréchet distance of completions"
        return [Headline(name, distance["completions"], "distance", detail=bounds)] if distance else []
    return accuracy_headlines(result, title, MEASURES.get(result["task"], ""))
