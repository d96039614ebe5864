"""Parts that go wrong, for the tests of the supervisor: python -m tests.benchmarks.fake_parts. Imports no torch."""

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

from tests.benchmarks.accelerator.parts import Part
from tests.benchmarks.accelerator.report import Row, at_most, equal, known
from tests.benchmarks.accelerator.worker import main

HERE = "tests.benchmarks.fake_parts"


def good() -> Iterator[Row | str]:
    """A value within its limit, a table and a value that is only reported."""
    yield at_most("good: error", 0.25, 0.5)
    yield "| a | table |"
    yield known("good: words", "as they\nare")


def wrong() -> Iterator[Row]:
    """A value that is not what it should be, and one that is no number."""
    yield equal("wrong: sum", 3, 4)
    yield at_most("wrong: loss", float("nan"), 1.0)


def raises() -> Iterator[Row]:
    """An exception after the first row."""
    yield equal("raises: before", 1, 1)
    raise RuntimeError("no\nkernel")


def stuck() -> Iterator[Row]:
    """A call that holds the GIL and does not return, like one into a driver."""
    yield equal("stuck: before", 1, 1)
    ctypes.PyDLL(None).sleep(100)


def dies() -> Iterator[Row]:
    """The end of the process."""
    yield equal("dies: before", 1, 1)
    os._exit(9)


def loses_the_device() -> Iterator[Row]:
    """An error after which every call of CUDA fails."""

    def fail() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    cuda = SimpleNamespace(is_initialized=lambda: True, synchronize=fail)
    sys.modules["torch"] = SimpleNamespace(cuda=cuda)  # type: ignore[assignment]
    yield equal("loses_the_device: before", 1, 1)
    fail()


def slow() -> Iterator[Row]:
    """More seconds than there are."""
    time.sleep(100)
    yield equal("slow: after", 1, 1)


PARTS = {
    function.__name__: Part(function.__name__, f"{HERE}:{function.__name__}", 1.0 if function is stuck else 30.0)
    for function in (good, wrong, raises, stuck, dies, loses_the_device, slow)
} | {name: Part(name, f"{HERE}:good", 30.0, needs=1000.0) for name in ("measured", "later")}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts")
    parser.add_argument("--end", type=float)
    parser.add_argument("--pipe", type=int)
    options = parser.parse_args()
    main([PARTS[name] for name in options.parts.split(",")], options.end, options.pipe)
