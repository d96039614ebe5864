"""Makes the peers' virtual environments: python -m tests.benchmarks.peers.install

Each line of tests/benchmarks/requirements.txt is a peer. Its environment, .venv-peers/NAME, sees the packages of the
environment that runs this script behind its own, so that every peer runs with the same torch. pip is given the pinned
torch as a constraint. A peer that can't be installed leaves pip's error in .venv-peers/NAME/ERROR, for the tables. An
environment that has what is wanted is left as it is.
"""

import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[3]
REQUIREMENTS = ROOT / "tests/benchmarks/requirements.txt"
FOLDER = ROOT / ".venv-peers"
ERROR = "ERROR"
"""The file of an environment with the reason why the peer is not installed."""
INSTALLED = "INSTALLED"
"""The file of an environment with what pip installed there."""
SECONDS = 1_800
"""How long pip may take for one peer."""


def wanted(requirements: Path = REQUIREMENTS) -> dict[str, list[str]]:
    """What pip is asked to install, by the peer's name."""
    lines = [line.strip() for line in requirements.read_text().splitlines()]
    peers = [line.partition(":") for line in lines if line and not line.startswith("#")]
    return {name.strip(): packages.split() for name, _, packages in peers}


def install(name: str, packages: list[str], folder: Path = FOLDER) -> str | None:
    """Makes a peer's environment anew; the reason why it failed, or None."""
    environment = folder / name
    python = environment / "bin/python"
    try:
        _run(sys.executable, "-m", "venv", "--clear", "--without-pip", environment)
        _see_own_packages(environment)
        with TemporaryDirectory() as temporary:
            constraints = Path(temporary) / "constraints.txt"
            constraints.write_text(f"{_pinned_torch()}\n")
            options = ("--quiet", "--disable-pip-version-check", "--no-compile", "--prefer-binary")
            _run(
                sys.executable,
                "-m",
                "pip",
                "--python",
                python,
                "install",
                *options,
                "--constraint",
                constraints,
                *packages,
            )
        _run(python, "-c", f"from importlib.metadata import version as v; assert v('torch') == {version('torch')!r}")
        (environment / INSTALLED).write_text(_content(packages))
    except (subprocess.SubprocessError, OSError) as error:
        reason = _reason(error)
        environment.mkdir(parents=True, exist_ok=True)
        (environment / ERROR).write_text(f"{reason}\n")
        return reason
    return None


def is_installed(name: str, packages: list[str], folder: Path = FOLDER) -> bool:
    """Whether a peer's environment has these packages, with our torch."""
    recorded = folder / name / INSTALLED
    return recorded.is_file() and recorded.read_text() == _content(packages)


def _content(packages: list[str]) -> str:
    return "\n".join([_pinned_torch(), *packages]) + "\n"


def _run(*words: object) -> None:
    subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True, timeout=SECONDS)


def _see_own_packages(environment: Path) -> None:
    """Lets an environment see the packages of ours behind its own, as --system-site-packages does with the system's."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    path = environment / "lib" / python / "site-packages/packages-of-venv.pth"
    path.write_text(f"{Path(sysconfig.get_paths()['purelib']).resolve()}\n")  # .venv may be a link


def _pinned_torch() -> str:
    return next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))


def _reason(error: Exception) -> str:
    """Pip's first line that begins with ERROR, or the last line."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        return errors[0] if errors else (lines or [str(error)])[-1]
    return f"{type(error).__name__}: {error}"


def main() -> None:
    """Installs the peers that are missing or have other versions; a failure is printed and does not end the others."""
    peers = wanted()
    for name in peers:
        if is_installed(name, peers[name]):
            continue
        reason = install(name, peers[name])
        print(f"{name}: {'installed' if reason is None else f'not installed: {reason}'}", flush=True)


if __name__ == "__main__":
    main()
