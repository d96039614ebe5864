"""precision fp8, emulated on CPU: products against manual rounding, curves next to bf16's, checkpoints that either
precision resumes."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from pipeline.config import BatchConfig, ModelConfig, ParallelConfig, TrainConfig
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import gpt2_config
from pipeline.model.trunk import block_and_norm
from pipeline.model_folder.convert import load_model_folder
from pipeline.model_folder.export import CheckpointWeights, export, find_checkpoint
from pipeline.train.engine import float8
from tests.launch import Finished, run
from tests.pipeline.conftest import Runner
from tests.pipeline.model_folder.test_export import nats_by_transformers
from tests.pipeline.train.engine.test_topologies import BF16_TOLERANCE, RATE, train_plainly

CPU = torch.device("cpu")
FP8_TOLERANCE = BF16_TOLERANCE
"""Nats per token, from the fp32 curve and from each other: 0.0095 was seen over 40 steps."""
E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)
"""Bits of mantissa, least exponent, largest number."""


def rounded(values: torch.Tensor, mantissa: int, least: int, largest: float) -> np.ndarray:
    """Scaled so that the largest is the format's, rounded to the nearest of its numbers (even, if two are), scaled
    back; float64."""
    plain = values.detach().numpy()
    scale = np.float32(largest / np.float64(np.abs(plain).max()))
    scaled = (plain * scale).astype(np.float64)
    exponents = np.floor(np.log2(np.maximum(np.abs(scaled), 2.0**least)))
    steps = 2.0 ** (exponents - mantissa)
    return np.clip(np.rint(scaled / steps) * steps, -largest, largest) / np.float64(scale)


def test_the_three_products_are_those_of_operands_rounded_by_hand() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(48, 32, bias=False)
    weight = plain.weight
    layers = nn.ModuleList([plain])
    float8.convert(layers, CPU)
    assert layers[0].weight is weight
    inputs = (torch.randn(2, 16, 48) * torch.logspace(-4, 1, 48)).requires_grad_()  # numbers below the format's normal
    gradient = torch.randn(2, 16, 32) * torch.logspace(-6, 1, 32)
    outputs = layers[0](inputs)
    outputs.backward(gradient)
    x, w = rounded(inputs, *E4M3), rounded(weight, *E4M3)
    g = rounded(gradient, *E5M2)
    assert weight.grad is not None
    for found, exact in (
        (outputs, x @ w.T),
        (inputs.grad, g @ w),
        (weight.grad, g.reshape(32, 32).T @ x.reshape(32, 48)),
    ):
        assert np.abs(found.detach().numpy() - exact).max() < 1e-5 * np.abs(exact).max()
    unrounded = (inputs.double() @ weight.double().T).detach().numpy()
    assert np.abs(outputs.detach().numpy() - unrounded).max() > 1e-3 * np.abs(unrounded).max()


def test_blocks_alone_are_converted_and_evaluation_is_as_in_bf16() -> None:
    config = gpt2_config(ModelConfig(layers=2, width=32, heads=2, resolution=8))
    tokens = torch.arange(64).reshape(1, 64)
    models = [build_model(config).bfloat16() for _ in range(2)]
    for model in models:
        initialize(model, seed=0)
        nn.init.normal_(model.lm_head.weight, generator=torch.manual_seed(0))
    float8.convert(models[1].transformer.h, CPU)
    converted = {n for n, module in models[1].named_modules() if isinstance(module, float8.TrainedInFloat8)}
    projections = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert converted == {f"transformer.h.{number}.{name}" for number in range(2) for name in projections}
    assert [n for n, _ in models[0].named_parameters()] == [n for n, _ in models[1].named_parameters()]
    with torch.no_grad():
        trained = [model.train()(tokens).logits for model in models]
        evaluated = [model.eval()(tokens).logits for model in models]
    assert torch.equal(*evaluated)
    assert not torch.equal(*trained)


def test_a_block_for_an_accelerator_is_one_graph_with_one_kernel_a_product() -> None:
    """On the meta device: what would be compiled, and no product of weights in bf16; attention has its own."""
    with torch.device("meta"):
        model = build_model(gpt2_config(ModelConfig(layers=2, width=32, heads=2, resolution=8))).bfloat16()
    float8.convert(model.transformer.h, torch.device("cuda", 0))
    kernels: list[Counter[str]] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        kernels.append(Counter(str(node.target).removesuffix(".default") for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    block, norm = model.transformer.h[0], model.transformer.h[1].ln_1
    states, normed = (torch.zeros(2, 64, 32, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(2))
    step = torch.compile(block_and_norm, backend=backend, fullgraph=True, dynamic=False)
    sum(step(block, norm, states, normed)).sum().backward()
    forward, backward = kernels
    assert (forward["aten._scaled_mm"], backward["aten._scaled_mm"]) == (4, 8)
    assert all(graph[product] == 0 for graph in kernels for product in ("aten.mm", "aten.addmm"))
    assert all(graph["aten._local_scalar_dense"] == 0 for graph in kernels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel": ParallelConfig(zero_stage=0)}, "with parallel.zero_stage 0 it must be bf16 or fp32"),
        ({"parallel": ParallelConfig(zero_stage=3)}, "with parallel.zero_stage 3 it must be bf16 or fp32"),
        ({"parallel": ParallelConfig(tensor_parallel=2)}, "with parallel.tensor_parallel 2 it must be bf16 or fp32"),
        ({"model": ModelConfig(size="s", block="gpt2")}, "with model.block gpt2 it must be bf16 or fp32"),
        ({"model": ModelConfig(layers=1, width=40, heads=2)}, "model.width is 40; with precision fp8 it must be"),
        (
            {"model": ModelConfig(size="s", resolution=6), "batch": BatchConfig(micro_size=2)},
            "batch.micro_size is 2; with precision fp8 micro_size x 36 pixels must be a multiple of 16",
        ),
    ],
)
def test_what_it_cannot_be_combined_with(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"model": ModelConfig(size="s"), "precision": "fp8"} | settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "capability", "hip", "found"),
    [
        ("NVIDIA A100 80GB PCIe", (8, 0), None, "of compute capability 8.0"),
        ("AMD Instinct MI250X", (9, 0), "6.4", "which is not from NVIDIA"),
        ("NVIDIA L4", (8, 9), None, None),
        ("NVIDIA H100 80GB HBM3", (9, 0), None, None),
    ],
)
def test_accelerators_without_float8_are_named(
    name: str, capability: tuple[int, int], hip: str | None, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(float8.torch, "version", SimpleNamespace(hip=hip))
    if found is None:
        float8.check_device(torch.device("cuda", 0))
        return
    with pytest.raises(ValueError, match=f"precision is fp8, and the device is {name}, {found}; set it to bf16"):
        float8.check_device(torch.device("cuda", 0))


STAGES = {"parallel__pipeline_stages": 2, "parallel__zero_stage": 1, "batch__micro_size": 2}
ON_TWO_RANKS: list[tuple[str, dict[str, object]]] = [  # the run and its options; the second time it resumes
    ("bf16", {"precision": "bf16"}),
    ("ZeRO-1", {"precision": "fp8", "batch__micro_size": 2}),
    ("ZeRO-2", {"precision": "fp8", "parallel__zero_stage": 2, "parallel__recompute": True}),
    ("fp8 to bf16", {"precision": "fp8", "schedule__steps": 20, "parallel__zero_stage": 2}),
    ("bf16 to fp8", {"precision": "bf16", "schedule__steps": 20}),
    ("stages", {"precision": "fp8", **STAGES}),  # after which DeepSpeed makes nothing but stages in one process
    ("fp8 to bf16", {"precision": "bf16", **STAGES}),
    ("bf16 to fp8", {"precision": "fp8", **STAGES}),
]
FP8_RUNS = ["one rank", "ZeRO-1", "ZeRO-2", "stages"]
GONE_ON = ["fp8 to bf16", "bf16 to fp8"]


COMMON = {"optimizer__learning_rate": RATE, "schedule__decay": "constant", "checkpoint__every_steps": 20}


@dataclass
class Trained:
    """Runs in one folder, and the output of the command that trained them."""

    runner: Runner
    finished: Finished


@pytest.fixture(scope="module")
def one(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The run named "one rank"."""
    runner = Runner(shards, tmp_path_factory.mktemp("float8"))
    finished = runner.train("one rank", **COMMON, precision="fp8")
    assert finished.codes == [0], finished.output
    return Trained(runner, finished)


@pytest.fixture(scope="module")
def two(one: Trained) -> Trained:
    """The runs on two ranks, beside the one on one: a process starts but once."""
    runner = one.runner
    runs = [runner.arguments(name, **COMMON | settings)[3:] for name, settings in ON_TWO_RANKS]
    (runner.folder / "runs.json").write_text(json.dumps(runs))
    logs = runner.folder / "logs"
    finished = run(2, "-m", "tests.pipeline.train.several_runs", runner.folder / "runs.json", logs=logs, seconds=900)
    assert finished.codes == [0, 0], "\n".join(finished.outputs)
    return Trained(runner, finished)


def furthest(curve: list[float], other: list[float]) -> float:
    assert len(curve) == len(other) == 40
    return max(abs(a - b) for a, b in zip(curve, other, strict=True))


def test_the_curve_is_beside_that_of_fp32(one: Trained, shards: Path) -> None:
    distance = furthest(one.runner.losses("one rank"), train_plainly(shards, decay="constant"))
    assert 1e-4 < distance < FP8_TOLERANCE


@pytest.mark.slow  # a minute or more on processors without fast kernels for bf16
def test_the_curve_of_every_topology_is_beside_that_of_bf16_and_fp32(two: Trained, shards: Path) -> None:
    losses = {name: two.runner.losses(name) for name in (*FP8_RUNS, "bf16")}
    losses["fp32"] = train_plainly(shards, decay="constant")
    assert losses["fp32"][-1] < losses["fp32"][0] - 0.5
    for name in FP8_RUNS:
        distances = {other: furthest(losses[name], losses[other]) for other in losses if other != name}
        print(name, {other: f"{distance:.1e}" for other, distance in distances.items()})
        assert max(distances.values()) < FP8_TOLERANCE, distances
        assert distances["bf16"] > 1e-4  # it is not bf16


@pytest.mark.slow
@pytest.mark.parametrize("name", GONE_ON)
def test_a_checkpoint_resumes_in_the_other_precision_and_on_another_topology(two: Trained, name: str) -> None:
    assert two.finished.output.count(f"resumed from {two.runner.folder / name}/checkpoints/step-00000020") == 1
    assert furthest(two.runner.losses(name), two.runner.losses("bf16")) < FP8_TOLERANCE


@pytest.mark.slow
def test_a_checkpoint_has_the_tensors_of_any_precision(two: Trained) -> None:
    checkpoints = [find_checkpoint(two.runner.folder / name) for name in ("stages", "bf16")]
    assert checkpoints[0].reader().shapes == checkpoints[1].reader().shapes


def test_an_fp8_run_exports_its_weights_as_any(one: Trained, shards: Path, tmp_path: Path) -> None:
    """transformers meets the run's last validation loss; the logits are those of the weights in a plain model."""
    checkpoint = find_checkpoint(one.runner.folder / "one rank")
    export(checkpoint, tmp_path / "model")
    weights = CheckpointWeights(checkpoint)
    plain = build_model(weights.config)
    plain.load_state_dict(dict(weights.items()))
    tokens = torch.arange(128).reshape(2, 64)
    exported = load_model_folder(tmp_path / "model").model
    with torch.no_grad():
        torch.testing.assert_close(exported(tokens).logits, plain(tokens).logits, atol=0, rtol=0)
    last = [row["valid_loss"] for row in one.runner.rows("one rank") if "valid_loss" in row][-1]
    assert nats_by_transformers(tmp_path / "model", shards, images=33) == pytest.approx(last, abs=2e-3)


def test_the_console_says_how_it_is_computed_and_nothing_of_torchaos(one: Trained) -> None:
    assert "float8    the blocks' matrix products in training, tensorwise scaling, emulated" in one.finished.output
    assert "(bf16 matrix product measured on this cpu)" in one.finished.output
    for word in ("torchao", "Failed to load", "Enum"):
        assert word not in one.finished.output
