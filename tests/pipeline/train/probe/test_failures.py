"""Classifiers that can't be fitted, and a probe.shards that is named relative to another working directory."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pipeline.command_line import parse_training
from pipeline.probe_images import LabelledImages, ProbeImages
from pipeline.train.probe import measure
from pipeline.train.probe.ridge import NO_SCORE, LayerScore
from tests.launch import run

SCORE = LayerScore(0.5, 0.4, 1.0)
LABELS = np.array([0, 1], np.int32)
PART = LabelledImages(None, np.arange(2), LABELS)  # type: ignore[arg-type]
IMAGES = ProbeImages("set", PART, PART, PART, 0)
SHARES = [np.zeros((4, 3), np.float32), np.zeros((4, 3), np.float32)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, torch.linalg.LinAlgError])
@pytest.mark.parametrize("of_device_alone", [True, False])
def test_a_classifier_that_fails_is_fitted_on_the_cpu_or_has_no_score(
    error: type[Exception], of_device_alone: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*given: object) -> LayerScore:
        if given[-1] == torch.device("cpu") and of_device_alone:
            return SCORE
        raise error("no\nluck")

    monkeypatch.setattr(measure, "score_layer", failing)
    found = measure._score(SHARES, IMAGES, torch.device("cuda"))
    assert found is (SCORE if of_device_alone else NO_SCORE)
    assert caplog.messages == [
        f"the classifier of a layer could not be fitted on {where} ({error.__name__}: no luck)"
        for where in ("cuda", "cpu")[: 1 if of_device_alone else 2]
    ]


TWO_RANKS = """
import numpy as np, torch.distributed as dist
from types import SimpleNamespace
from pipeline.distributed import describe_ranks
from pipeline.train.probe import measure
from tests.pipeline.train.probe.test_failures import IMAGES, SCORE

dist.init_process_group("gloo")
ranks = describe_ranks()
rank = ranks.rank

def failing(*given):
    raise RuntimeError("a bug")

engine = SimpleNamespace(data_rank=rank, data_ranks=2)
inputs = SimpleNamespace(ranks=ranks, probe=IMAGES)
features = {layer: np.zeros((3, 4), np.float32) for layer in range(3)}
measure.score_layer = lambda *given: SCORE
assert measure.score_layers(engine, features, inputs, lambda: None) == dict.fromkeys(range(3), SCORE)
if rank == 1:
    measure.score_layer = failing
try:
    measure.score_layers(engine, features, inputs, lambda: None)
except ValueError as error:
    print(error)
"""


def test_an_error_of_one_rank_ends_the_probe_on_all(tmp_path: Path) -> None:
    finished = run(2, "-c", TWO_RANKS, logs=tmp_path)
    assert finished.codes == [0, 0], finished.outputs
    assert all("RuntimeError('a bug')" in output for output in finished.outputs), finished.outputs


def test_a_resumed_run_finds_its_probe_shards_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run", "sets/one", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    config = {"model": {"size": "s"}, "data": {"shards": "/nowhere"}, "probe": {"every_steps": 5, "shards": "one"}}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    record = {"shards": {"path": "/nowhere"}, "probe_shards": str(tmp_path / "sets/one")}
    (tmp_path / "run/run.json").write_text(json.dumps(record))

    def found(*options: str) -> str | None:
        return parse_training(["--run", str(tmp_path / "run"), *options])[0].probe.shards

    monkeypatch.chdir(tmp_path / "sets")
    assert found() == "one"
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert found() == str(tmp_path / "sets/one")
    assert found("--probe.shards", "other") == "other"
    (tmp_path / "run/run.json").write_text(json.dumps({"shards": record["shards"]}))  # of an earlier version
    assert found() == "one"
