"""An engine over five steps: its losses, a snapshot and its restoration, evaluation, recompiles and host waits."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.checkpoint.checksums import checksums
from pipeline.checkpoint.format import rank_file, write_rank
from pipeline.checkpoint.fragments import FragmentReader
from pipeline.checkpoint.probe import PROBE_TOKENS
from pipeline.config import BatchConfig, EmaConfig, ModelConfig, ParallelConfig, ScheduleConfig, TrainConfig
from pipeline.model import objectives
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import gpt2_config
from pipeline.model.masks import Batch
from pipeline.train.engine.base import Engine
from pipeline.train.engine.build import build_engine
from tests.benchmarks.accelerator.common import CUDA, DEVICE, TOY, start_alone
from tests.benchmarks.accelerator.report import Row, at_most, equal, known

STEPS, LEARNING_RATE = 5, 3e-3
MODEL = ModelConfig(layers=2, width=32 if TOY else 256, heads=2 if TOY else 4, resolution=8 if TOY else 16)
IMAGES, MICRO, ODD = 8, 4, 7
COLORS = 512
LOSS = {"fp32": 1e-4, "bf16": 2e-2, "fp8": 5e-2}
"""Nats per token by which a step's loss may differ from that of plain torch in fp32."""
REPEATED = {"fp32": 1e-5, "bf16": 2e-3, "fp8": 5e-3}
"""Nats per token by which a repeated step's loss may differ: some kernels add in any order."""
HOST_WAITS = 10
"""Host waits of a step, after its last backward pass: for its loss and norm, and DeepSpeed's own."""
MICRO_BATCH_WAITS = {0: 0, 1: 0, 2: 0, 3: 3}
"""Host waits that a further micro-batch may add, by ZeRO stage: DeepSpeed's ZeRO-3 waits for its streams."""
WAITING = "synchronizing CUDA operation"
"""Part of torch's warning in sync debug mode."""


def training(precision: str, zero_stage: int, compiled: bool, recompute: bool, average: bool = False) -> TrainConfig:
    """The configuration of an engine."""
    return TrainConfig(
        model=MODEL,
        batch=BatchConfig(global_size=IMAGES, micro_size=MICRO),
        schedule=ScheduleConfig(steps=1000, warmup_steps=1),
        precision=precision,  # type: ignore[arg-type]
        compile=compiled,
        parallel=ParallelConfig(zero_stage=zero_stage, recompute=recompute),  # type: ignore[arg-type]
        ema=EmaConfig(decay=0.5 if average else 0.0),
    )


def tokens() -> np.ndarray:
    """The images that every step learns, uint16 (B, T): a color each, with noise."""
    draw = np.random.default_rng(0)
    base = draw.integers(0, COLORS - 4, (IMAGES, 1))
    return (base + draw.integers(0, 4, (IMAGES, MODEL.resolution**2))).astype(np.uint16)


@cache
def reference() -> list[float]:
    """The losses of the same steps in fp32, in a loop of plain torch."""
    with torch.device(DEVICE):
        model = build_model(gpt2_config(MODEL))
    initialize(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    inputs, targets = objectives.next_color(torch.from_numpy(tokens().astype(np.int64)).to(DEVICE), COLORS)
    losses = []
    for _ in range(STEPS):
        loss = objectives.image_loss(model(inputs).logits, targets, COLORS).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@contextmanager
def torchs_linear() -> Iterator[None]:
    """Restores torch's own product afterwards: ZeRO-3 replaces it for the rest of the process, which measures speed."""
    linear = functional.linear
    try:
        yield
    finally:
        functional.linear = linear


def check_engine(
    precision: str = "bf16",
    zero_stage: int = 1,
    compiled: bool = False,
    recompute: bool = False,
    average: bool = False,
) -> Iterator[Row]:
    """All that a run does with an engine; see the module."""
    with torchs_linear():
        yield from _check_engine(precision, zero_stage, compiled, recompute, average)


def _check_engine(precision: str, zero_stage: int, compiled: bool, recompute: bool, average: bool) -> Iterator[Row]:
    name = f"engine zero-{zero_stage} {precision}{' compiled' * compiled}{' recompute' * recompute}"
    name += " average" * average
    if TOY and zero_stage == 3 and compiled:
        yield known(name, "not at toy size")  # a CPU takes half a minute to compile it
        return
    compiled = compiled or (precision == "fp8" and not TOY)  # what a CPU emulates takes a minute to compile
    config = training(precision, zero_stage, compiled, recompute, average)
    engine = build_engine(config, gpt2_config(MODEL), start_alone())
    batch = Batch(tokens())
    before = compiled_graphs()
    losses = [engine.step(batch, LEARNING_RATE).loss]
    graphs = compiled_graphs()
    losses += [engine.step(batch, LEARNING_RATE).loss for _ in range(STEPS - 1)]
    apart = max(abs(ours - plain) for ours, plain in zip(losses, reference(), strict=True))
    yield at_most(f"{name}: loss from plain fp32's, to {losses[-1]:.4f}", apart, LOSS[precision])
    if compiled:
        made = graphs - before
        yield Row(made > 0, f"{name}: graphs after the first step", str(made), "> 0")
        yield equal(f"{name}: recompiles in the other steps", compiled_graphs() - graphs, 0)
    yield from _check_evaluation(name, engine, batch, precision)
    if average:
        yield from _check_average(name, engine, batch, precision)
    yield from _check_restoration(name, engine, batch, precision)
    if compiled:
        yield equal(f"{name}: recompiles in evaluation, probe and later", compiled_graphs() - graphs, 0)
    if CUDA or not compiled:  # on a CPU, waits are counted by a mode that compiled code does not see
        yield from _check_host_waits(name, engine, batch, zero_stage)
    if CUDA:
        yield known(f"{name}: peak memory, MB", torch.cuda.max_memory_allocated() / 1e6)
    engine.close()


def _check_evaluation(name: str, engine: Engine, batch: Batch, precision: str) -> Iterator[Row]:
    """A batch that the micro-batch does not divide, and the probe's short image, against the same images alone."""
    odd, part = engine.evaluate(batch[:ODD]), engine.evaluate(batch[:MICRO])
    yield equal(f"{name}: images evaluated", odd.shape, (ODD,))
    yield at_most(f"{name}: evaluation of an odd number", np.abs(odd[:MICRO] - part).max(), REPEATED[precision])
    probe = probe_loss(engine, batch)
    yield at_most(f"{name}: probe, {probe:.4f}, repeated", abs(probe - probe_loss(engine, batch)), REPEATED[precision])
    features = engine.features(batch[:MICRO])
    yield equal(f"{name}: layers with features", sorted(features), list(range(MODEL.shape.layers + 1)))
    yield equal(f"{name}: features finite", all(np.isfinite(layer).all() for layer in features.values()), True)


def _check_average(name: str, engine: Engine, batch: Batch, precision: str) -> Iterator[Row]:
    """The average of the weights in their place, and the weights again."""
    raw, before = probe_loss(engine, batch), checksums(*engine.snapshot())
    with engine.averaged():
        averaged = probe_loss(engine, batch)
    yield Row(averaged > raw, f"{name}: loss with the average, {raw:.4f} without", f"{averaged:.4f}", "> without")
    yield equal(f"{name}: checksums after the exchange", checksums(*engine.snapshot()) == before, True)
    yield at_most(f"{name}: probe after the exchange", abs(probe_loss(engine, batch) - raw), REPEATED[precision])


def _check_host_waits(name: str, engine: Engine, batch: Batch, zero_stage: int) -> Iterator[Row]:
    """Of a step, and those that a further micro-batch adds: each would leave the device idle in every pass."""
    waits, where = host_waits(lambda: engine.step(batch, LEARNING_RATE))
    print(f"{name}: host waits: {where}", flush=True)
    yield at_most(f"{name}: host waits in a step of {IMAGES // MICRO} micro-batches", waits, HOST_WAITS)
    longer = Batch(np.concatenate([tokens(), tokens()]))
    more, where = host_waits(lambda: engine.step(longer, LEARNING_RATE))
    print(f"{name}: host waits of twice the micro-batches: {where}", flush=True)
    added = (more - waits) / (IMAGES // MICRO)
    yield at_most(f"{name}: host waits that a further micro-batch adds", added, MICRO_BATCH_WAITS[zero_stage])


def probe_loss(engine: Engine, batch: Batch) -> float:
    """As every save computes it: the first tokens of one image."""
    return float(engine.evaluate(batch[:1].prefix(PROBE_TOKENS)).mean())


def _check_restoration(name: str, engine: Engine, batch: Batch, precision: str) -> Iterator[Row]:
    """A snapshot through a file, back into the engine after one more step, and that step once more."""
    probe = probe_loss(engine, batch)
    tensors, index = engine.snapshot()
    sums, replicas = checksums(tensors, index), engine.replica_checksums()
    with tempfile.TemporaryDirectory() as folder:
        write_rank(Path(folder), 0, tensors, index)
        following = engine.step(batch, LEARNING_RATE).loss
        engine.restore(FragmentReader([Path(folder) / rank_file(0)]), STEPS)
        tensors, index = engine.snapshot(tensors)
    yield equal(f"{name}: checksums after the restoration", checksums(tensors, index) == sums, True)
    yield equal(f"{name}: replicas after the restoration", engine.replica_checksums() == replicas, True)
    yield at_most(f"{name}: probe after it", abs(probe_loss(engine, batch) - probe), REPEATED[precision])
    repeated = engine.step(batch, LEARNING_RATE).loss
    yield at_most(f"{name}: the next step's loss once more", abs(repeated - following), REPEATED[precision])


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def host_waits(step: Callable[[], object]) -> tuple[int, list[str]]:
    """How often the host waits for the device in a step, and where: by torch's debug mode, or counted on a CPU."""
    if not CUDA:
        with _Reads() as reads:
            step()
        return reads.count, []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if WAITING in str(warning.message)]
    return len(waits), [f"{Path(wait.filename).name}:{wait.lineno}" for wait in waits]


class _Reads(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host, each of which waits on an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))
