"""Training steps on one CPU thread: ours, compiled and as it is, beside HF ImageGPT's loop and a compiled GPT-2."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from pipeline.config import ModelConfig
from pipeline.distributed import Ranks
from pipeline.model import attention
from tests.benchmarks import models
from tests.benchmarks.models import Case, Step
from tests.benchmarks.turns import best

CPU = torch.device("cpu")
SIZES = {16: 8, 32: 2}
"""Resolution: images of a batch. Both have 2,048 tokens."""
TURNS = 3
HEAD = (
    "| training step, 3.5M parameters, images/s | ours | compiled | HF ImageGPT, as Trainer does | GPT-2, compiled "
    "| ours to HF | compiled to HF | compiled to GPT-2 | attention |\n" + "|---" * 9 + "|"
)


def table(ranks: Ranks) -> Iterator[str]:
    """Images per second at T = 256 and 1,024 in fp32 and bf16; needs the process group."""
    yield HEAD
    for resolution, images in SIZES.items():
        for precision in ("fp32", "bf16"):
            torch._dynamo.reset()
            case = Case(ModelConfig(layers=4, width=256, heads=4, resolution=resolution), images, precision, CPU)
            compiled = replace(case, compiled=True)
            seconds = models.attention_seconds(case)
            steps = [with_attention(models.OurStep(each, ranks), seconds) for each in (case, compiled)]
            peers = [models.image_gpt_step(case), models.gpt_step(compiled)]
            ours, fast, trainer, gpt = best(images, *steps, *peers, turns=TURNS)
            rates = " | ".join(f"{rate:.2f}" for rate in (ours, fast, trainer, gpt))
            ratios = " | ".join(f"{ratio:.2f}" for ratio in (ours / trainer, fast / trainer, fast / gpt))
            kernel = attention.fastest(seconds) if seconds else attention.FLASH
            yield f"| T = {resolution**2}, {images} images, {precision} | {rates} | {ratios} | {kernel} |"


def with_attention(step: Step, seconds: dict[str, float]) -> Step:
    """The step with the fastest kernel of ours; peers in the same process keep torch's."""

    def run() -> None:
        attention.use_fastest(seconds)
        try:
            step()
        finally:
            attention.use_fastest({})

    return run
