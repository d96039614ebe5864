"""The plan against what autograd saves, the memory of processes, and a manual calculation."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import BatchConfig, ModelConfig, ParallelConfig, TrainConfig
from pipeline.model import objectives
from pipeline.model.gpt import build_model
from pipeline.model.gpt_config import gpt2_config
from pipeline.plan.memory import memory_of_rank, saved_bytes
from pipeline.train.engine import float8
from tests.benchmarks.memory import CASES, config_of
from tests.launch import Finished, run

XL = ["--config", "configs/igpt_xl.yaml", "--accelerator", "h100-80gb", "--ranks", "64"]


def plan(tmp_path: Path, *arguments: object) -> Finished:
    return run(1, "-m", "pipeline", "plan", *arguments, logs=tmp_path / "logs")


def autograd_bytes(model_config: ModelConfig, precision: str, images: int) -> int:
    """Bytes of distinct storages that a forward pass on CPU saves for the backward pass, without weights."""
    config = gpt2_config(model_config)
    model = build_model(config).to(torch.float32 if precision == "fp32" else torch.bfloat16)
    if precision == "fp8":
        float8.convert(model.transformer.h, torch.device("cpu"))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    tokens = torch.from_numpy(np.zeros((images, config.n_positions), np.int64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        inputs, targets = objectives.next_color(tokens, config.colors)
        objectives.image_loss(model(input_ids=inputs).logits, targets, config.colors).mean()
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize(
    ("block", "precision"),
    [("igpt", "fp32"), ("igpt", "bf16"), ("igpt", "fp8"), ("gpt2", "fp32"), ("gpt2", "bf16")],
)
def test_what_a_block_saves_is_what_autograd_saves(block: str, precision: str) -> None:
    """Of four blocks less two, so that embeddings, head and loss drop out."""
    two, four = (ModelConfig(layers=n, width=128, heads=2, resolution=16, block=block) for n in (2, 4))
    counted = (autograd_bytes(four, precision, 3) - autograd_bytes(two, precision, 3)) / 2
    config = TrainConfig(model=four, batch=BatchConfig(global_size=3, micro_size=3), precision=precision)
    assert saved_bytes(config, gpt2_config(four), on_cpu=True) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("number", [pytest.param(n, marks=pytest.mark.slow) for n in range(11)])
def test_a_run_takes_the_planned_memory(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages; the slow ones are the other cases of python -m tests.benchmarks.memory."""
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(name, "65536")
    _, ranks, case = CASES[number]
    config = config_of(case, ranks)
    done = run(ranks, "-m", "tests.benchmarks.memory", json.dumps(case), logs=tmp_path, fresh=True)
    peaks = [int(line.split()[1]) for text in done.outputs for line in text.splitlines() if line.startswith("BYTES")]
    assert len(peaks) == ranks, done.output
    planned = memory_of_rank(config, gpt2_config(config.model), ranks, on_cpu=True).peak
    assert planned == pytest.approx(max(peaks), rel=0.10)


def test_xl_on_64_h100_is_as_calculated_manually(tmp_path: Path) -> None:
    finished = plan(tmp_path, *XL, "--json", tmp_path / "plan.json")
    assert finished.codes == [0]
    parts = json.loads((tmp_path / "plan.json").read_text())["chosen"]["parts"]
    parameters = 6_810_875_904
    assert parts["weights"] == pytest.approx(2 * parameters, rel=1e-4)  # without the norms
    assert parts["fp32 weights"] + parts["moments"] == pytest.approx(12 * parameters / 64, rel=1e-4)
    # A block saves 20 values of 2 bytes for each of 4096 positions and 3072 channels; 60 blocks, one image.
    assert parts["activations"] == 60 * 20 * 2 * 4096 * 3072
    assert parts["logits and loss"] == 4.5 * 4 * 4096 * 512


def test_proposed_layouts_fit_and_are_in_order(tmp_path: Path) -> None:
    plan(tmp_path, *XL, "--json", tmp_path / "plan.json")
    layouts = json.loads((tmp_path / "plan.json").read_text())["layouts"]
    assert len(layouts) > 50
    assert [layout["seconds"] for layout in layouts] == sorted(layout["seconds"] for layout in layouts)
    best = next(layout for layout in layouts if layout["peak_bytes"] <= 80e9)
    again = plan(tmp_path, *XL, *best["overrides"].split())
    assert again.codes == [0]
    assert best["name"] in again.output


def test_a_layout_that_does_not_fit_is_reported_with_one_that_does(tmp_path: Path) -> None:
    finished = plan(tmp_path, *XL, "--ranks", 8, "--parallel.zero_stage", 1)
    assert finished.codes == [1]
    last = finished.output.splitlines()[-1]
    assert "the configured layout needs" in last
    assert "NVIDIA H100 SXM has 80 GB: use --parallel." in last


def test_more_of_anything_takes_more_memory() -> None:
    def peak(**changes: object) -> float:
        parallel = ParallelConfig(**{k: v for k, v in changes.items() if k != "micro_size"})  # type: ignore[arg-type]
        micro = int(changes.get("micro_size", 1))  # type: ignore[call-overload]
        batch = BatchConfig(global_size=512, micro_size=micro)
        config = TrainConfig(model=ModelConfig(size="xl"), batch=batch, parallel=parallel)
        return memory_of_rank(config, gpt2_config(config.model), 64, on_cpu=False).peak

    assert peak(zero_stage=1) > peak(zero_stage=2) > peak(zero_stage=3) > peak(zero_stage=3, offload="optimizer")
    assert peak(zero_stage=2, micro_size=8) > peak(zero_stage=2, micro_size=8, recompute=True)
    assert peak(zero_stage=1) > peak(zero_stage=1, tensor_parallel=2) > peak(zero_stage=1, tensor_parallel=4)
    assert peak(zero_stage=1) > peak(zero_stage=1, pipeline_stages=4)


@pytest.mark.parametrize("ranks", [256, 24])
def test_the_error_of_a_layout_that_does_not_divide_names_one_that_does(ranks: int, tmp_path: Path) -> None:
    """24: by stages or parts that are no power of two."""
    finished = plan(tmp_path, *XL, "--ranks", ranks)
    assert finished.codes == [2]
    advice = re.search(
        rf"1 x {ranks} = {ranks}\. The fastest layout that divides and fits is (.*)\.\n$", finished.output
    )
    assert advice
    assert "layouts that fit, by estimated speed\n" in finished.output
    chosen = plan(tmp_path, *XL, "--ranks", ranks, *advice[1].split())
    assert chosen.codes == [0]
    assert "none; those with the lowest peak" not in chosen.output


def test_a_shard_set_of_another_resolution_is_an_error(tmp_path: Path, shards: Path) -> None:
    finished = plan(tmp_path, *XL, "--data.shards", shards)
    assert finished.codes == [2]
    assert finished.output.startswith("error: model.resolution is 64; it must be 8, the resolution of the shard set ")


def test_a_wrong_accelerator_is_an_error_before_torch_is_loaded() -> None:
    code = (
        "import sys; from pipeline.plan.command import plan_command\n"
        "try: plan_command(['--accelerator', 'h101'])\n"
        "except ValueError: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--accelerator", "h101"], "--accelerator is 'h101'; it must be one of a100-40gb"),
        (["--ranks", "0"], "--ranks is 0; it must be at least 1"),
        (["--mfu", "40"], "--mfu is 40.0; it must be above 0 and at most 1"),
        (["--mfu", "0.4", "--block_times", "a.json"], "--mfu and --block_times exclude each other"),
        (["--network_gb_per_second", "0"], "--network_gb_per_second is 0.0; it must be above 0"),
        (["--ranks", "48"], "batch.global_size is 64; it must be a multiple of batch.micro_size"),
        (["--parallel.tensor_parallel", "5"], "parallel.tensor_parallel is 5; it must divide"),
        (["--accelerator", "a100-80gb", "--precision", "fp8"], "A100 80GB has no float8 products; it must be bf16"),
    ],
)
def test_invalid_input_is_an_error(tmp_path: Path, arguments: list[str], message: str) -> None:
    """The error is the last line; layouts are listed only if the configured one does not divide."""
    finished = plan(tmp_path, *XL, *arguments)
    assert finished.codes == [2]
    *layouts, error = finished.output.splitlines()
    assert error.startswith("error: ") and message in error
    divides = "must be a multiple" not in message and "must divide" not in message
    assert layouts[:2] == ([] if divides else ["", "layouts that fit, by estimated speed"])
