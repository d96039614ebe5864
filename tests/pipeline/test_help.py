"""`--help` of every command answers at once: it imports no package that takes seconds."""

import re
import subprocess
import sys

import pytest

from tests.launch import ROOT

SLOW_PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "sklearn", "matplotlib", "datasets")
SCRIPT = f"""
import runpy, sys
try:
    runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
except SystemExit as exit:
    code = exit.code
imported = [name for name in {SLOW_PACKAGES} if name in sys.modules]
assert not imported, imported
sys.exit(code)
"""
COMMANDS = {
    "pipeline": ["train", "search", "plan", "export", "evaluate", "compare", "scaling", "complete", "publish",
                 "status", "preflight", "doctor"],
    "data_prep": ["palette", "shards", "join", "verify", "show"],
}  # fmt: skip


def output_of(program: str, *arguments: str, code: int = 0) -> str:
    script = SCRIPT.replace("sys.argv[1]", repr(program))
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.mark.parametrize("program", COMMANDS)
def test_every_command_is_listed(program: str) -> None:
    """On --help, and by the program's bare name, which is an error."""
    usage = output_of(program, "--help")
    commands = usage.partition("commands:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  (\w+) ", commands, re.M) == COMMANDS[program]
    assert output_of(program, code=2) == usage
    assert not re.search(r"\b(goes|go on|pictures?|peak rate|sound)\b", commands), "the field has other words"


@pytest.mark.parametrize(
    ("program", "command"), [(program, name) for program in COMMANDS for name in COMMANDS[program]]
)
def test_help_is_quick(program: str, command: str) -> None:
    assert f"python -m {program} {command}" in output_of(program, command, "--help")


@pytest.mark.parametrize(
    ("program", "command", "missing"),
    [
        ("pipeline", "train", "--run"),
        ("pipeline", "export", "source, --out"),
        ("data_prep", "shards", "--out, --source.kind"),
        ("data_prep", "join", "out"),
    ],
)
def test_what_is_missing_is_named_as_one_types_it(program: str, command: str, missing: str) -> None:
    bare = subprocess.run([sys.executable, "-m", program, command], cwd=ROOT, capture_output=True, text=True)
    assert f"the following arguments are required: {missing} (see" in bare.stderr
