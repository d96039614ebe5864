"""What one accelerator gives, ours beside the peers: python -m tests.benchmarks.accelerator

Needs torch with CUDA, transformers and the wheels of `make accelerator-wheels`; nothing is fetched. Each part runs in a
process of its own, so that one that fails costs its own rows only; no further one is started once the time is over.
TFLOP/s and shares of the peak count 6 FLOPs a matmul parameter and token and 12 * L * T * D for attention in full;
recomputation does not count. `--toy` runs every part at toy size, on whatever device there is.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch

from pipeline import costs
from pipeline.config import ModelConfig
from pipeline.model import attention, objectives
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import gpt2_config
from pipeline.plan.block_times import BlockTime, BlockTimes
from pipeline.train.monitor.profiler import describe
from tests.benchmarks import models
from tests.benchmarks.models import Case, Step
from tests.benchmarks.turns import best

BUDGET_SECONDS = 510
PART_SECONDS = 150
CUDA = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOY = os.environ.get("BENCHMARK_TOY") == "1"
TURNS = 1 if TOY else 5
OUT = Path("out/accelerator")


def case_of(size: str, **changes: object) -> Case:
    """A published size with a micro-batch that should fit 80 GB; XL's width at 64x64 with as many layers as do."""
    if TOY:
        small = {"xl": 8}.get(size, 4)
        return replace(Case(ModelConfig(layers=2, width=32, heads=2, resolution=small), 2, "bf16", CUDA), **changes)  # type: ignore[arg-type]
    images = {"s": 64, "m": 32, "l": 16, "xl": 2}[size]
    model = ModelConfig(size=size, resolution=32)
    if size == "xl":
        model = ModelConfig(layers=12, width=3072, heads=24, resolution=64)
    return replace(Case(model, images, "bf16", CUDA, compiled=True), **changes)  # type: ignore[arg-type]


def start_alone() -> "models.Ranks":
    """The process group of one rank."""
    from pipeline.distributed import describe_ranks
    from pipeline.train.engine.process_group import start_group

    ranks = describe_ranks()
    start_group(ranks)
    return ranks


def rates(case: Case, make: Callable[[Case], Step]) -> tuple[Case, float]:
    """Images a second of a step, with half the micro-batch until it fits."""
    while True:
        # Engines lie in cycles: what is left of the one before would take the next one's memory, a peer's too.
        gc.collect()
        torch.cuda.empty_cache()
        try:
            [rate] = best(case.images, make(case), turns=TURNS)
            return case, rate
        except torch.OutOfMemoryError:
            if case.images == 1:
                raise
        case = replace(case, images=case.images // 2)  # here the error is gone, and with it what its frames held


def step_row(name: str, how: str, case: Case, make: Callable[[Case], Step]) -> Iterator[str]:
    """A line of the table of training steps."""
    case, rate = rates(case, make)
    positions = case.config.n_positions
    flops = rate * positions * costs.flops_per_token(case.config)
    peak = costs.device_peak(CUDA, "bf16").flops
    yield f"| {name} | {how} | {case.images} | {rate * positions:,.0f} | {flops / 1e12:.1f} | {flops / peak:.1%} |"


STEPS = "| training step | | images | tokens/s | TFLOP/s | of the peak |\n|---|---|---|---|---|---|"


def train(size: str) -> Iterator[str]:
    """Ours and what a size is compared with."""
    ranks = start_alone()
    case = case_of(size)
    use_fastest_attention(case)

    def ours(case: Case) -> Step:
        return models.our_step(case, ranks)

    name = {"xl": "XL's width, 12 layers, 64x64"}.get(size, f"iGPT-{size.upper()}")
    yield STEPS
    yield from step_row(name, "ours, ZeRO-1", case, ours)
    if size == "s":
        yield from step_row(name, "the same without DeepSpeed", case, models.plain_step)
    if size == "l":
        yield from step_row(name, "ours, not compiled", replace(case, compiled=False), ours)
        yield from step_row(name, "ours, blocks computed again", replace(case, recompute=True), ours)
    if size != "xl":
        yield from step_row(name, "GPT-2, compiled blocks", case, models.gpt_step)
        peer = replace(case, compiled=False)
        yield from step_row(name, "HF ImageGPT, as Trainer does", peer, models.image_gpt_step)


def attention_shape(case: Case) -> attention.AttentionShape:
    """Of one block."""
    config = case.config
    width = config.n_embd // config.n_head
    return attention.AttentionShape(case.images, config.n_head, config.n_positions, width, causal=True)


def use_fastest_attention(case: Case) -> None:
    """As a run of ours does; the peers of the process have it too."""
    seconds = attention.measure(attention_shape(case), attention.CANDIDATES, CUDA)
    if seconds:
        attention.use_fastest(seconds)


def attention_kernels() -> Iterator[str]:
    """FlashAttention's and cuDNN's at the shapes of the sizes."""
    yield "| attention, forward and backward | ms, the faster first |\n|---|---|"
    for size in ("s", "m", "l", "xl"):
        shape = attention_shape(case_of(size))
        seconds = attention.measure(shape, attention.CANDIDATES, CUDA)
        yield f"| {shape} | {attention.describe(seconds) if seconds else 'none runs'} |"


def sampling() -> Iterator[str]:
    """Completions of 32x32."""
    case = case_of("s", images=2 if TOY else 32)
    ours, generate = models.completions(case)
    our_rate, their_rate = best(case.images, ours, generate, turns=1)
    floor = case.images / (models.read_seconds(case) * case.config.n_positions / 2)
    yield "| completions, iGPT-S, bf16 | images/s | of the rate at which memory is read |\n|---|---|---|"
    yield f"| ours | {our_rate:.3g} | {our_rate / floor:.0%} |"
    yield f"| HF ImageGPT.generate | {their_rate:.3g} | {their_rate / floor:.0%} |"


def features() -> Iterator[str]:
    """All layers in one pass."""
    case = case_of("s")
    pooled, forward = best(case.images, *models.features(case), turns=TURNS)
    yield "| features of all layers, iGPT-S | images/s | of the forward pass alone |\n|---|---|---|"
    yield f"| ours | {pooled:,.0f} | {pooled / forward:.0%} |"


def checks() -> Iterator[str]:
    """Numbers on this device against float64's, and those of faster ways against plain ones: largest differences."""
    small = ModelConfig(layers=4, width=128, heads=4, resolution=8)
    with torch.device(CUDA):
        model = build_model(gpt2_config(small)).eval()
    initialize(model, 0)
    draw = torch.Generator("cpu").manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(CUDA) * 0.05)
    tokens = torch.randint(0, 512, (4, 64), generator=draw).to(CUDA)
    inputs, targets = objectives.next_color(tokens, 512)
    with torch.no_grad():
        fp32 = model(inputs).logits
        exact = model.double()(inputs).logits
        model.float()
        with torch.autocast(CUDA.type, torch.bfloat16):
            bf16 = objectives.image_loss(model(inputs).logits, targets, 512).mean()
    loss = objectives.image_loss(exact, targets, 512).mean()
    yield "| check | largest difference |\n|---|---|"
    yield f"| logits in fp32 from float64's | {(fp32 - exact).abs().max():.1e} of {exact.abs().max():.1f} |"
    yield f"| loss in bf16 from float64's, nats | {abs(bf16 - loss):.1e} of {loss:.4f} |"
    yield f"| colors that differ between cached, replayed completions and full passes | {_wrong_colors(model)} of 128 |"
    ranks = start_alone()
    curves = [_curve(Case(small, 4, precision, CUDA, compiled), ranks) for precision, compiled in CURVES]  # type: ignore[arg-type]
    for (precision, compiled), curve in zip(CURVES[1:], curves[1:], strict=True):
        apart = max(abs(ours - theirs) for ours, theirs in zip(curve, curves[0], strict=True))
        yield f"| loss over 20 steps, {precision}{', compiled' * compiled}, from fp32's, nats | {apart:.1e} |"


CURVES = (("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True))


def _wrong_colors(model: torch.nn.Module) -> int:
    """How many colors of four greedy completions differ."""
    from pipeline.model.sampling import complete

    prefix = torch.randint(0, 512, (4, 32), generator=torch.Generator("cpu").manual_seed(2)).to(CUDA)
    found = complete(model, prefix, 64, seed=0, temperature=0)
    inputs, targets = objectives.next_color(found, 512)
    with torch.no_grad():
        return int((model(inputs).logits.argmax(-1) != targets)[:, 32:].sum())


def _curve(case: Case, ranks: "models.Ranks", steps: int = 20) -> list[float]:
    from pipeline.model.masks import Batch
    from pipeline.train.engine.build import build_engine

    engine = build_engine(case.training(), case.config, ranks)
    return [engine.step(Batch(case.tokens()), 1e-3).loss for _ in range(steps)]


def float8_l() -> Iterator[str]:
    """iGPT-L in float8: its speed, and its losses beside bf16's while one batch is learned by heart."""
    ranks = start_alone()
    use_fastest_attention(case_of("l"))
    yield STEPS
    yield from step_row("iGPT-L", "ours, fp8", case_of("l", precision="fp8"), lambda case: models.our_step(case, ranks))
    torch.cuda.empty_cache()
    steps = 10 if TOY else 50
    yield f"\n| nats at step | {' | '.join(str(step) for step in range(10, steps + 1, 10))} |"
    yield "|---" * (steps // 10 + 1) + "|"
    for precision in ("bf16", "fp8"):
        curve = _curve(case_of("l", precision=precision), ranks, steps)
        yield f"| {precision} | {' | '.join(f'{loss:.4f}' for loss in curve[9::10])} |"


def profile_l() -> Iterator[str]:
    """Where a step of iGPT-L spends its time."""
    from torch.profiler import ProfilerActivity, profile

    use_fastest_attention(case_of("l"))
    step = models.our_step(case_of("l"), start_alone())
    step()
    step()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA.type == "cuda" else [])]
    began = time.perf_counter()
    with profile(activities=kinds) as window:
        step()
        if CUDA.type == "cuda":
            torch.cuda.synchronize()
    yield f"A step of iGPT-L: {describe(window.key_averages(), time.perf_counter() - began)}"
    by = "self_device_time_total" if CUDA.type == "cuda" else "self_cpu_time_total"
    (OUT / "profile.txt").write_text(window.key_averages().table(sort_by=by, row_limit=60))


def block_times() -> Iterator[str]:
    """What `plan --block_times` reads."""
    name = torch.cuda.get_device_name() if CUDA.type == "cuda" else "CPU"
    rows = tuple(_block_time(case_of(size)) for size in ("s", "m", "l", "xl"))
    (OUT / "block_times.json").write_text(json.dumps(asdict(BlockTimes(name, rows)), indent=1))
    yield "| one block, bf16 | forward, ms | backward, ms |\n|---|---|---|"
    for row in rows:
        shape = f"width {row.width}, {row.positions} positions, {row.images} images"
        yield f"| {shape} | {1000 * row.forward_seconds:.2f} | {1000 * row.backward_seconds:.2f} |"


def _block_time(case: Case) -> BlockTime:
    config = case.config
    config.n_layer = 1
    with torch.device(CUDA):
        model = build_model(config)
    initialize(model, 0)
    model.bfloat16()
    block, head = model.transformer.h[0], torch.nn.Sequential(model.transformer.ln_f, model.lm_head)
    if case.compiled:
        block.compile()
    states = torch.randn(
        case.images, config.n_positions, config.n_embd, device=CUDA, dtype=torch.bfloat16, requires_grad=True
    )
    targets = torch.from_numpy(case.tokens().astype("int64")).to(CUDA)
    forward, both = _passes(lambda: block(states).sum())
    head_forward, head_both = _passes(lambda: objectives.image_loss(head(states), targets, models.COLORS).mean())
    weights = torch.randn(1 << (16 if TOY else 27), device=CUDA, requires_grad=True)
    weights.grad = torch.randn_like(weights)
    optimizer = torch.optim.AdamW([weights], fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_([weights], 1.0)
        optimizer.step()

    [updates] = best(len(weights), update, turns=TURNS)
    return BlockTime(
        config.n_embd, config.n_head, config.n_positions, case.images,
        forward, max(both - forward, 1e-9), head_forward, max(head_both - head_forward, 1e-9), 1 / updates,
    )  # fmt: skip


def _passes(loss: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """Seconds of the forward pass, and of both."""
    forward, both = best(1, loss, lambda: loss().backward(), turns=TURNS)
    return 1 / forward, 1 / both


PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "checks": checks,
    "train-l": lambda: train("l"),
    "train-s": lambda: train("s"),
    "sampling": sampling,
    "train-m": lambda: train("m"),
    "train-xl": lambda: train("xl"),
    "blocks": block_times,
    "features": features,
    "fp8-l": float8_l,
    "attention": attention_kernels,
    "profile-l": profile_l,
}


def run_parts(names: list[str]) -> bool:
    """Runs each part in a process of its own, then prints all tables. Whether all ended well."""
    end, tables, good = time.monotonic() + BUDGET_SECONDS, [], True
    for name in names:
        left = end - time.monotonic()
        if left < 20:
            tables.append(f"## {name}\n\nnot run: the time was over")
            good = False
            continue
        began = time.monotonic()
        print(f"{name} ...", flush=True)
        lines, ended = _run_part(name, min(left, PART_SECONDS))
        good = good and ended
        tables.append(f"## {name}, {time.monotonic() - began:.0f} s\n\n{lines}")
    print("\n\n".join(tables), flush=True)
    return good


def _run_part(name: str, seconds: float) -> tuple[str, bool]:
    log = OUT / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.accelerator", "--part", name], stdout=file, stderr=file
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
    output = log.read_text()
    lines = "\n".join(line[1:] for line in output.splitlines() if line.startswith("\t"))
    if code != 0:
        word = f"took more than {seconds:.0f} s" if code is None else f"ended with code {code}"
        lines += f"\n{word}; its last lines: {' / '.join(output.splitlines()[-3:])}"
    return lines, code == 0


def main() -> int:
    """Prints the machine and the tables. Returns 1 if a part failed or did not run."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.accelerator")
    parser.add_argument("--part", choices=PARTS, help="Run this part here, nothing else.")
    parser.add_argument("--toy", action="store_true", help="Toy sizes, on whatever device there is.")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if options.part:
        for line in PARTS[options.part]():
            print("\t" + line.replace("\n", "\n\t"), flush=True)
        return 0
    if options.toy:
        os.environ["BENCHMARK_TOY"] = "1"
    elif CUDA.type != "cuda":
        print("error: torch sees no CUDA device; --toy tries the script on this one.", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name() if CUDA.type == "cuda" else "CPU"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    print(f"{device}; {packages}", flush=True)
    return 0 if run_parts(list(PARTS)) else 1


if __name__ == "__main__":
    sys.exit(main())
