"""The moving average of the weights: as in plain torch on every layout, and without any trace in the run beside it."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipeline.checkpoint.format import Checkpoint, open_checkpoint
from pipeline.checkpoint.fragments import EMA
from pipeline.config import BatchConfig, EmaConfig, ModelConfig, ParallelConfig, TrainConfig
from pipeline.costs import parameter_count
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import gpt2_config
from pipeline.plan.memory import memory_of_rank
from pipeline.plan.snapshot import snapshot_bytes
from pipeline.rank_errors import reported_on_all_ranks
from pipeline.train.engine import average
from pipeline.train.engine.base import StepDecision
from pipeline.train.engine.deepspeed_engine import ConditionalStep
from pipeline.train.engine.deepspeed_internals import RankCoordinates
from pipeline.train.engine.zero import ZeroEngine
from pipeline.train.health.stop import StopRequested
from tests.launch import run
from tests.pipeline.conftest import TINY, Runner
from tests.pipeline.model_folder.test_export import nats_by_transformers
from tests.pipeline.train.engine.test_offload import needs_compiler
from tests.pipeline.train.engine.test_topologies import RATE, train_plainly

DECAY = 0.9
TOLERANCE = 1e-6
LAYOUTS: dict[str, dict[str, object]] = {
    "Z0": {"parallel__zero_stage": 0},
    "Z1": {"parallel__zero_stage": 1},
    "Z2": {"parallel__zero_stage": 2},
    "Z3": {"parallel__zero_stage": 3},
    "PP2": {"parallel__pipeline_stages": 2},
    "tp2": {"parallel__tensor_parallel": 2},
}
OFFLOADED: dict[str, dict[str, object]] = {
    "Z1, optimizer": {"parallel__offload": "optimizer"},
    "Z3, parameters": {"parallel__offload": "parameters", "parallel__zero_stage": 3},
    "PP2, optimizer": {"parallel__offload": "optimizer", "parallel__pipeline_stages": 2},
}
EVERY_STEP = {"batch__micro_size": 2, "checkpoint__every_steps": 1, "checkpoint__keep_every": 1}
Weights = dict[str, torch.Tensor]


def train_several(runner: Runner, ranks: int, runs: dict[str, dict[str, object]]) -> str:
    """Trains one run after the other in the same processes, whose start takes longer than the runs; their output."""
    file = runner.folder / "runs.json"
    file.write_text(json.dumps([runner.arguments(name, **settings)[3:] for name, settings in runs.items()]))
    finished = run(ranks, "-m", "tests.pipeline.train.several_runs", file, logs=runner.folder / "logs", seconds=1800)
    assert finished.codes == [0] * ranks, "\n".join(finished.outputs)
    return finished.output


def checkpoints_of(runner: Runner, name: str) -> list[Checkpoint]:
    """All of a run, oldest first."""
    return [open_checkpoint(folder) for folder in sorted((runner.folder / name / "checkpoints").glob("step-*"))]


def weights_of(checkpoint: Checkpoint, state: str = "weight") -> Weights:
    reader = checkpoint.reader()
    return {name: reader.read(name, state) for name in reader.shapes}


def initial_weights(rounded: bool = False, width: object = TINY["model.width"]) -> Weights:
    """rounded: to bf16, from which DeepSpeed makes the fp32 weights of a bf16 run."""
    shape = {key: TINY[f"model.{key}"] for key in ("layers", "width", "heads", "resolution")} | {"width": width}
    model = build_model(gpt2_config(ModelConfig(**shape)))  # type: ignore[arg-type]
    initialize(model, seed=0)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {name: weight.bfloat16().float() if rounded else weight for name, weight in weights.items()}


def averaged_plainly(average: Weights, steps: Iterable[Weights]) -> Weights:
    """The definition, in plain torch and fp32, from an average and the weights after each step."""
    for weights in steps:
        average = {name: DECAY * average[name] + (1 - DECAY) * weights[name] for name in average}
    return average


def difference(one: Weights, other: Weights) -> float:
    """The largest of an element."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def check_beside(runner: Runner, with_average: str, without: str) -> None:
    """Losses, weights and moments with and without the average are equal, bit for bit."""
    assert runner.losses(with_average) == runner.losses(without)
    kept = [[row["valid_loss"] for row in runner.rows(name) if "valid_loss" in row] for name in (with_average, without)]
    assert kept[0] == kept[1]
    assert all(("valid_loss_ema" in row) == ("valid_loss" in row) for row in runner.rows(with_average))
    assert not any("valid_loss_ema" in row for row in runner.rows(without))
    averaged, plain = (checkpoints_of(runner, name)[-1].record for name in (with_average, without))
    assert {key: value for key, value in averaged.fingerprints.items() if key != EMA} == plain.fingerprints
    assert averaged.probe_loss == plain.probe_loss


def check_average(runner: Runner, name: str, steps: int, **initial: object) -> float:
    """The average in the last checkpoint is that of the weights in all of them; the largest difference.

    initial: as for initial_weights.
    """
    checkpoints = checkpoints_of(runner, name)
    assert [one.record.step for one in checkpoints] == list(range(1, steps + 1))
    expected = averaged_plainly(initial_weights(**initial), map(weights_of, checkpoints))  # type: ignore[arg-type]
    found = difference(weights_of(checkpoints[-1], EMA), expected)
    assert found <= TOLERANCE
    assert difference(weights_of(checkpoints[-1], EMA), weights_of(checkpoints[-1])) > 100 * TOLERANCE
    return found


def check_export(runner: Runner, name: str, tmp_path: Path, tolerance: float) -> None:
    """The exported average has the validation loss that the run has logged for it."""
    out, source = tmp_path / f"{name} model", runner.folder / name
    finished = run(1, "-m", "pipeline", "export", source, "--out", out, "--weights", "ema", logs=tmp_path / "export")
    assert finished.codes == [0], finished.output
    assert re.search(r"loss of the check image at step \d+, nats per token: .* with the raw weights, ", finished.output)
    last = [row for row in runner.rows(name) if "valid_loss" in row][-1]
    found = nats_by_transformers(out, runner.shards, images=33)
    assert found == pytest.approx(last["valid_loss_ema"], abs=tolerance)
    assert abs(found - last["valid_loss"]) > 10 * tolerance
    assert json.loads((out / "training/checkpoint.json").read_text())["weights"] == "ema"
    card = (out / "README.md").read_text()
    assert "| Weights | the exponential moving average of the trained weights (EMA) |" in card
    assert f"| EMA decay | {DECAY} |" in card
    assert f"| Last validation loss of the averaged weights | {last['valid_loss_ema']:.4f}" in card


def test_the_average_on_zero_3_is_as_in_plain_torch_and_leaves_no_trace(runner: Runner, tmp_path: Path) -> None:
    """With matrices so large (100,000 elements) that DeepSpeed gathers them, and that a validation leaves gathered."""
    settings = {**EVERY_STEP, **LAYOUTS["Z3"], "schedule__steps": 6, "validation__every_steps": 2, "model__width": 192}
    train_several(runner, 2, {"with": {**settings, "ema__decay": DECAY}, "without": settings})
    check_beside(runner, "with", "without")
    check_average(runner, "with", steps=6, width=192)
    check_export(runner, "with", tmp_path, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_average_is_as_in_plain_torch_and_leaves_no_trace(runner: Runner, layout: str, tmp_path: Path) -> None:
    settings = {**EVERY_STEP, **LAYOUTS[layout], "schedule__steps": 50, "validation__every_steps": 7}
    runs = {"fp32": settings, "bf16": {**settings, "precision": "bf16"}}
    train_several(runner, 2, {f"{name} EMA": {**kept, "ema__decay": DECAY} for name, kept in runs.items()} | runs)
    for name in runs:
        check_beside(runner, f"{name} EMA", name)
        rounded = name == "bf16" and layout != "Z0"
        print(f"\n{layout} {name}: {check_average(runner, f'{name} EMA', steps=50, rounded=rounded):.2g}")
    check_export(runner, "fp32 EMA", tmp_path, tolerance=1e-5)


@needs_compiler
@pytest.mark.slow  # a minute where DeepSpeed's Adam is compiled for the first time
def test_the_average_of_offloaded_weights(runner: Runner, tmp_path: Path) -> None:
    for layout, options in OFFLOADED.items():
        settings = {**EVERY_STEP, **options, "schedule__steps": 12, "validation__every_steps": 5}
        average_too = f"{layout} EMA"
        train_several(runner, 2, {average_too: {**settings, "ema__decay": DECAY}, layout: settings})
        check_beside(runner, average_too, layout)
        print(f"\n{layout}: {check_average(runner, average_too, steps=12):.2g}")
        check_export(runner, average_too, tmp_path, tolerance=1e-5)


@pytest.mark.slow
def test_the_average_moves_to_other_layouts(runner: Runner) -> None:
    """The load compares the checksums of the average; the next average is that of the definition."""
    moves = [(2, "Z3", 6), (2, "PP2", 12), (1, "Z1", 18), (2, "tp2", 24), (2, "Z0", 30)]
    for ranks, layout, steps in moves:
        plain = {"parallel__zero_stage": 1, "parallel__pipeline_stages": 1, "parallel__tensor_parallel": 1}
        settings = {**EVERY_STEP, **plain, "schedule__decay": "constant", "schedule__steps": steps}
        runner.check_trains("moved", ranks, **settings | LAYOUTS[layout], ema__decay=DECAY)
        assert all(EMA in one.record.fingerprints for one in checkpoints_of(runner, "moved"))
        print(f"\nuntil step {steps} on {layout} x {ranks}: {check_average(runner, 'moved', steps=steps):.2g}")


@pytest.mark.slow
def test_a_resumed_average_is_equal_bit_for_bit(runner: Runner) -> None:
    settings = {**EVERY_STEP, **LAYOUTS["Z3"], "schedule__decay": "constant", "ema__decay": DECAY}
    until = {"run": 8, "unbroken": 16}
    train_several(runner, 2, {name: {**settings, "schedule__steps": steps} for name, steps in until.items()})
    runner.check_trains("run", 2, **settings, schedule__steps=16)
    last, unbroken = (checkpoints_of(runner, name)[-1].record for name in ("run", "unbroken"))
    assert last.fingerprints == unbroken.fingerprints


@pytest.mark.slow
def test_a_decay_that_changes_when_a_run_resumes(runner: Runner) -> None:
    common = {**EVERY_STEP, "schedule__decay": "constant"}
    runner.check_trains("run", 1, **common, schedule__steps=5)
    on = runner.train("run", 1, **common, schedule__steps=8, ema__decay=DECAY).output
    assert "changed since the last start: ema.decay was 0.0 and is now 0.9" in on
    assert "step-00000005 has no average of the weights (ema): it starts from the weights of step 5" in on
    fifth, *later = map(weights_of, checkpoints_of(runner, "run")[4:])
    expected = averaged_plainly(fifth, later)
    assert difference(weights_of(checkpoints_of(runner, "run")[-1], EMA), expected) <= TOLERANCE
    other = runner.train("run", 1, **common, schedule__steps=9, ema__decay=0.5).output
    assert "changed since the last start: ema.decay was 0.9 and is now 0.5" in other
    assert "no average" not in other
    off = runner.train("run", 1, **common, schedule__steps=10, ema__decay=0.0).output
    assert "the average of the weights (ema) in" in off and "is dropped, because ema.decay is 0" in off
    assert not checkpoints_of(runner, "run")[-1].reader().has_average


@pytest.mark.slow
def test_the_average_of_plain_torchs_own_training(runner: Runner) -> None:
    """Of a training without DeepSpeed, whose weights drift from the run's within rounding."""
    found: list[Weights] = [initial_weights()]

    def add(model: nn.Module) -> None:
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        found[0] = averaged_plainly(found[0], [weights])

    train_plainly(runner.shards, after_step=add)
    for layout in ("Z1", "Z3", "PP2"):
        settings = {"batch__micro_size": 2, **LAYOUTS[layout], "optimizer__learning_rate": RATE}
        runner.check_trains(layout, 2, **settings, ema__decay=DECAY)
        drift = difference(weights_of(checkpoints_of(runner, layout)[-1], EMA), found[0])
        print(f"\n{layout}: {drift:.2g}")
        assert drift <= 1e-4


class OneRank:
    """An engine of one rank with ZeRO-0, whose model is one matrix."""

    def __init__(self) -> None:
        self.model, self.engine = nn.Linear(3, 4, bias=False), ZeroEngine.__new__(ZeroEngine)
        self.weight = self.model.weight
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True)
        state = (self.optimizer, self.model, RankCoordinates(0, 1, {}))
        self.engine._engine = SimpleNamespace(optimizer=self.optimizer)
        self.engine._model, self.engine._coordinates = state[1:]
        average.start(*state)

    @property
    def average(self) -> torch.Tensor:
        return self.optimizer.state[self.weight][EMA]

    def step(self, conditional: ConditionalStep, decision: StepDecision) -> None:
        conditional.begin(lambda loss, norm: decision)
        self.weight.grad = torch.ones_like(self.weight)
        self.optimizer.step()


def test_a_skipped_step_does_not_move_the_average() -> None:
    rank = OneRank()
    conditional = ConditionalStep(rank.optimizer, lambda: (1.0, 1.0), decay=0.5)
    initial = rank.weight.detach().clone()
    rank.step(conditional, StepDecision(False, "spike"))
    assert torch.equal(rank.average, initial)
    rank.step(conditional, StepDecision(True, None))
    assert not torch.equal(rank.weight, initial)
    torch.testing.assert_close(rank.average, (initial + rank.weight) / 2, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("error", "restored"),
    [(None, True), (reported_on_all_ranks(StopRequested()), True), (RuntimeError("one rank"), False)],
)
def test_weights_are_restored_unless_one_rank_failed(error: Exception | None, restored: bool) -> None:
    rank = OneRank()
    rank.step(ConditionalStep(rank.optimizer, lambda: (1.0, 1.0), decay=0.7), StepDecision(True, None))
    weight, averaged = rank.weight.detach().clone(), rank.average.clone()
    with suppress(StopRequested, RuntimeError), rank.engine.averaged():
        assert torch.equal(rank.weight, averaged)
        if error is not None:
            raise error
    assert torch.equal(rank.weight, weight) == restored
    assert torch.equal(rank.average, averaged) == restored


def test_a_swap_in_chunks_restores_every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(average, "CHUNK", 5)
    rank = OneRank()
    with torch.no_grad():
        rank.average.copy_(torch.tensor([math.inf, -0.0, 1e-45]).repeat(4, 1))
    before = [tensor.detach().clone() for tensor in (rank.weight, rank.average)]
    with rank.engine.averaged():
        assert torch.equal(rank.weight, before[1])
    for now, then in zip((rank.weight, rank.average), before, strict=True):
        assert torch.equal(now.detach().view(torch.int32), then.view(torch.int32))


def test_the_plan_counts_the_average() -> None:
    model, batch = ModelConfig(size="s"), BatchConfig(global_size=64, micro_size=8)

    def planned(decay: float, function: Callable[[TrainConfig], float], **parallel: object) -> float:
        layout = ParallelConfig(**parallel)  # type: ignore[arg-type]
        return function(TrainConfig(model=model, batch=batch, parallel=layout, ema=EmaConfig(decay=decay)))

    def memory(config: TrainConfig) -> float:
        return sum(memory_of_rank(config, gpt2_config(config.model), 8, on_cpu=False).peak_parts.values())

    def snapshot(config: TrainConfig) -> float:
        return snapshot_bytes(config, gpt2_config(config.model), 8, pinned=False)

    parameters = parameter_count(gpt2_config(model))
    for stage, ranks in ((0, 1), (1, 8), (3, 8)):
        more = planned(0.999, memory, zero_stage=stage) - planned(0.0, memory, zero_stage=stage)
        assert more == pytest.approx(4 * parameters / ranks, rel=1e-3)
        assert planned(0.999, snapshot, zero_stage=stage) == pytest.approx(4 / 3 * planned(0.0, snapshot))
    offloaded = {"zero_stage": 1, "offload": "optimizer"}
    assert planned(0.999, memory, **offloaded) == planned(0.0, memory, **offloaded)


@pytest.mark.parametrize("decay", [1.0, 1.5, -0.1, math.nan, math.inf])
def test_a_decay_outside_its_range_is_an_error(decay: float) -> None:
    message = f"ema.decay is {decay}; it must be at least 0 (no average) and below 1."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        EmaConfig(decay=decay)


def test_an_average_on_nvme_is_an_error() -> None:
    parallel = ParallelConfig(zero_stage=3, offload="optimizer", nvme_path="/disk")
    with pytest.raises(ValueError, match=r"^ema.decay is 0.9; with parallel.nvme_path it must be 0: .* a fifth\.$"):
        TrainConfig(model=ModelConfig(size="s"), parallel=parallel, ema=EmaConfig(decay=0.9))


def test_a_run_from_before_the_option_has_not_changed(runner: Runner, finished_run: Runner) -> None:
    """Its configuration has no section `ema`."""
    from pipeline.checkpoint.run_folder import RunFolder
    from pipeline.command_line import parse_training

    folder = Path(shutil.copytree(finished_run.folder / "reference", runner.folder / "run"))
    config, _ = parse_training(["--run", str(folder)])
    settings = (folder / "config.yaml").read_text().replace("ema:\n  decay: 0.0\n", "")
    assert "ema" not in settings
    (folder / "config.yaml").write_text(settings)
    assert RunFolder(folder).changes(config) == {}
