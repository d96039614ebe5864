"""How many H100s each recipe uses well, by `plan`: python -m tests.benchmarks.recipe_scale

Prints the table of configs/README.md, in about a minute. Nothing is measured.
"""

import sys
from collections.abc import Iterator

from pipeline import costs
from pipeline.command_line import parse_training
from pipeline.model.gpt_config import gpt2_config
from pipeline.plan.hardware import hardware_of
from pipeline.plan.layouts import Cluster, alternatives, fits

H100 = costs.ACCELERATORS["h100-80gb"]
NUMBERS = (8, 16, 32, 64, 128)
RECIPES = ("igpt_s", "igpt_m", "igpt_l", "igpt_l_48", "igpt_xl")
WELL_USED = 1.125
"""A number of accelerators is used well if a run costs at most this many times the fewest accelerator-hours."""


def days(recipe: str, number: int) -> float:
    """Of a complete run in the fastest layout that fits on this many H100s."""
    config, _ = parse_training(["--config", f"configs/{recipe}.yaml", "--run", "RUN"])
    cluster = Cluster(H100, number, 8, hardware_of(H100))
    layouts = alternatives(config, gpt2_config(config.model), cluster)
    fastest = min(layout.seconds for layout in layouts if fits(layout, cluster))
    return fastest * config.schedule.steps / 86400


def used_well(days_on: dict[int, float]) -> int:
    """The largest number of accelerators that is used well."""
    least = min(number * time for number, time in days_on.items())
    return max(number for number, time in days_on.items() if number * time <= WELL_USED * least)


def table() -> Iterator[str]:
    """Lines of markdown: days, and accelerator-hours."""
    yield f"| recipe | {' | '.join(map(str, NUMBERS))} H100s | use at most |"
    yield "|" + "---|" * (len(NUMBERS) + 2)
    for recipe in RECIPES:
        days_on = {number: days(recipe, number) for number in NUMBERS}
        cells = [f"{time:.{1 + (time < 1)}f} days, {24 * time * number:,.0f} h" for number, time in days_on.items()]
        yield f"| [{recipe}]({recipe}.yaml) | {' | '.join(cells)} | {used_well(days_on)} |"


if __name__ == "__main__":
    for line in table():
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
