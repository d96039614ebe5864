"""An unexpected error ends a rank at once, although threads of its process group are alive, and so the other ranks."""

from pathlib import Path

import pytest

from data_prep.common import command_line
from pipeline import rank_errors
from tests.launch import run

SECONDS = 30
"""Far less than a rank would wait in the interpreter's shutdown, which is for ever."""
COMMAND = """
import sys, threading
import torch
import torch.distributed as dist
from data_prep.common.command_line import dispatch
from pipeline.__main__ import leave
from pipeline.rank_errors import report_error

def command(arguments):
    dist.init_process_group("gloo")
    threading.Thread(target=threading.Event().wait).start()  # as a thread of NCCL that waits for the other ranks
    if dist.get_rank() == 1:
        raise RuntimeError("the device is lost")
    dist.all_reduce(torch.ones(1))

sys.argv = ["pipeline", "command"]
dispatch("pipeline", "", {"command": ("", command)}, leave, report_error)
"""


def test_a_rank_ends_with_its_traceback_while_a_thread_is_alive(tmp_path: Path) -> None:
    finished = run(2, "-c", COMMAND, logs=tmp_path, seconds=SECONDS)
    assert finished.codes == [1, 1], "\n".join(finished.outputs)
    assert "Traceback" in finished.outputs[1]
    assert "RuntimeError: the device is lost" in finished.outputs[1]
    assert "all_reduce" in finished.outputs[0], "the other rank ends with its own error"


def test_without_a_process_group_the_interpreter_shuts_down_after_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(arguments: list[str]) -> int:
        raise RuntimeError("unexpected")

    monkeypatch.setattr("sys.argv", ["data_prep", "command"])
    with pytest.raises(SystemExit) as ended:
        command_line.dispatch("data_prep", "", {"command": ("", command)})
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("RuntimeError: unexpected\n")


@pytest.mark.parametrize(
    ("variables", "seconds"), [({}, 2.0), ({"TORCHELASTIC_RUN_ID": "none"}, 120.0), ({"SLURM_STEP_ID": "0"}, 120.0)]
)
def test_a_rank_lets_a_late_rank_0_print_an_error_of_all(
    variables: dict[str, str], seconds: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher ends it as soon as rank 0 exits."""
    waited: list[float] = []
    for name in rank_errors.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_errors.time, "sleep", waited.append)
    rank_errors.report_error(rank_errors.reported_on_all_ranks(ValueError("the same on all ranks")))
    assert waited == [seconds]
    assert capsys.readouterr().err == ""
