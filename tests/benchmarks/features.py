"""Features of all layers in one pass against a pass a layer: make bench PARTS=features

A 24-layer model and 1,000 images. The peer is what public tutorials do with Hugging Face's ImageGPT: for each layer
that is probed, run all images with output_hidden_states and pool that layer's states. It is given the right
sequence (SOS first) and the right states (after ln_1), so that both must give the same features. Both run in batches
of the same size on the same threads; ours includes writing the cache and its digest.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import torch

from data_prep.shards.reader import open_shard_set
from pipeline.config import ModelConfig
from pipeline.evaluate.cache import TaskCache
from pipeline.evaluate.context import Evaluation, ImageSubset, start_accelerator
from pipeline.evaluate.features.pooled import pooled_features
from pipeline.evaluate.options import Sizes
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import gpt2_config
from pipeline.model.objectives import next_color
from pipeline.model_folder.convert import load_model_folder, save_model_folder
from tests.benchmarks.marks import Result, result
from tests.benchmarks.peers.measure import HEAD, Measured, Script, lines_of
from tests.launch import run

T = TypeVar("T")

LAYERS, WIDTH, RESOLUTION, PICTURES, BATCH = 24, 16, 6, 1_000, 250
TURNS = 5
FIGURE = "cpu_seconds"


def evaluation_in(folder: Path) -> Evaluation:
    """A model of 24 layers with initial weights, and images, written into `folder`."""
    options = ["--source.kind=photographs", "--resolution", RESOLUTION, "--out", folder / "shards"]
    prepared = run(1, "-m", "data_prep", "shards", *options, logs=folder / "logs")
    assert prepared.codes == [0], prepared.output
    shards = open_shard_set(folder / "shards")
    config = gpt2_config(ModelConfig(layers=LAYERS, width=WIDTH, heads=2, resolution=RESOLUTION))
    model = build_model(config)
    initialize(model, 0)
    save_model_folder(model, config, shards.palette, folder / "model")
    return Evaluation(
        load_model_folder(folder / "model"),
        shards,
        folder,
        start_accelerator("fp32"),
        0,
        Sizes(batch_size=BATCH, train_images=PICTURES),
        TaskCache.of_task(folder, "features", "benchmark"),
        folder / "features",
        "benchmark",
    )


def pass_a_layer(model_folder: Path, images: ImageSubset) -> np.ndarray:
    """The peer: float32 (L+1, N, D)."""
    from transformers import ImageGPTModel

    model = ImageGPTModel.from_pretrained(model_folder).eval()
    norms = [*(block.ln_1 for block in model.h), lambda states: states]  # the last states are after ln_f
    tokens = torch.from_numpy(images.tokens().astype(np.int64))
    inputs = torch.cat([torch.full((len(tokens), 1), model.config.vocab_size - 1), tokens[:, :-1]], dim=1)
    layers = []
    with torch.no_grad():
        for layer, norm in enumerate(norms):
            pooled = [
                norm(model(input_ids=batch, output_hidden_states=True).hidden_states[layer]).mean(1)
                for batch in inputs.split(BATCH)
            ]
            layers.append(torch.cat(pooled).numpy())
    return np.stack(layers)


def forward_pass(evaluation: Evaluation, images: ImageSubset) -> None:
    """The limit: all images through our network once."""
    inputs, _ = next_color(torch.from_numpy(images.tokens().astype(np.int64)), evaluation.model.config.colors)
    with torch.inference_mode():
        for batch in inputs.split(BATCH):
            evaluation.model.model.transformer(batch)


def timed(work: Callable[..., T], *arguments: object) -> tuple[T, float]:
    """What `work` gives, and its CPU-seconds."""
    began = time.process_time()
    value = work(*arguments)
    return value, time.process_time() - began


def table(folder: Path) -> Iterator[str | Result]:
    """A line for each way. Ours and the forward pass take turns; the peer takes one, which is many times as long."""
    ours, alone = Measured(Script("ours", "")), Measured(Script("the forward pass alone", ""))
    theirs = Measured(Script("a pass a layer, HF ImageGPT", ""))
    evaluation = evaluation_in(folder)
    images = evaluation.images("train")
    for turn in range(TURNS):
        evaluation = replace(evaluation, features=folder / f"features-{turn}")  # they are cached there
        found, seconds = timed(pooled_features, evaluation, images)
        ours.turns.setdefault(FIGURE, []).append(seconds)
        alone.turns.setdefault(FIGURE, []).append(timed(forward_pass, evaluation, images)[1])
    expected, seconds = timed(pass_a_layer, folder / "model", images)
    theirs.turns[FIGURE] = [seconds]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    work = f"features of {LAYERS} layers, {len(images):,} images of {RESOLUTION}x{RESOLUTION}"
    yield HEAD
    yield from lines_of(work, "CPU-s", [ours, theirs, alone], FIGURE)
    yield f"\nThe largest difference of the features is {np.abs(found - expected).max():.1g}."
    limit = {"limit": median(alone.turns[FIGURE]), "limited_by": alone.script.name}
    yield result(work, "CPU-s", [ours, theirs], FIGURE, mark=None, more_is_better=False, **limit)
