"""Training steps, completions and features beside the peers'.

TFLOP/s and shares of the peak count 6 FLOPs a matmul parameter and token and 12 * L * T * D for attention in full;
recomputation does not count.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from pipeline import costs
from pipeline.model import attention
from tests.benchmarks import models
from tests.benchmarks.accelerator.common import (
    CUDA,
    DEVICE,
    TOY,
    TURNS,
    case_of,
    free_memory,
    start_alone,
    use_fastest_attention,
)
from tests.benchmarks.accelerator.report import Row, known
from tests.benchmarks.models import Case, Step
from tests.benchmarks.turns import best

STEPS = "\n| training step | | images | tokens/s | TFLOP/s | of the peak |\n|---|---|---|---|---|---|"


def fit(case: Case, make: Callable[[Case], Step]) -> tuple[Case, Step]:
    """A step that has run once, with half the micro-batch until it fits."""
    while True:
        free_memory()  # compiled code too: it was specialized to the batch that did not fit
        try:
            return case, _started(make(case))
        except torch.OutOfMemoryError:
            if case.images == 1:
                raise
        case = replace(case, images=case.images // 2)  # here the error is gone, and with it what its frames held


def _started(step: Step) -> Step:
    try:
        step()
    except torch.OutOfMemoryError:
        close(step)
        raise
    return step


def close(step: Step) -> None:
    """Frees what a step holds beside the memory that Python frees."""
    getattr(step, "close", lambda: None)()


def rates(case: Case, make: Callable[[Case], Step]) -> tuple[Case, float]:
    """Images a second of a step."""
    case, step = fit(case, make)
    [rate] = best(case.images, step, turns=TURNS)
    close(step)
    return case, rate


def step_row(name: str, how: str, case: Case, make: Callable[[Case], Step]) -> Iterator[Row | str]:
    """A line of the table of training steps."""
    case, rate = rates(case, make)
    yield from rate_row(name, how, case, rate)


def rate_row(name: str, how: str, case: Case, rate: float) -> Iterator[Row | str]:
    """The same of a rate that is known."""
    positions = case.config.n_positions
    flops = rate * positions * costs.flops_per_token(case.config)
    share = flops / costs.device_peak(DEVICE, "bf16").flops
    numbers = f"{rate * positions:,.0f} | {flops / 1e12:.1f} | {share:.1%}"
    yield f"| {name} | {how} | {case.images} | {numbers} |"
    yield known(f"{name}, {how}, {case.images} images: tokens/s", f"{rate * positions:,.0f} ({share:.1%})")


def title(size: str) -> str:
    """What a case of this size is called."""
    return {"xl": "XL's width, 12 layers, 64x64"}.get(size, f"iGPT-{size.upper()}")


def ours(case: Case) -> Step:
    """Through the engine."""
    return models.OurStep(case, start_alone())


def peers(size: str) -> Iterator[Row | str]:
    """Ours, and what a size is compared with."""
    case, name = case_of(size), title(size)
    start_alone()
    use_fastest_attention(case)
    yield STEPS
    yield from step_row(name, "ours, ZeRO-1", case, ours)
    if size == "s":
        yield from step_row(name, "the same without DeepSpeed", case, models.plain_step)
    yield from step_row(name, "GPT-2, compiled blocks", case, models.gpt_step)
    eager = replace(case, compiled=False)
    if CUDA:
        eager = replace(eager, images=models.images_that_fit(eager, torch.cuda.mem_get_info()[1]))
    yield from step_row(name, "HF ImageGPT, as Trainer does", eager, models.image_gpt_step)


def more_l() -> Iterator[Row | str]:
    """iGPT-L in two other ways."""
    case = case_of("l")
    start_alone()
    use_fastest_attention(case)
    yield STEPS
    yield from step_row("iGPT-L", "ours, not compiled", replace(case, compiled=False), ours)
    yield from step_row("iGPT-L", "ours, blocks computed again", replace(case, recompute=True), ours)


def train_xl() -> Iterator[Row | str]:
    """Of XL as many layers as fit."""
    start_alone()
    use_fastest_attention(case_of("xl"))
    yield STEPS
    yield from step_row(title("xl"), "ours, ZeRO-1", case_of("xl"), ours)


def float8_l() -> Iterator[Row | str]:
    """iGPT-L in float8: its speed, and its losses beside bf16's while one batch is learned by heart."""
    start_alone()
    use_fastest_attention(case_of("l"))
    yield STEPS
    yield from step_row("iGPT-L", "ours, fp8", case_of("l", precision="fp8"), ours)
    steps = 10 if TOY else 30
    yield f"\n| nats at step | {' | '.join(str(step) for step in range(10, steps + 1, 10))} |"
    yield "|---" * (steps // 10 + 1) + "|"
    for precision in ("bf16", "fp8"):
        free_memory()
        curve = loss_curve(case_of("l", precision=precision), steps)
        yield f"| {precision} | {' | '.join(f'{loss:.4f}' for loss in curve[9::10])} |"
        yield known(f"fp8 l: {precision}, loss after {steps} steps", curve[-1])


def loss_curve(case: Case, steps: int) -> list[float]:
    """The losses of some steps on one batch."""
    torch.manual_seed(0)
    step = models.OurStep(case, start_alone(), learning_rate=1e-3)
    losses = [step() for _ in range(steps)]
    step.close()
    return losses


def sampling() -> Iterator[Row | str]:
    """Completions of 32x32."""
    case = case_of("s", images=2 if TOY else 32)
    ours, generate = models.completions(case)
    our_rate, their_rate = best(case.images, ours, generate, turns=1)
    floor = case.images / (models.read_seconds(case) * case.config.n_positions / 2)
    yield "\n| completions, iGPT-S, bf16 | images/s | of the rate at which memory is read |\n|---|---|---|"
    for name, rate in (("ours", our_rate), ("HF ImageGPT.generate", their_rate)):
        yield f"| {name} | {rate:.3g} | {rate / floor:.0%} |"
        yield known(f"completions: {name}, images/s", rate)


def features() -> Iterator[Row | str]:
    """All layers in one pass."""
    case = case_of("s")
    pooled, forward = best(case.images, *models.features(case), turns=TURNS)
    yield "\n| features of all layers, iGPT-S | images/s | of the forward pass alone |\n|---|---|---|"
    yield f"| ours | {pooled:,.0f} | {pooled / forward:.0%} |"
    yield known("features: images/s", pooled)


def attention_times() -> Iterator[Row | str]:
    """FlashAttention's and cuDNN's at the shapes of the sizes."""
    yield "\n| attention, forward and backward | ms, the faster first |\n|---|---|"
    for size in ("s", "m", "l", "xl"):
        case = case_of(size)
        seconds = models.attention_seconds(case)
        text = attention.describe(seconds) if seconds else "no choice"
        yield f"| {title(size)}, {case.images} images | {text} |"
        yield known(f"attention times: {size}", text)
