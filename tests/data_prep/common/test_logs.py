"""Log lines: time, level and rank on standard error; how much of them a user asks for."""

import errno
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest

from data_prep.common.command_line import print_error
from data_prep.common.logs import configure_logging, current_flags, split_flags
from data_prep.shards.reader import open_shard_set
from tests.launch import ROOT

LINE = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (\w+(?: rank \d+)?)\] (.*)"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The loggers as they were."""
    root, own = logging.getLogger(), logging.getLogger("data_prep")
    handlers, levels, raising = root.handlers[:], (root.level, own.level), logging.raiseExceptions
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])
    logging.raiseExceptions = raising


def logged(level: int, capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    """Level and message of one record of each kind, from this project and from another package."""
    configure_logging(level)
    for name in ("data_prep.somewhere", "deepspeed"):
        for number in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger(name).log(number, name)
    captured = capsys.readouterr()
    assert captured.out == ""
    return re.findall(LINE, captured.err)


@pytest.mark.parametrize(
    ("level", "own", "others"),
    [
        (logging.INFO, ["INFO", "WARNING"], ["WARNING"]),
        (logging.WARNING, ["WARNING"], ["WARNING"]),
        (logging.DEBUG, ["DEBUG", "INFO", "WARNING"], ["INFO", "WARNING"]),
    ],
)
def test_levels(level: int, own: list[str], others: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    expected = [(name, "data_prep.somewhere") for name in own] + [(name, "deepspeed") for name in others]
    assert logged(level, capsys) == expected


def test_several_ranks_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert ("WARNING rank 3", "deepspeed") in logged(logging.INFO, capsys)


@pytest.mark.parametrize("size", ["4", "", "many"])
def test_a_number_of_ranks_without_a_rank_is_ignored(
    size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("RANK", raising=False)
    assert ("WARNING", "deepspeed") in logged(logging.INFO, capsys)


def test_a_command_started_by_another_has_the_same_level() -> None:
    for level, flags in ((logging.INFO, []), (logging.WARNING, ["--quiet"]), (logging.DEBUG, ["-v"])):
        configure_logging(level)
        assert current_flags() == flags


def test_a_terminal_has_colors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logging.getLogger("data_prep").info("plain")
    logging.getLogger("data_prep").warning("colored")
    plain, colored = capsys.readouterr().err.splitlines()
    assert "\033" not in plain
    assert colored.startswith("\033[33m[") and colored.endswith("] colored\033[0m")


@pytest.mark.parametrize(
    ("arguments", "level", "rest"),
    [
        (["a", "--b", "c"], logging.INFO, ["a", "--b", "c"]),
        (["a", "--quiet", "--b"], logging.WARNING, ["a", "--b"]),
        (["-v"], logging.DEBUG, []),
        (["--quiet", "--verbose"], logging.DEBUG, []),
    ],
)
def test_flags_may_be_anywhere(arguments: list[str], level: int, rest: list[str]) -> None:
    assert split_flags(arguments) == (level, rest)


def shards(tmp_path: Path, *flags: str, redirect: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep", "shards", "--source.kind=photographs", "--source.train_per_class=2"]
    words = [*command, "--source.test_per_class=1", "--resolution=8", f"--out={tmp_path / 'set'}", *flags]
    shell = " ".join(words) + redirect
    return subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)


def test_a_command_logs_to_standard_error(tmp_path: Path) -> None:
    done = shards(tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert any(message.startswith(f"{tmp_path / 'set'}: finished in") for _, message in re.findall(LINE, done.stderr))
    quiet = shards(tmp_path, "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


@pytest.mark.parametrize("redirect", [" 2>/dev/full", " <&- >&- 2>&-"])
def test_a_console_that_is_full_or_closed_does_not_end_a_command(tmp_path: Path, redirect: str) -> None:
    assert shards(tmp_path, redirect=redirect).returncode == 0
    open_shard_set(tmp_path / "set").verify()


def test_a_file_does_not_take_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """In `dispatch`, which runs the commands of both packages."""
    script = f"""
import logging, os, sys
from data_prep.common.command_line import dispatch

def command(arguments):
    with open(os.devnull) as first, open(os.devnull) as second, open({str(tmp_path / "file")!r}, "w") as file:
        file.write("content")
        file.flush()
        os.write(2, b"from a library in C")
        print("out")
        print("err", file=sys.stderr)
        logging.getLogger("pipeline").warning("warning")
        os.system("echo from a child; echo error >&2; cat")

sys.argv[1:] = ["command"]
dispatch("package", "", {{"command": ("", command)}})
"""
    shell = f"{sys.executable} -c {shlex.quote(script)} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", shell], cwd=ROOT).returncode == 0
    assert (tmp_path / "file").read_text() == "content"


def test_an_error_on_a_console_that_is_gone_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code must still be that of the error."""

    class Gone(StringIO):
        def write(self, _text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    print_error(ValueError("model.size is 'x'"))
