"""Failures of one rank: NaN or Inf, loss spikes, hangs, replicas that differ; each ends as designed."""

import json
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.shards.reader import open_shard_set
from pipeline.config import HealthConfig
from pipeline.train.data.batches import ImageOrder
from pipeline.train.engine.base import StepResult
from pipeline.train.health.step_filter import StepFilter
from pipeline.train.health.watchdog import describe
from tests.launch import SECONDS, Finished, finish, run, start
from tests.pipeline.conftest import Runner


def train_ill(
    runner: Runner, name: str, kind: str, rank: int, steps: tuple[int, int], ranks: int = 2, **overrides: Any
) -> Finished:
    arguments = runner.arguments(name, **{"batch__micro_size": 2, "schedule__steps": 20, **overrides})
    command = ["-m", "tests.pipeline.train.health.failing_rank", kind, rank, *steps, "--", *arguments[2:]]
    logs = runner.folder / f"{name}.logs"
    processes = start(ranks, *command, logs=logs)
    if kind == "frozen":
        assert processes[1 - rank].wait(SECONDS) == 1
        processes[rank].send_signal(signal.SIGKILL)
    return finish(processes, logs)


def skipped(runner: Runner, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runner.folder / name / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"parallel__zero_stage": 0}, marks=pytest.mark.slow),
        {"parallel__zero_stage": 1, "precision": "bf16"},
        pytest.param({"parallel__zero_stage": 2}, marks=pytest.mark.slow),
        {"parallel__zero_stage": 3},
        {"parallel__pipeline_stages": 2},
        pytest.param({"parallel__pipeline_stages": 2, "precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param({"parallel__tensor_parallel": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_step_with_a_nan_gradient_is_skipped(runner: Runner, settings: dict[str, Any]) -> None:
    """From the first step on; the run continues as if the images of those steps did not exist."""
    finished = train_ill(runner, "run", "nan", rank=1, steps=(1, 3), checkpoint__every_steps=2, **settings)
    assert finished.codes == [0, 0], finished.output
    rows = [row for row in runner.rows("run") if "loss" in row]
    assert [row["applied"] for row in rows] == [False] * 3 + [True] * 17
    assert [row["grad_norm"] for row in rows[:3]] == [None] * 3
    assert all(np.isfinite(row["loss"]) and row["loss"] == pytest.approx(np.log(512)) for row in rows[:4])
    assert rows[-1]["loss"] < 6.2
    assert [row["step"] for row in skipped(runner, "run")] == [1, 2, 3]


def test_the_images_of_a_skipped_step_are_named(runner: Runner, shards: Path) -> None:
    finished = train_ill(runner, "run", "nan", rank=0, steps=(6, 9), health__max_skipped=3)
    assert finished.codes == [1, 1]
    [message] = [line for line in "\n".join(finished.outputs).splitlines() if line.startswith("error:")]
    assert "step 8 was skipped (NaN or Inf in loss or gradient" in message
    assert "3 skipped steps in a row end the run" in message
    rows = skipped(runner, "run")
    assert [row["step"] for row in rows] == [6, 7, 8]
    split = open_shard_set(shards).split("train")
    wanted = ImageOrder(split.record_images, seed=0).at(5 * 8, 8)[0]
    tokens = split.gather(wanted)[0]
    for words, image in zip(rows[0]["pictures"], tokens, strict=True):
        file, _, record, _, number = words.split()
        first = next(n for n, shard in enumerate(split.shards) if shard["file"] == file)
        found = split.record(int(split.shard_starts[first]) + int(record))[0][int(number)]
        assert np.array_equal(found, image)
    assert rows[0]["pictures"][0] in (runner.folder / "run" / "skipped.jsonl").read_text()
    assert json.loads((runner.folder / "run" / "run.json").read_text())["status"] == "failed"


def test_a_resumed_run_counts_on(runner: Runner) -> None:
    """Two skipped before the stop and one after are three in a row."""
    common = {"health__max_skipped": 3, "schedule__decay": "constant"}
    finished = train_ill(runner, "run", "nan", 1, (5, 9), **{**common, "schedule__steps": 6})
    assert finished.codes == [0, 0], finished.output
    finished = train_ill(runner, "run", "nan", 1, (5, 9), **common)
    assert finished.codes == [1, 1]
    assert "step 7 was skipped (NaN or Inf in loss or gradient" in finished.output


def saved(runner: Runner) -> list[str]:
    return sorted(path.name for path in (runner.folder / "run/checkpoints").glob("step-*[0-9]"))


def test_no_checkpoint_is_made_while_steps_are_skipped(runner: Runner) -> None:
    """The weights may be what is broken, and each save deletes an older one: it waits for an applied step."""
    finished = train_ill(runner, "run", "nan", 1, (4, 8), checkpoint__every_steps=5, checkpoint__keep_last=9)
    assert finished.codes == [0, 0], finished.output
    assert saved(runner) == ["step-00000009", "step-00000010", "step-00000015", "step-00000020"]


def test_a_model_with_a_nan_loss_is_not_saved(runner: Runner) -> None:
    finished = train_ill(runner, "run", "broken", 0, (10, 10), ranks=1, checkpoint__every_steps=5)
    assert finished.codes == [1]
    assert (
        "error: the loss of the check image at step 10 is NaN or Inf (by rank: [nan]); the step was not saved"
        in finished.output
    )
    assert saved(runner) == ["step-00000005"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_rank_that_can_not_write_its_file_ends_the_run(runner: Runner, asynchronous: bool) -> None:
    """Under asynchronous saving it fails in a thread, steps before anyone asks."""
    settings = {"checkpoint__every_steps": 5, "checkpoint__asynchronous": asynchronous}
    finished = train_ill(runner, "run", "full", 1, (8, 99), **settings)
    assert finished.codes == [2, 2], finished.output
    assert "\n".join(finished.outputs).count("error: ") == 1
    assert "No space left on device" in "".join(finished.outputs)
    assert saved(runner) == ["step-00000005"]
    assert (runner.folder / "run/checkpoints/step-00000005/checkpoint.json").is_file()


@pytest.mark.parametrize("skip", [True, False])
def test_a_loss_spike_is_logged_and_optionally_skipped(runner: Runner, skip: bool) -> None:
    settings = {"health__spike_window": 8, "health__skip_spikes": skip, "optimizer__clip_norm": 1}
    finished = train_ill(runner, "run", "spike", 1, (15, 15), **settings)
    assert finished.codes == [0, 0], finished.output
    [row] = skipped(runner, "run")
    assert (row["step"], row["reason"], row["applied"]) == (15, "a spike", not skip)
    assert f"step 15 {'skipped' if skip else 'applied'}: loss spike; its images are listed in" in finished.output
    assert [r["applied"] for r in runner.rows("run") if r.get("step") == 15] == [not skip]


def test_spikes_are_six_deviations_above_the_window() -> None:
    """Against numpy's mean and deviation; a skipped spike is not in the window."""
    step_filter = StepFilter(HealthConfig(spike_window=16, skip_spikes=True))
    draw = np.random.default_rng(0)
    losses = list(draw.normal(2.0, 0.1, 16))
    for loss in losses:
        assert step_filter.accept(loss, 1.0) == (True, None)
        step_filter.record(StepResult(loss, 1.0, True, None))
    limit = np.mean(losses) + 6 * np.std(losses)
    assert step_filter.accept(limit + 1e-6, 1.0) == (False, "a spike")
    step_filter.record(StepResult(limit + 1e-6, 1.0, False, "a spike"))
    assert step_filter.accept(limit - 1e-6, 1.0).apply
    assert step_filter.accept(limit - 10, 1.0).apply


def test_accept_changes_no_state() -> None:
    """`accept` is called once a rank, or not at all; only `record` changes the filter."""
    step_filter = StepFilter(HealthConfig(spike_window=2, max_skipped=1))
    for _ in range(3):
        assert step_filter.accept(float("nan"), 1.0) == (False, "not finite")
        assert step_filter.accept(2.0, -1.0) == (False, "not finite")  # DeepSpeed's norm of a gradient with NaN
    assert not step_filter.exhausted
    assert not step_filter.weights_may_be_nonfinite
    step_filter.record(StepResult(2.0, float("nan"), False, "not finite"))
    assert step_filter.exhausted
    assert step_filter.weights_may_be_nonfinite


def test_a_frozen_rank_is_named(runner: Runner) -> None:
    """Its process is stopped: it can't report anything itself."""
    finished = train_ill(runner, "run", "frozen", 1, (5, 5), health__hang_minutes=0.2)
    assert finished.codes == [1, -9]
    assert (
        "rank 1 does not respond (stopped, dead, or disconnected), rank 0 hangs in training at step 5"
        in finished.output
    )
    stacks = (runner.folder / "run/stacks/rank-00000.txt").read_text()
    assert "zero.py" in stacks
    assert json.loads((runner.folder / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_rank_that_hangs_in_reading_is_named(runner: Runner) -> None:
    finished = train_ill(runner, "run", "hang", 1, (5, 5), health__hang_minutes=0.2)
    assert finished.codes == [1, 1]
    assert "rank 1 hangs in reading at step 5" in finished.output
    assert "read_counted" in (runner.folder / "run/stacks/rank-00001.txt").read_text()


@pytest.mark.slow
def test_a_rank_that_holds_pythons_lock_ends_itself_and_its_peers_record_the_collectives(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):  # the recorder needs neither
        monkeypatch.delenv(variable, raising=False)
    finished = train_ill(runner, "run", "stuck", 1, (5, 5), health__hang_minutes=0.2)
    assert finished.codes == [1, -signal.SIGALRM]
    assert "rank 1 does not respond" in finished.output
    assert "read_counted" in finished.outputs[1]  # the stuck rank's own stack
    peer = (runner.folder / "run/stacks/rank-00000.txt").read_text()
    last = peer.partition("last collectives\n")[2].splitlines()[-1]
    assert "all_reduce" in last
    assert not last.endswith("done")


def test_ranks_are_grouped_by_where_they_are() -> None:
    words = describe({0: "training at step 7", 1: None, 2: "reading at step 7", 3: "training at step 7"})
    assert words == (
        "rank 1 does not respond (stopped, dead, or disconnected), rank 2 hangs in reading at step 7, "
        "ranks 0, 3 hang in training at step 7"
    )


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (3, {}),
        pytest.param(2, {"parallel__tensor_parallel": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"parallel__pipeline_stages": 2}, marks=pytest.mark.slow),
    ],
)
def test_replicas_that_differ_end_the_run_before_a_save(runner: Runner, ranks: int, settings: dict[str, Any]) -> None:
    sizes = {"batch__global_size": 6, "batch__micro_size": 1, "validation__every_steps": 100}
    settings = {**settings, **sizes, "checkpoint__every_steps": 5, "health__replicas_every_steps": 100}
    # The weight changes after the update of step 7; from step 8 on, each update recomputes it from the fp32 weights.
    finished = train_ill(runner, "run", "diverge", 1, (7, 10), ranks=ranks, **settings)
    assert finished.codes == [1] * ranks, "\n".join(finished.outputs)
    assert "at step 10 the weights of ranks 1 differ from" in finished.output
    assert [path.name for path in sorted((runner.folder / "run/checkpoints").glob("step-*"))] == ["step-00000005"]


def test_the_profiler_writes_a_trace_and_logs_the_share_of_communication(runner: Runner) -> None:
    finished = runner.train("run", 2, batch__micro_size=2, profile__first_step=5, profile__steps=2)
    assert finished.codes == [0, 0], finished.output
    [line] = [line for line in finished.output.splitlines() if "profile of steps 5 to 6: " in line]
    share = float(line.split(": ")[1].split("%")[0])
    assert 0 < share < 100
    traces = sorted(path.name for path in (runner.folder / "run/profile").iterdir())
    assert traces == [f"rank-0000{rank}-step-00000005.pt.trace.json.gz" for rank in (0, 1)]


def test_a_file_in_the_run_asks_for_a_profile(runner: Runner) -> None:
    settings = {"batch__micro_size": 2, "schedule__decay": "constant"}
    runner.check_trains("run", 2, **settings, schedule__steps=5)
    (runner.folder / "run/PROFILE").touch()
    finished = runner.train("run", 2, **settings, schedule__steps=10)
    assert finished.codes == [0, 0], finished.output
    assert "profile of steps 6 to 8" in finished.output
    assert not (runner.folder / "run/PROFILE").exists()


def test_a_rank_that_cannot_read_ends_all_with_its_error(runner: Runner) -> None:
    """And the checkpoint that was being written when it happened is complete."""
    finished = train_ill(runner, "run", "unreadable", 1, (7, 7), checkpoint__every_steps=6)
    assert finished.codes == [2, 2], "\n".join(finished.outputs)
    assert "error: the shard: Input/output error" in finished.output or "Errno 5" in finished.output
    assert "Traceback" not in "".join(finished.outputs)
    assert saved(runner) == ["step-00000006"]


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_is_named(runner: Runner, rank: int) -> None:
    """Rank 0 has the store in which the others look for the rank that ended."""
    sizes = {"batch__global_size": 6, "batch__micro_size": 1}
    finished = train_ill(runner, "run", "killed", rank, (7, 7), ranks=2 + (rank == 0), **sizes)
    alive = [output for number, output in enumerate(finished.outputs) if number != rank]
    assert finished.codes.count(1) == len(alive), "\n".join(finished.outputs)
    assert f"error: rank {rank} has ended, and all others with it: its last messages show why" in "".join(alive)
    assert "Traceback" not in "".join(alive)
    if rank:
        assert "rank 1 has ended" in json.loads((runner.folder / "run/run.json").read_text())["error"]


@pytest.mark.slow
def test_a_rank_that_crashes_ends_at_once_with_its_traceback(runner: Runner) -> None:
    finished = train_ill(runner, "run", "crash", 1, (7, 7))
    assert finished.codes == [1, 1], "\n".join(finished.outputs)
    assert "Traceback" in finished.outputs[1]
    assert "RuntimeError: NCCL error: unhandled system error" in finished.outputs[1]


def test_a_rank_out_of_memory_ends_the_run_with_advice(runner: Runner) -> None:
    finished = train_ill(runner, "run", "memory", 1, (3, 3))
    assert finished.codes == [1, 1], "\n".join(finished.outputs)
    [sentence] = [line for line in finished.outputs[1].splitlines() if line.startswith("error: ")]
    assert sentence.startswith("error: out of memory (1152921504606846976 bytes could not be allocated): by plan's")
    assert "ZeRO-1, micro 2 needs 0.0" in sentence
    assert sentence.endswith(" (on rank 1)")
    assert "Traceback" not in finished.outputs[1]


def test_a_slow_rank_is_named(runner: Runner) -> None:
    """It waits 0.1 s for each batch: the others wait for it too, yet it is the one to be named."""
    finished = train_ill(runner, "run", "slow", 1, (1, 60), schedule__steps=60)
    assert finished.codes == [0, 0], finished.output
    [line] = [line for line in finished.output.splitlines() if "slow ranks over the last 50 steps: " in line]
    assert "rank 1 took" in line
    assert "rank 0 took" not in line


def test_rows_hold_the_largest_of_all_ranks(runner: Runner) -> None:
    finished = runner.train("run", 2, batch__micro_size=2)
    assert finished.codes == [0, 0], finished.output
    [line] = [line for line in finished.output.splitlines() if "peak memory, MB, by rank: " in line]
    peaks = [float(word.replace(",", "")) for word in line.split(": ")[1].split(", ")]
    assert len(peaks) == 2
    rows = [row for row in runner.rows("run") if "loss" in row]
    assert rows[-1]["memory_bytes"] / 1e6 == pytest.approx(max(peaks), rel=0.02)
    assert all(a["memory_bytes"] <= b["memory_bytes"] for a, b in pairwise(rows))


def test_invalid_input_is_reported_once_a_node(runner: Runner) -> None:
    finished = runner.train("run", 2, precision="fp16")
    assert finished.codes == [2, 2]
    assert "\n".join(finished.outputs).count("precision is 'fp16'") == 1


COUNTED = """
import runpy
import torch, torch.distributed as dist
from pipeline import distributed
reduce = dist.all_reduce

def reported(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
    if tensor.dtype == torch.float64 and op == dist.ReduceOp.MAX:
        assert group is not None and group is distributed._host_group
        print("flags are exchanged", flush=True)
    return reduce(tensor, op, group, async_op)

dist.all_reduce = reported
runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
"""


def test_flags_are_exchanged_once_a_step(runner: Runner) -> None:
    arguments = runner.arguments("run", schedule__steps=5)
    finished = run(1, "-c", COUNTED, *arguments[2:], logs=runner.folder / "logs")
    assert finished.codes == [0], finished.output
    assert finished.output.count("flags are exchanged") == 8  # once before the first step, and in the validation
