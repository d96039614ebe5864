"""`python -m pipeline COMMAND --help` answers at once: it imports no package that takes seconds."""

import re
import subprocess
import sys

import pytest

from tests.launch import ROOT

SLOW_PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "sklearn", "matplotlib", "datasets")
SCRIPT = f"""
import runpy, sys, time
try:
    runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
except SystemExit as exit:
    code = exit.code
imported = [name for name in {SLOW_PACKAGES} if name in sys.modules]
sys.exit(code or (f"--help imports {{imported}}" if imported else time.process_time() > 1 and "--help takes seconds"))
"""


def asked(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


COMMANDS = ["train", "search", "plan", "export", "evaluate", "compare", "complete", "publish", "status", "preflight",
            "doctor"]  # fmt: skip


def test_every_command_is_asked() -> None:
    commands = asked("--help").partition("commands:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  (\w+) ", commands, re.M) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick(command: str) -> None:
    assert f"python -m pipeline {command}" in asked(command, "--help")
