"""python -m tests.benchmarks: every table that a CPU can give, ours beside its peer, measured in turns."""

import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.palette import encode, lookup_table
from data_prep.shards import MANIFEST, open_shard_set
from pipeline.config import BatchConfig, ModelConfig, ScheduleConfig, TrainConfig
from pipeline.model.gpt import build_model, gpt2_config, initialize
from pipeline.train.batches import ImageOrder, TrainingBatches
from tests.benchmarks.data import HEAD as PREPARATION_HEAD
from tests.benchmarks.data import preparation
from tests.launch import run

REPEATS = 5


class Row(NamedTuple):
    """One comparison: work done in a second by us and by the peer."""

    what: str
    unit: str
    ours: float
    peer: str
    theirs: float


def best(work: float, *candidates: Callable[[], object]) -> list[float]:
    """Work a second of each candidate: the best of some turns, taken alternately after one to warm up."""
    seconds: list[list[float]] = [[] for _ in candidates]
    for turn in range(REPEATS + 1):
        for times, candidate in zip(seconds, candidates, strict=True):
            start = time.perf_counter()
            candidate()
            if turn:
                times.append(time.perf_counter() - start)
    return [work / min(times) for times in seconds]


def encoding() -> Row:
    """Colours to tokens: the lookup table against Hugging Face's processor."""
    from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

    generator = np.random.default_rng(0)
    palette = generator.uniform(-1, 1, (512, 3)).astype(np.float32)
    pictures = generator.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    table = lookup_table(palette)
    processor = ImageGPTImageProcessorPil(clusters=palette, do_resize=False)
    pixels = pictures.size / 3 / 1e6
    ours, theirs = best(pixels, lambda: encode(pictures, table), lambda: processor(list(pictures)))
    return Row("colours to tokens", "Mpixel/s", ours, "ImageGPTImageProcessor", theirs)


def reading(shards: Path) -> Row:
    """Shuffled tokens from the tars: our reader against webdataset's own packed reading with a shuffle buffer."""
    import webdataset as wds

    opened = open_shard_set(shards)
    split = opened.split("train")
    urls = [str(shards / shard["file"]) for shard in opened.manifest["splits"]["train"]["shards"]]

    def read_ours() -> None:
        batches = TrainingBatches(split, opened.resolution, ImageOrder(split.record_images, 0), 0, 1)
        for step in range(split.images // 128):
            batches.at(step * 128, 128)
        batches.close()

    def read_theirs() -> None:
        pipeline = wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("pixels.npy", "labels.npy").unbatched()
        for _ in pipeline.shuffle(1000).batched(128):
            pass

    tokens = split.images * opened.resolution**2 / 1e6
    ours, theirs = best(tokens, read_ours, read_theirs)
    return Row("shuffled batches of 128", "Mtoken/s", ours, "webdataset", theirs)


def training() -> Row:
    """A training step through the engine against the same step in plain torch: DeepSpeed's own cost."""
    from pipeline.model import objectives
    from pipeline.train.engine import build_engine, new_optimizer
    from pipeline.train.ranks import describe_ranks, start_group

    config = TrainConfig(
        model=ModelConfig(layers=4, width=256, heads=4, resolution=16),
        batch=BatchConfig(global_size=8, micro_size=8),
        schedule=ScheduleConfig(steps=100, warmup_steps=1),
        precision="fp32",
    )
    ranks, model_config = describe_ranks(), gpt2_config(config.model)
    tokens = np.random.default_rng(0).integers(0, 512, (8, 256)).astype(np.uint16)
    start_group(ranks)
    engine = build_engine(config, model_config, ranks)
    plain = build_model(model_config)
    initialize(plain, 0)
    optimizer = new_optimizer(config, plain.named_parameters(), ranks.device)

    def plain_step() -> None:
        inputs, targets = objectives.next_color(torch.from_numpy(tokens.astype(np.int64)), 512)
        objectives.token_loss(plain(inputs).logits, targets, 512).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    ours, theirs = best(len(tokens), lambda: engine.step(tokens, 1e-3), plain_step)
    return Row("training step, 3.5M parameters, ZeRO-1", "images/s", ours, "plain torch, same model", theirs)


def sampling() -> Row:
    """Completions against Hugging Face's generate() on its own ImageGPT of the same size."""
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    from pipeline.model.sampling import complete

    config = ModelConfig(layers=8, width=256, heads=4, resolution=16)
    model = build_model(gpt2_config(config))
    initialize(model, 0)
    peer = ImageGPTForCausalImageModeling(
        ImageGPTConfig(n_layer=8, n_embd=256, n_head=4, n_positions=257, vocab_size=513)
    ).eval()
    given = torch.randint(0, 512, (8, 128))
    start = torch.cat([torch.full((8, 1), 512), given], dim=1)

    def generate() -> None:
        peer.generate(start, max_new_tokens=128, do_sample=True, top_k=0, use_cache=True, pad_token_id=0)

    ours, theirs = best(8, lambda: complete(model, given, 256, seed=0), generate)
    return Row("completions, 8 of 16x16 at once", "images/s", ours, "HF ImageGPT.generate", theirs)


def main() -> None:
    """Prints the machine, then a table."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "webdataset"))
    print(f"{platform.machine()} CPU, {torch.get_num_threads()} threads; {packages}\n")
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        options = ["--config", "configs/data/demo.yaml", "--resolution", 32, "--out", shards]
        prepared = run(1, "-m", "data_prep", "shards", *options, logs=Path(folder) / "logs")
        assert prepared.codes == [0] and (shards / MANIFEST).exists(), prepared.output
        print("| what | unit | ours | peer | peer's | ratio |\n|---|---|---|---|---|---|")
        for measure in (encoding, lambda: reading(shards), sampling, training):
            row = measure()
            ratio = row.ours / row.theirs
            print(
                f"| {row.what} | {row.unit} | {row.ours:.4g} | {row.peer} | {row.theirs:.4g} | {ratio:.2f} |",
                flush=True,
            )
        print(f"\n{PREPARATION_HEAD}", flush=True)
        for line in preparation(Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
