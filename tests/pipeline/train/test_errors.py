"""Invalid input ends with one sentence and exit code 2, before any process group starts, and creates no run."""

import fcntl
import json
import runpy
import shutil
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
import torch.distributed as dist
import yaml

from pipeline.command_line import parse_training
from pipeline.config import changed_keys, to_dict
from pipeline.model.gpt_config import gpt2_config
from tests.pipeline.conftest import Runner

Sentence = Callable[[list[str]], str]


@contextmanager
def lock_held(run: Path) -> Iterator[TextIO]:
    """Context in which a rank of SLURM's job 7 holds the lock of a run, as its file states."""
    run.mkdir()
    with (run / ".lock").open("w+") as lock:
        lock.write("process 1 on node1, SLURM job 7")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


@pytest.fixture
def sentence(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Sentence:
    """Runs the command line in this process; gives the one sentence that it must print before it exits with 2."""

    def run(arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
        out, err = capfd.readouterr()
        assert caught.value.code == 2
        assert "Traceback" not in err + out
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, err
        assert not dist.is_initialized()
        return errors[0]

    return run


INVALID: dict[str, tuple[dict[str, object], str]] = {
    "unknown key": ({"optimizer.lerning_rate": 1}, "optimizer.lerning_rate is not a known key; did you mean"),
    "abbreviated key": ({"schedule.step": 50}, "schedule.step is not a known key; did you mean schedule.steps?"),
    "wrong type": ({"batch.micro_size": "many"}, "batch.micro_size is 'many'; it must be an integer"),
    "not a choice": ({"precision": "fp16"}, "precision is 'fp16'; it must be one of fp32, bf16"),
    "no such decay": ({"schedule.decay": "square"}, "schedule.decay is 'square'; it must be one of cosine, linear,"),
    "below its least": ({"batch.micro_size": 0}, "batch.micro_size is 0; it must be at least 1"),
    "heads do not divide": ({"model.heads": 3}, "model.width is 32; it must be a multiple of model.heads, 3"),
    "heads that do not divide the size's width": (
        {"model.size": "s", "model.width": "null", "model.heads": 7},
        "model.width is 512; it must be a multiple of model.heads, 7",
    ),
    "neither size nor layers": ({"model.layers": "null"}, "model.size is not set; set it to s, m, l or xl, or set"),
    "batch does not divide": ({"batch.micro_size": 3}, "batch.global_size is 8; it must be a multiple"),
    "warm-up too long": ({"schedule.warmup_steps": 40}, "schedule.warmup_steps is 40; it must be below"),
    "no shard set": ({"data.shards": "/nowhere/shards"}, "/nowhere/shards does not exist"),
    "other resolution": ({"model.resolution": 16}, "model.resolution is 16; it must be 8"),
    "crop too large": (
        {"data.reflect_crop": 8},
        "data.reflect_crop is 8; it must be below model.resolution, 8",
    ),
    "learning rate of zero": ({"optimizer.learning_rate": 0}, "optimizer.learning_rate is 0.0; it must be above 0"),
    "no such config": ({"config": "none.yaml"}, "--config is 'none.yaml', which is not a file"),
}


@pytest.mark.parametrize("case", INVALID, ids=lambda name: name.replace(" ", "-"))
def test_an_invalid_option(runner: Runner, sentence: Sentence, case: str) -> None:
    options, words = INVALID[case]
    arguments = runner.arguments("run")[2:] + [f"--{key}={value}" for key, value in options.items()]
    assert words in sentence(arguments)
    assert not (runner.folder / "run").exists()


def test_no_run_named(runner: Runner, sentence: Sentence) -> None:
    assert "run" in sentence(["train", "--model.size", "s"])


def test_a_config_that_is_not_yaml(runner: Runner, sentence: Sentence) -> None:
    path = runner.folder / "broken.yaml"
    path.write_text("model: {size: s\n")
    assert f"{path} is not YAML" in sentence([*runner.arguments("run")[2:], f"--config={path}"])


def test_a_run_inside_a_file_or_over_other_files(runner: Runner, sentence: Sentence) -> None:
    (runner.folder / "file").touch()
    assert "is a file" in sentence(runner.arguments("file")[2:])
    (runner.folder / "holiday").mkdir()
    (runner.folder / "holiday/image.jpg").touch()
    assert "has other files" in sentence(runner.arguments("holiday")[2:])


@pytest.fixture
def own_shards(runner: Runner) -> Path:
    """A copy of the shard set that a test may damage."""
    return Path(shutil.copytree(runner.shards, runner.folder / "shards"))


def test_a_truncated_tar(runner: Runner, sentence: Sentence, own_shards: Path) -> None:
    tar = own_shards / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-2048])
    assert f"{tar} has" in sentence(runner.arguments("run", data__shards=own_shards)[2:])


def test_an_unfinished_shard_set(runner: Runner, sentence: Sentence, own_shards: Path) -> None:
    (own_shards / "shards.json").unlink()
    assert "has no shards.json" in sentence(runner.arguments("run", data__shards=own_shards)[2:])


def test_another_palette_in_the_shard_set(runner: Runner, sentence: Sentence, own_shards: Path) -> None:
    np.save(own_shards / "palette.npy", -np.load(own_shards / "palette.npy"))
    assert "another set's palette" in sentence(runner.arguments("run", data__shards=own_shards)[2:])


def test_a_flipped_byte_is_found_before_the_first_step(runner: Runner, own_shards: Path) -> None:
    tar = own_shards / "train-000000.tar"
    content = bytearray(tar.read_bytes())
    content[5000] ^= 1
    tar.write_bytes(content)
    finished = runner.train("run", 2, data__shards=own_shards, batch__micro_size=2)
    assert finished.codes == [2, 2]
    assert f"{tar} is damaged" in finished.output
    assert "Traceback" not in "".join(finished.outputs)
    assert not (runner.folder / "run/metrics.jsonl").exists()


def test_another_shard_set_for_the_same_run(runner: Runner, finished_run: Runner, own_shards: Path) -> None:
    shutil.copytree(finished_run.folder / "reference", runner.folder / "run")
    manifest = json.loads((own_shards / "shards.json").read_text())
    (own_shards / "shards.json").write_text(json.dumps(manifest | {"classes": manifest["classes"][::-1]}))
    finished = runner.train("run", data__shards=own_shards, schedule__steps=50)
    assert finished.codes == [2]
    assert "set data.shards to the set that the run started with" in finished.output


@pytest.mark.parametrize(
    "changed",
    [
        *({"model__width": 64}, {"model__heads": 4}, {"model__block": "gpt2"}),
        *({"seed": 1}, {"data__flip": True}, {"data__reflect_crop": 2}),
    ],
)
def test_the_model_and_the_data_order_of_a_run_are_fixed(
    runner: Runner, finished_run: Runner, sentence: Sentence, changed: dict[str, object]
) -> None:
    run = Path(shutil.copytree(finished_run.folder / "reference", runner.folder / "run"))
    before = (run / "config.yaml").read_bytes()
    key = next(iter(changed)).replace("__", ".")
    assert f"{key} is {changed[key.replace('.', '__')]}, but {run} was started with" in sentence(
        runner.arguments("run", schedule__steps=50, **changed)[2:]
    )
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (["--model.layers", "4"], (4, 512, 8)),
        (["--model.width", "256", "--model.heads", "4"], (24, 256, 4)),
        (["--model.layers=4", "--model.width=64", "--model.heads=2"], (4, 64, 2)),
        (["--model.size=null", "--model.layers=4", "--model.width=64", "--model.heads=2"], (4, 64, 2)),
        (["--model.size=m", "--model.layers=4"], (4, 1024, 8)),
    ],
)
def test_layers_width_and_heads_override_the_size_of_a_recipe(options: list[str], shape: tuple[int, int, int]) -> None:
    config, _ = parse_training(["--config", "configs/igpt_s.yaml", "--run", "RUN", *options])
    model = gpt2_config(config.model)
    assert config.model.shape == (model.n_layer, model.n_embd, model.n_head) == shape


@pytest.mark.parametrize(
    ("saved", "options", "changed"),
    [
        ({"size": "s"}, ["--model.size", "s"], {}),
        ({"size": "s"}, ["--model.size", "s", "--model.layers", "24"], {}),
        ({"size": "s"}, ["--model.size=null", "--model.layers=24", "--model.width=512", "--model.heads=8"], {}),
        ({"layers": 4, "width": 512, "heads": 8}, ["--model.size", "s", "--model.layers", "4"], {}),
        ({"size": "s"}, ["--model.size", "m"], {"model.size": ("s", "m")}),
        ({"size": "s"}, ["--model.size", "s", "--model.layers", "4"], {"model.layers": (24, 4)}),
    ],
)
def test_a_size_and_the_shape_it_stands_for_are_the_same_model(
    saved: dict[str, object], options: list[str], changed: dict[str, object]
) -> None:
    """A config.yaml of an earlier run resumes with either spelling; a change names the values that count."""
    new, _ = parse_training(["--run", "RUN", *options])
    nothing: dict[str, object] = {"size": None, "layers": None, "width": None, "heads": None}
    earlier = to_dict(new)
    earlier["model"] = earlier["model"] | nothing | saved
    assert changed_keys(earlier, to_dict(new)) == changed


def test_a_run_with_an_overridden_size_resumes_with_its_own_config(tmp_path: Path) -> None:
    config, _ = parse_training(["--run", str(tmp_path), "--config", "configs/igpt_s.yaml", "--model.layers", "4"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert parse_training(["--run", str(tmp_path)])[0] == config


def test_a_run_finds_its_shard_set_from_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "run").mkdir()
    config, _ = parse_training(["--model.size", "s", "--run", "RUN", "--data.shards", "set"])
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    run = ["--run", str(tmp_path / "run")]
    assert parse_training(run)[0].data.shards == "set", "without a record the name is all that is known"
    (tmp_path / "run/run.json").write_text(json.dumps({"shards": {"path": str(tmp_path / "set")}}))
    assert parse_training(run)[0].data.shards == str(tmp_path / "set")
    assert parse_training([*run, "--data.shards=other"])[0].data.shards == "other"
    monkeypatch.chdir(tmp_path)
    assert parse_training(run)[0].data.shards == "set"


def test_extensions_that_cannot_be_compiled_in_a_path_with_a_space_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from pipeline.layout import ParallelConfig
    from pipeline.train.engine import build, offload

    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": "/home/a b/.venv/lib"})
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"torch.compile fails in /home/a b/.venv/lib, whose path has a space"):
        build.check_torch_compiles(cpu)
    with pytest.raises(ValueError, match=r"CPU Adam in /home/a b/.venv/lib, whose path has a space; move"):
        offload.check_compilers(ParallelConfig(zero_stage=1, offload="optimizer"), cpu)


def test_overrides_win_over_a_config_that_comes_later(runner: Runner) -> None:
    path = runner.folder / "config.yaml"
    path.write_text("schedule: {steps: 30, warmup_steps: 7}\nmodel: {size: l}\n")
    config, _ = parse_training(["--model.size", "m", "--run", "RUN", "--config", str(path), "--schedule.steps=20"])
    assert (config.model.size, config.schedule.steps, config.schedule.warmup_steps) == ("m", 20, 7)


def test_two_trainings_of_one_run(runner: Runner, shards: Path) -> None:
    with lock_held(runner.folder / "run"):
        finished = runner.train("run")
    assert finished.codes == [2]
    assert "is being trained by another process" in finished.output


@pytest.mark.parametrize(
    "job",
    [
        {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
        {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7"},  # a later copy
        {"SLURM_JOB_ID": "9"},  # that depended on the other
    ],
    ids=["restarted", "array", "successor"],
)
def test_a_job_waits_for_ranks_of_an_earlier_job(
    job: dict[str, str], runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    log = runner.folder / "run.logs/rank-0.log"
    with lock_held(runner.folder / "run") as lock:

        def release() -> None:
            while not (log.is_file() and "waiting up to" in log.read_text()):
                time.sleep(0.1)
            fcntl.flock(lock, fcntl.LOCK_UN)

        threading.Thread(target=release, daemon=True).start()
        runner.check_trains("run", 1, schedule__steps=5, schedule__warmup_steps=2)
    assert "process 1 on node1, SLURM job 7 still holds the lock of the run" in log.read_text()


def test_a_second_start_in_the_same_allocation_is_refused_at_once(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with lock_held(runner.folder / "run"):
        finished = runner.train("run")
    assert finished.codes == [2]
    assert "is being trained by another process (process 1 on node1, SLURM job 7); wait" in finished.output
    assert "waiting up to" not in finished.output


def test_a_job_does_not_wait_for_ever_for_another(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    with lock_held(runner.folder / "run"):
        finished = runner.train("run", health__hang_minutes=0.01)
    assert finished.codes == [2]
    assert "is being trained by another process (process 1 on node1, SLURM job 7)" in finished.output


def test_a_learning_rate_that_diverges_ends_the_run_and_names_the_step(runner: Runner) -> None:
    finished = runner.train("run", optimizer__learning_rate=1e20, optimizer__clip_norm=0, schedule__warmup_steps=0)
    assert finished.codes == [1]
    assert "was skipped (NaN or Inf in loss or gradient" in finished.output
    assert "Traceback" not in finished.output
    assert "skipped.jsonl of the run" in finished.output
    assert json.loads((runner.folder / "run/run.json").read_text())["status"] == "failed"
