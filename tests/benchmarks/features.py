"""Features of all layers in one pass against a pass a layer: python -m tests.benchmarks.features

A 24-layer model and 2,500 images. The peer is what public tutorials do with Hugging Face's ImageGPT: for each layer
that is probed, run all images with output_hidden_states and pool that layer's states. It is given the right
sequence (SOS first) and the right states (after ln_1), so that both must give the same features. Both run in batches
of the same size on the same threads; ours includes writing the cache and its digest.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

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
from pipeline.model_folder.convert import load_model_folder, save_model_folder
from tests.launch import run

LAYERS, WIDTH, RESOLUTION, PICTURES, BATCH = 24, 16, 6, 2_500, 250


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


def timed(work: Callable[[], np.ndarray]) -> tuple[np.ndarray, tuple[float, float]]:
    """What `work` gives, and its seconds on the clock and on the CPU, which a busy machine changes less."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = work()
    return value, (time.perf_counter() - wall, time.process_time() - cpu)


def table(folder: Path) -> Iterator[str]:
    """Lines: both times and their ratio."""
    evaluation = evaluation_in(folder)
    images = evaluation.images("train")
    ours, our_time = timed(lambda: pooled_features(evaluation, images))
    theirs, their_time = timed(lambda: pass_a_layer(folder / "model", images))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    yield f"| features of {LAYERS} layers, {len(images):,} images of {RESOLUTION}x{RESOLUTION} | s | CPU s |"
    yield "|---|---|---|"
    for what, (wall, cpu) in (("one pass, ours", our_time), ("a pass a layer, HF ImageGPT", their_time)):
        yield f"| {what} | {wall:.1f} | {cpu:.1f} |"
    wall, cpu = (theirs_took / ours_took for theirs_took, ours_took in zip(their_time, our_time, strict=True))
    yield f"\n{wall:.1f} times shorter, {cpu:.1f} in CPU time; largest difference {np.abs(ours - theirs).max():.1g}"


def main() -> None:
    """The table."""
    with TemporaryDirectory() as folder:
        for line in table(Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
