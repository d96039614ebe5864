"""Writes what `make bench` measured to out/bench/: a Markdown file for each part, and summary.md over all parts.

A part's results are in a JSON file beside its page, from which the summary is made anew after each part.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.marks import HEAD, Growth, Result
from tests.benchmarks.peers.install import ERROR, FOLDER, ROOT, wanted

PACKAGES = (
    *("torch", "deepspeed", "transformers", "webdataset", "datasets", "scikit-learn", "faiss-cpu", "numpy"),
    "simplejpeg",
)
GROWTH_HEAD = "| work, in CPU-seconds | 1x is | at each size | exponent of the last step |\n|---|---|---|---|"


def folder() -> Path:
    """Where it is written: BENCH_OUT, or out/bench."""
    return Path(os.environ.get("BENCH_OUT", ROOT / "out/bench"))


def machine() -> str:
    """The processor, the vector instructions that torch uses, its cores, the memory, and accelerators."""
    import torch

    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = psutil.virtual_memory().total / 2**30
    cuda = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    processor = f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    found = [processor, f"{os.cpu_count()} cores", f"{memory:.0f} GiB", *cuda]
    return ", ".join(found if cuda else [*found, "no accelerator"])


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).exists() else []


def versions() -> str:
    """Of the packages that are compared, and of the peers as they are pinned."""
    own = [f"{name} {version(name)}" for name in PACKAGES]
    for name, packages in wanted().items():
        pins = [package.partition("==")[2] for package in packages if "==" in package]
        missing = (FOLDER / name / ERROR).exists() or not (FOLDER / name).exists()
        own.append(f"{name} {pins[0] if pins else ''}{' (not installed)' * missing}")
    return f"Python {platform.python_version()}, {', '.join(own)}"


def commit() -> str:
    """The version of this repository."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def write_part(name: str, lines: Iterable[str | Result | Growth], show: Callable[[str], None]) -> None:
    """Writes a part's page and results while they come, and shows each line."""
    out = folder()
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").unlink(missing_ok=True)  # the summary must not have the figures of an earlier measurement
    load, began, results = os.getloadavg()[0], time.monotonic(), []
    head = {
        "part": name, "command": f"make bench PARTS={name}", "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(), "machine": machine(), "load": round(load, 1), "versions": versions(),
    }  # fmt: skip
    with (out / f"{name}.md").open("w") as page:
        print(_headline(head), file=page, flush=True)
        was_result = False
        for one in lines:
            is_result = isinstance(one, Result)
            if isinstance(one, Result | Growth):
                results.append(one)
            text = _text(one)
            text = "\n" * (is_result and not was_result) + text
            print(text, file=page, flush=True)
            show(text)
            was_result = is_result
        seconds = time.monotonic() - began
        print(f"\nThe part took {seconds:.0f} s.", file=page)
    show(f"\n({seconds:.0f} s)")
    rows = [{"kind": type(one).__name__, **asdict(one)} for one in results]
    (out / f"{name}.json").write_text(json.dumps({**head, "seconds": seconds, "results": rows}, indent=1) + "\n")


def _text(one: str | Result | Growth) -> str:
    if isinstance(one, Result):
        return f"- {one.sentence()}"
    return growth_line(one) if isinstance(one, Growth) else one


def _headline(head: dict[str, Any]) -> str:
    return (
        f"# {head['part']}\n\n`{head['command']}`, {head['date']}, commit {head['commit']}. {head['machine']}; "
        f"load {head['load']} at the start. {head['versions']}.\n"
    )


def write_summary(order: Sequence[str]) -> str:
    """The summary of all parts that were measured, in this order; written to summary.md too."""
    files = [folder() / f"{name}.json" for name in order]
    parts = [json.loads(file.read_text()) for file in files if file.exists()]
    lines, grown = ["# Summary", "", HEAD], []
    for part in parts:
        for row in part["results"]:
            kind = row.pop("kind")
            if kind == "Result":
                lines.append(Result(**row).line())
            else:
                grown.append(growth_line(Growth(**row)))
    if grown:
        lines += ["", GROWTH_HEAD, *grown]
    lines += ["", "| part | date | commit | machine | load | seconds |", "|---|---|---|---|---|---|"]
    for part in parts:
        cells = (*(part[key] for key in ("part", "date", "commit", "machine", "load")), f"{part['seconds']:.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for text in sorted({part["versions"] for part in parts}):
        lines += ["", f"{text}."]
    text = "\n".join(lines) + "\n"
    (folder() / "summary.md").write_text(text)
    return text


def growth_line(one: Growth) -> str:
    """Of the table whose head is GROWTH_HEAD."""
    costs = ", ".join(f"{factor}x {cost:.3g}" for factor, cost in zip(one.factors, one.costs, strict=True))
    return f"| {one.work} | {one.at} | {costs} | {round(one.exponent, 2) + 0:.2f} |"
