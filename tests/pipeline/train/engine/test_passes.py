"""A step's passes over the gradients, and its waits: what DeepSpeed does twice or for nothing is left out."""

from math import nan
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.train.engine import deepspeed_internals as internals
from pipeline.train.engine.base import NOT_FINITE, StepDecision, accept_finite
from pipeline.train.engine.deepspeed_engine import ConditionalStep
from tests.launch import run
from tests.pipeline.conftest import Runner
from tests.pipeline.train.engine.test_topologies import BF16_TOLERANCE, FP32_TOLERANCE, RATE, train_plainly

ONE_RANK = """
import numpy as np, torch
from collections import Counter
from torch.utils._python_dispatch import TorchDispatchMode
from pipeline.config import *
from pipeline.distributed import describe_ranks
from pipeline.model.gpt_config import gpt2_config
from pipeline.model.masks import Batch
from pipeline.train.engine.process_group import start_group
from pipeline.train.engine.pipeline import PipelineEngine
from pipeline.train.engine.zero import ZeroEngine

class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, arguments=(), keywords=None):
        result = op(*arguments, **(keywords or {}))
        sizes = [t.numel() for t in (result, *arguments) if isinstance(t, torch.Tensor)]
        seen.append((op.name().split("::")[1].split(".")[0], max(sizes, default=0)))
        return result

config = TrainConfig(model=ModelConfig(layers=2, width=32, heads=2, resolution=4), data=DataConfig(shards=""),
                     precision="bf16", batch=BatchConfig(global_size=4, micro_size=2))
ranks, model = describe_ranks(), gpt2_config(config.model)
start_group(ranks)
import torch.distributed as dist
from pipeline import distributed
assert distributed._host_group is not None and dist.get_backend(distributed._host_group) == "gloo"
batch = Batch(np.arange(4 * 16, dtype=np.uint16).reshape(4, 16))
engine = ZeroEngine(config, model, ranks, True)
engine.step(batch, 1e-3)
seen = []
with Recorder():
    assert engine.step(batch, 1e-3).applied
flat = max(t.numel() for t in engine._engine.optimizer.fp32_groups_gradients_flat)
names = [name for name, _ in seen]
waits_after = names[names.index("_fused_adamw_"):].count("_local_scalar_dense")
assert waits_after == 0, f"{waits_after} waits after the update"
passes = Counter(name for name, size in seen if size == flat)
assert passes["zero_"] == 1, f"the gradients are cleared {passes['zero_']} times"
assert passes["copy_"] == 1, f"{passes['copy_'] - 1} copies of all gradients, beside that of the weights to bf16"
assert "_foreach_zero_" not in names, "the gradients in bf16 are cleared for the second micro-batch"

engine = PipelineEngine(config, model, ranks, True)
for _ in range(3):
    engine.step(batch, 1e-3)
timer = engine._engine.timers("train_batch")
kept = len(getattr(timer, "event_timers", []))
assert kept == 0, f"{kept} pairs of events after 3 steps"
"""


def test_a_step_of_one_rank(tmp_path: Path) -> None:
    finished = run(1, "-c", ONE_RANK, logs=tmp_path)
    assert finished.codes == [0], finished.output


@pytest.mark.parametrize("contiguous", [True, False])
def test_gradients_are_reduced_without_waiting_if_none_are_to_be_freed(contiguous: bool) -> None:
    """DeepSpeed waits for the device in this function if overlap_comm is true."""
    seen: list[bool] = []
    optimizer = SimpleNamespace(overlap_comm=True, contiguous_gradients=contiguous)
    optimizer.allreduce_and_copy = lambda bucket, rank: seen.append(optimizer.overlap_comm)
    internals.reduce_without_waiting(optimizer)
    optimizer.allreduce_and_copy([], rank=1)
    assert seen == [not contiguous]
    assert optimizer.overlap_comm


class Optimized:
    """A parameter with a gradient, and its optimizer."""

    def __init__(self, gradient: torch.Tensor) -> None:
        self.weight = torch.nn.Parameter(torch.ones_like(gradient))
        self.weight.grad = gradient.clone()
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1, eps=1e-3, weight_decay=0.0, fused=True)


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_the_update_clips_as_torch_does(size: float) -> None:
    """Twice: the moments of the first update are those of a clipped gradient too."""
    torch.manual_seed(0)
    gradients = [size * torch.randn(100) for _ in range(2)]
    ours, plain = Optimized(gradients[0]), Optimized(gradients[0])
    conditional = ConditionalStep(ours.optimizer, lambda: (1.0, float(gradient.norm())), clip_norm=4.0)
    for gradient in gradients:
        ours.weight.grad, plain.weight.grad = gradient.clone(), gradient.clone()
        conditional.begin(accept_finite)
        ours.optimizer.step()
        torch.nn.utils.clip_grad_norm_([plain.weight], 4.0)
        plain.optimizer.step()
        assert conditional.result(torch.tensor(nan)).grad_norm == pytest.approx(float(gradient.norm()))
    assert torch.allclose(ours.weight, plain.weight, rtol=0, atol=1e-6)
    assert torch.equal(ours.weight, plain.weight) or size > 1


def test_a_step_that_is_not_applied_changes_nothing() -> None:
    ours = Optimized(torch.full((3,), nan))
    conditional = ConditionalStep(ours.optimizer, lambda: (1.0, nan), clip_norm=1.0)
    conditional.begin(accept_finite)
    ours.optimizer.step()
    assert torch.equal(ours.weight, torch.ones(3))
    assert conditional.result(torch.tensor(7.0)).reason == NOT_FINITE
    conditional.begin(lambda loss, norm: StepDecision(True, None))  # DeepSpeed itself rejects the gradient
    assert conditional.result(torch.tensor([7.0])).loss == 7.0


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"parallel__zero_stage": 2},
        pytest.param({"parallel__zero_stage": 0}, marks=pytest.mark.slow),
        pytest.param({"parallel__zero_stage": 3, "precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param({"parallel__zero_stage": 2, "precision": "bf16"}, marks=pytest.mark.slow),
    ],
)
def test_gradients_in_bf16_messages_stay_near(runner: Runner, settings: dict[str, object]) -> None:
    common = {**settings, "optimizer__learning_rate": RATE, "schedule__decay": "constant", "schedule__steps": 12}
    finished = runner.train("run", 2, **common, parallel__communication="bf16")
    assert finished.codes == [0, 0], finished.output
    assert "gradients are summed over the data-parallel ranks in bf16" in finished.output
    losses, plain = runner.losses("run"), train_plainly(runner.shards, sizes=[8] * 12, decay="constant")
    assert losses == pytest.approx(plain, abs=BF16_TOLERANCE)
    assert losses != pytest.approx(plain, abs=FP32_TOLERANCE / 10)
