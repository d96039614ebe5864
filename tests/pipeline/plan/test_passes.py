"""The bytes of DeepSpeed's passes over gradients and weights, against a count in real engines on two ranks."""

import json
from pathlib import Path

import pytest

from pipeline.config import BatchConfig, ParallelConfig, TrainConfig
from pipeline.plan.passes import passes_of
from tests.launch import run
from tests.pipeline.plan.traffic import MICRO_BATCHES, SHAPE

CASES: dict[str, list[dict[str, object]]] = {
    "bf16": [
        *({"zero_stage": stage, "precision": "bf16"} for stage in (1, 2, 3)),
        *({"zero_stage": stage, "precision": "bf16", "communication": "bf16"} for stage in (1, 2, 3)),
    ],
    "others": [{"zero_stage": stage, "precision": "fp32"} for stage in (0, 1, 2, 3)],
}
RANKS = 2


@pytest.mark.parametrize("kind", ["bf16", pytest.param("others", marks=pytest.mark.slow)])
def test_the_bytes_of_a_step_are_those_of_an_engine(kind: str, tmp_path: Path) -> None:
    cases = CASES[kind]
    finished = run(RANKS, "-m", "tests.pipeline.plan.traffic", *map(json.dumps, cases), logs=tmp_path)
    assert finished.codes == [0] * RANKS, finished.output
    counted = [float(line.split()[1]) for line in finished.output.splitlines() if line.startswith("COUNTED")]
    assert counted == [pytest.approx(planned_bytes(**case), rel=0.02) for case in cases]  # type: ignore[arg-type]


def planned_bytes(precision: str, **options: object) -> float:
    """For one parameter, of which each rank owns its share."""
    parallel = ParallelConfig(**options)  # type: ignore[arg-type]
    batch = BatchConfig(global_size=RANKS * MICRO_BATCHES, micro_size=1)
    passes = passes_of(TrainConfig(model=SHAPE, batch=batch, parallel=parallel, precision=precision))  # type: ignore[arg-type]
    owned = passes.owned + MICRO_BATCHES * passes.micro_batch_owned
    return passes.step + MICRO_BATCHES * passes.micro_batch + owned / RANKS
