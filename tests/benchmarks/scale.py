"""The simulator of `plan` against published runs, and its layouts for XL: make bench PARTS=scale

Arithmetic: nothing is measured here. MFU of all rows is 6 FLOPs a parameter and token and 12 * L * T * D for attention
in full, recomputation not counted, over 989 (H100) and 312 (A100) TFLOP/s.

Sources. llm-foundry: the tables of scripts/train/benchmarking/README.md in mosaicml/llm-foundry; FSDP with gradients
reduced as fp32 (MP mode DEFAULT; as bf16 in PURE), FULL_SHARD as ZeRO-3, SHARD_GRAD_OP as ZeRO-3 that gathers weights
once; 400 Gbit/s a GPU of H100 assumed, 200 of A100 stated. nanotron: docs/benchmark_summary.svg in
huggingface/nanotron, which names the layouts, 1M tokens a step, T 4096; its colors encode the MFU, quoted elsewhere as
45, 40 and 19% for 8.9B on 1, 8 and 64 nodes, and between those three the color scale is linear, so that the rows
with "~" are read off it, within a point. They are quoted as those of two stages with ZeRO-1 throughout, while the chart
has four stages on 1 node and tensor parallelism on 64: both are simulated.

Not here: Megatron-LM's 41 to 48% on H100, whose layouts are published as a figure only.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import GPT2Config

from pipeline import costs
from pipeline.config import BatchConfig, ModelConfig, ParallelConfig, TrainConfig
from pipeline.model.gpt_config import gpt2_config
from pipeline.plan.hardware import hardware_of
from pipeline.plan.layouts import Cluster, Layout, alternatives, fits, work_of
from pipeline.plan.simulator import StepTime, Work, simulate

UPDATE_BYTES = 42.0
"""The memory traffic of these frameworks' updates for one parameter, without DeepSpeed's other passes: gradient read
for its norm, scaled and read again (16), fp32 weight and two moments read and written (24), bf16 weight written (2)."""
H100, A100, A100_40 = (costs.ACCELERATORS[name] for name in ("h100-80gb", "a100-80gb", "a100-40gb"))


@dataclass(frozen=True)
class Shape:
    """A published model: layers, width, rows of the vocabulary, width of a plain MLP of as many parameters."""

    layers: int
    width: int
    vocabulary: int
    inner: int | None = None
    tied: bool = True

    def config(self, positions: int) -> GPT2Config:
        """As a model that costs.py knows."""
        return GPT2Config(
            n_layer=self.layers,
            n_embd=self.width,
            n_head=self.width // 128,
            n_positions=positions,
            n_inner=self.inner,
            vocab_size=self.vocabulary,
            block="igpt",
            colors=self.vocabulary,
        )


MPT = {
    "355M": Shape(24, 1024, 50368),
    "760M": Shape(24, 1536, 50368),
    "1.3B": Shape(24, 2048, 50368),
    "2.7B": Shape(32, 2560, 50368),
    "6.7B": Shape(32, 4096, 50368),
    "13B": Shape(40, 5120, 50368),
    "30B": Shape(48, 7168, 50368),
    "65B": Shape(80, 8192, 50368),
}
LLAMA = {  # three MLP matrices as two wider ones
    "3.6B": Shape(28, 3072, 131072, 12288),
    "8.9B": Shape(32, 4096, 131072, 21504, tied=False),
}


@dataclass(frozen=True)
class Published:
    """A run that someone measured. `parallel` are fields of Work."""

    source: str
    model: str
    accelerator: costs.Accelerator
    ranks: int
    positions: int
    images: int
    """Sequences of a micro-batch."""
    micro_batches: int
    mfu: float
    """In percent."""
    parallel: tuple[tuple[str, Any], ...]
    fitted: bool = False
    """One of the runs that the simulator's constants were fitted to."""
    approximate: bool = False
    quoted: bool = False
    """A layout that is quoted with the MFU, not the chart's."""

    def simulated(self) -> tuple[float, StepTime]:
        """MFU in percent, and the step."""
        shape = (MPT | LLAMA)[self.model]
        model, settings = shape.config(self.positions), dict(self.parallel)
        # Simulated with complete positions: the runs do not state it, and nothing was fitted to sequence parallelism.
        tensor = settings.get("tensor", 1)
        parallel = ParallelConfig(zero_stage=1, tensor_parallel=tensor, sequence_parallel=False)
        data = self.ranks // settings.get("tensor", 1) // settings.get("stages", 1)
        config = TrainConfig(
            model=ModelConfig(layers=1, width=1, heads=1),
            batch=BatchConfig(global_size=self.images * self.micro_batches * data, micro_size=self.images),
            parallel=parallel,
            precision="bf16",
        )
        hardware = hardware_of(self.accelerator)
        work = work_of(config, model, Cluster(self.accelerator, self.ranks, 8, hardware), data, self.micro_batches)
        outer = (shape.vocabulary * (1 if shape.tied else 2) + self.positions) * shape.width
        update = UPDATE_BYTES / hardware.memory_bytes
        work = replace(work, outer_parameters=outer, update=update, update_replicated=0.0, **settings)
        step = simulate(_as_in_nanotron(work) if self.source == "nanotron" else work, hardware.links)
        tokens = config.batch.global_size * self.positions
        return mfu(model, tokens, step.seconds, self.ranks, self.accelerator), step


def _as_in_nanotron(work: Work) -> Work:
    """It cuts embeddings and head for tensor parallelism too, and counts the head when it shares blocks out to stages.

    So the head's time is spread over the blocks.
    """
    forward = work.forward + work.head_forward / work.layers / work.tensor
    backward = work.backward + work.head_backward / work.layers / work.tensor
    outer = work.outer_parameters / work.tensor
    return replace(
        work, forward=forward, backward=backward, head_forward=0.0, head_backward=0.0, outer_parameters=outer
    )


def mfu(model: GPT2Config, tokens: int, seconds: float, ranks: int, accelerator: costs.Accelerator) -> float:
    """In percent."""
    return 100 * costs.flops_per_token(model) * tokens / (seconds * ranks * accelerator.bf16_flops)


FSDP = (("zero_stage", 3),)
AGAIN = (*FSDP, ("recompute", True))
ONCE = (*FSDP, ("gathers", 1))
PURE = (("gradient_bytes", 2.0),)


def _nanotron(zero_stage: int, stages: int, tensor: int = 1) -> tuple[tuple[str, Any], ...]:
    settings = {"zero_stage": zero_stage, "stages": stages, "tensor": tensor, "sums_everywhere": False}
    return tuple(settings.items())


PUBLISHED = [
    Published("llm-foundry", "1.3B", H100, 8, 2048, 14, 1, 41.82, FSDP, fitted=True),
    Published("llm-foundry", "1.3B", H100, 8, 1024, 18, 4, 41.95, FSDP),
    Published("llm-foundry", "1.3B", H100, 8, 4096, 7, 4, 40.26, FSDP, fitted=True),
    Published("llm-foundry", "1.3B", H100, 64, 2048, 20, 1, 40.85, FSDP),
    Published("llm-foundry", "1.3B", H100, 128, 2048, 12, 1, 40.60, ONCE),
    Published("llm-foundry", "1.3B", H100, 256, 2048, 12, 1, 39.15, ONCE),
    Published("llm-foundry", "1.3B", H100, 512, 2048, 12, 1, 36.65, ONCE, fitted=True),
    Published("llm-foundry", "760M", H100, 8, 1024, 48, 2, 39.76, FSDP),
    Published("llm-foundry", "760M", H100, 32, 2048, 24, 1, 37.57, FSDP),
    Published("llm-foundry", "2.7B", H100, 16, 2048, 10, 3, 43.73, FSDP),
    Published("llm-foundry", "2.7B", H100, 64, 2048, 6, 3, 40.80, FSDP),
    Published("llm-foundry", "2.7B", H100, 512, 2048, 8, 1, 39.24, ONCE),
    Published("llm-foundry", "6.7B", H100, 8, 2048, 6, 1, 46.44, FSDP),
    Published("llm-foundry", "6.7B", H100, 8, 4096, 16, 2, 40.42, AGAIN),
    Published("llm-foundry", "6.7B", H100, 128, 2048, 6, 1, 45.71, FSDP),
    Published("llm-foundry", "6.7B", H100, 256, 2048, 6, 1, 44.15, FSDP),
    Published("llm-foundry", "6.7B", H100, 512, 2048, 6, 1, 42.20, FSDP),
    Published("llm-foundry", "13B", H100, 8, 2048, 2, 1, 39.79, FSDP),
    Published("llm-foundry", "13B", H100, 64, 2048, 2, 1, 39.86, FSDP),
    Published("llm-foundry", "13B", H100, 512, 2048, 16, 1, 41.12, AGAIN),
    Published("llm-foundry", "65B", H100, 512, 2048, 8, 1, 41.25, AGAIN),
    Published("nanotron", "8.9B", H100, 8, 4096, 1, 128, 45.0, _nanotron(1, 4)),
    Published("nanotron", "8.9B", H100, 8, 4096, 1, 64, 45.0, _nanotron(1, 2), quoted=True),
    Published("nanotron", "8.9B", H100, 64, 4096, 1, 8, 40.0, _nanotron(1, 2)),
    Published("nanotron", "8.9B", H100, 256, 4096, 8, 1, 33.0, _nanotron(0, 1, 8), approximate=True),
    Published("nanotron", "8.9B", H100, 512, 4096, 2, 1, 19.0, _nanotron(0, 1, 4)),
    Published("nanotron", "8.9B", H100, 512, 4096, 1, 1, 19.0, _nanotron(1, 2), quoted=True),
    Published("nanotron", "3.6B", H100, 8, 4096, 2, 32, 46.5, _nanotron(1, 2), approximate=True),
    Published("nanotron", "3.6B", H100, 64, 4096, 1, 8, 35.7, _nanotron(1, 2), approximate=True),
    Published("llm-foundry", "355M", A100, 8, 1024, 64, 2, 50.51, FSDP, fitted=True),
    Published("llm-foundry", "760M", A100, 8, 2048, 24, 2, 56.85, FSDP),
    Published("llm-foundry", "1.3B", A100, 8, 1024, 18, 4, 60.15, FSDP),
    Published("llm-foundry", "2.7B", A100, 8, 2048, 10, 2, 62.11, FSDP),
    Published("llm-foundry", "6.7B", A100, 8, 2048, 6, 2, 64.23, FSDP, fitted=True),
    Published("llm-foundry", "13B", A100, 8, 1024, 40, 3, 59.48, AGAIN),
    Published("llm-foundry", "2.7B", A100_40, 64, 2048, 6, 1, 55.94, (*FSDP, *PURE)),
    Published("llm-foundry", "2.7B", A100_40, 128, 2048, 6, 1, 54.80, (*FSDP, *PURE)),
    Published("llm-foundry", "6.7B", A100_40, 128, 2048, 18, 1, 50.14, (*AGAIN, *PURE)),
]


def scale_table() -> list[str]:
    """Lines of markdown: every published run beside its simulation, and the errors of the held-out ones."""
    lines = [
        "| run | GPUs | T | micro-batch x number | layout | published MFU | simulated | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in PUBLISHED:
        simulated, _ = run.simulated()
        note = ", fitted" if run.fitted else ", as quoted" if run.quoted else ""
        published = f"{'~' * run.approximate}{run.mfu:.1f}%"
        lines.append(
            f"| {run.source} {run.model} | {run.ranks} {run.accelerator.name.removeprefix('NVIDIA ')} | "
            f"{run.positions} | {run.images} x {run.micro_batches} | {_layout(run)}{note} | {published} | "
            f"{simulated:.1f}% | {simulated / run.mfu - 1:+.1%} |"
        )
    errors = held_out_errors()
    mean = sum(map(abs, errors)) / len(errors)
    return [
        *lines,
        "",
        f"{len(errors)} runs that nothing was fitted to: mean error {mean:.1%}, from {min(errors):+.1%} to "
        f"{max(errors):+.1%}; {sum(abs(error) <= 0.1 for error in errors)} within 10%.",
    ]


def held_out_errors() -> list[float]:
    """Of the simulated MFU, as a fraction of the published one, of all runs but the fitted, each once."""
    return [run.simulated()[0] / run.mfu - 1 for run in PUBLISHED if not run.fitted and not run.quoted]


def _layout(run: Published) -> str:
    settings = dict(run.parallel)
    words = [f"ZeRO-{settings['zero_stage']}", f"{settings.get('stages')} stages" * (settings.get("stages", 1) > 1)]
    words += [f"tensor {settings.get('tensor')}" * (settings.get("tensor", 1) > 1)]
    words += ["recompute" * settings.get("recompute", False), "one gather" * (settings.get("gathers") == 1)]
    return ", ".join(word for word in words if word)


XL_RUNS = ((64, 64), (256, 64), (256, 256), (256, 1024), (1024, 64), (1024, 1024), (1024, 4096))
"""H100s and batches: the paper's batch, one image each, and four."""
XL_IMAGES = 128e6


def layouts_table(runs: tuple[tuple[int, int], ...] = XL_RUNS, best: int = 2) -> list[str]:
    """Lines of markdown: the fastest layouts of XL at 64x64 that fit on H100s with 80 GB, for each number and batch."""
    lines = [
        "| H100s | batch | layout | s a step | MFU | tokens/s a GPU | days for 128M images | of the step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ranks, images in runs:
        config = TrainConfig(
            model=ModelConfig(size="xl", resolution=64),
            batch=BatchConfig(global_size=images, micro_size=1),
            parallel=ParallelConfig(zero_stage=2),
            precision="bf16",
        )
        model, cluster = gpt2_config(config.model), Cluster(H100, ranks, 8, hardware_of(H100))
        layouts = [layout for layout in alternatives(config, model, cluster) if fits(layout, cluster)]
        for layout in sorted(layouts, key=lambda layout: layout.seconds)[:best]:
            lines.append(_xl_row(layout, model, ranks, images))
    return lines


def _xl_row(layout: Layout, model: GPT2Config, ranks: int, images: int) -> str:
    seconds, tokens = layout.seconds, images * model.n_positions
    shares = {name.replace("_", " "): part / seconds for name, part in layout.step.parts().items()}
    parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.01)
    return (
        f"| {ranks} | {images} | {layout.name()} | {seconds:.3f} | {mfu(model, tokens, seconds, ranks, H100):.1f}% | "
        f"{tokens / seconds / ranks:,.0f} | {XL_IMAGES / images * seconds / 86400:.1f} | {parts} |"
    )


def table(_: Path) -> Iterator[str]:
    """Published runs beside their simulation, then the fastest layouts of XL."""
    yield from scale_table()
    yield "\nThe fastest layouts of iGPT-XL at 64x64, estimated blocks\n"
    yield from layouts_table()
