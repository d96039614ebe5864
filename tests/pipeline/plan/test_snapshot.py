"""The host memory of a snapshot, against the fragments of a real checkpoint."""

import pytest
from safetensors import safe_open

from pipeline.command_line import parse_training
from pipeline.model.gpt_config import gpt2_config
from pipeline.plan.snapshot import snapshot_bytes
from tests.pipeline.conftest import Runner


def test_a_snapshot_has_the_fragments_of_a_checkpoint(finished_run: Runner) -> None:
    run = finished_run.folder / "reference"
    config, _ = parse_training(["--run", str(run)])
    model = gpt2_config(config.model)
    sizes = []
    for path in sorted((run / "checkpoints/step-00000040").glob("rank-*.safetensors")):
        with safe_open(path, "pt") as file:
            names = file.keys()
            slices = list(map(file.get_slice, names))
        sizes += [4 * part.get_shape()[0] for part in slices if part.get_dtype() == "F32"]
    rounded = [1 << (size - 1).bit_length() for size in sizes]
    assert snapshot_bytes(config, model, 2, pinned=False) == pytest.approx(sum(sizes) / 2)
    assert snapshot_bytes(config, model, 2, pinned=True) == pytest.approx(sum(rounded) / 2)


@pytest.mark.parametrize(("size", "factor"), [("s", 1.1), ("m", 1.1), ("l", 1.63), ("xl", 1.63)])
def test_pinned_memory_is_rounded_up_to_powers_of_two(size: str, factor: float) -> None:
    """A width of 3 x 2^n makes matrices of 9/16 of a power of two."""
    config, _ = parse_training(["--config", f"configs/igpt_{size}.yaml", "--run", "RUN"])
    model = gpt2_config(config.model)
    plain, pinned = (snapshot_bytes(config, model, 8, pinned) for pinned in (False, True))
    assert pinned / plain == pytest.approx(factor, rel=0.01)
