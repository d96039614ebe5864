"""Completions beside the libraries that a user would pick: make bench PARTS=completions

The lower halves of images of 16x16, drawn by a model of 6.6M parameters in fp32, one image or eight at once.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.config import ModelConfig
from tests.benchmarks import models
from tests.benchmarks.marks import Result, result
from tests.benchmarks.peers.drawing.work import Drawing
from tests.benchmarks.peers.measure import HEAD, SLOW_TURNS, Script, compare, lines

SIZE = {"layers": 8, "width": 256, "heads": 4}
RESOLUTION = 16
BATCHES = (1, 8)
MARK = 1.5
"""Times the best peer."""
PEERS = "tests.benchmarks.peers.drawing"


def scripts(drawing: Drawing) -> list[Script]:
    """Ours first."""
    argument, generate = drawing.to_argument(), f"{PEERS}.hf_generate"
    found = [
        Script("ours", f"{PEERS}.ours", (argument,)),
        Script("HF ImageGPT.generate", generate, (argument, "imagegpt", "dynamic")),
        Script("HF ImageGPT.generate, static cache", generate, (argument, "imagegpt", "static")),
        Script("HF GPT2LMHeadModel.generate", generate, (argument, "gpt2", "dynamic")),
        Script("x-transformers generate", f"{PEERS}.with_xtransformers", (argument,), environment="x-transformers"),
    ]
    if drawing.images == 1:  # litgpt's takes one prompt
        found.append(Script("litgpt generate", f"{PEERS}.litgpt_generate", (argument,), environment="litgpt"))
    return found


def floor(drawing: Drawing) -> float:
    """Images a second if reading the weights, keys and values at the measured rate of memory were all."""
    config = ModelConfig(**SIZE, resolution=RESOLUTION)
    case = models.Case(config, drawing.images, "fp32", torch.device("cpu"))
    return drawing.images / (models.read_seconds(case) * (drawing.positions - drawing.given))


def table(_: Path) -> Iterator[str | Result]:
    """A line for each peer and batch; then ours against the mark, and against the rate at which memory is read."""
    yield HEAD
    results = []
    for images in BATCHES:
        drawing = Drawing(images, **SIZE, positions=RESOLUTION**2)
        work, unit = f"completions of 16x16, batch {images}", "images/s"
        measured = compare(*scripts(drawing), turns=SLOW_TURNS)
        yield from lines(work, unit, measured)
        limit = {"limit": floor(drawing), "limited_by": "reading weights, keys and values from memory"}
        results.append(result(work, unit, measured, mark=MARK, **limit))
    yield from results
