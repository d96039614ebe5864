"""The simulator of `plan` against published runs, and its layouts for XL: make bench PARTS=scale

Arithmetic: nothing is measured here. published_runs.py has the runs, their sources, and what MFU means.
"""

from collections.abc import Iterator
from pathlib import Path

from transformers import GPT2Config

from pipeline.config import BatchConfig, ModelConfig, ParallelConfig, TrainConfig
from pipeline.model.gpt_config import gpt2_config
from pipeline.plan.hardware import hardware_of
from pipeline.plan.layouts import Cluster, Layout, alternatives, fits
from tests.benchmarks.published_runs import H100, PUBLISHED, Published, mfu


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
    return [*lines, "", *(_errors(runs, held_out_errors(runs)) for runs in (False, True))]


def _errors(is_3d: bool, errors: list[float]) -> str:
    what = "with stages and tensor parallelism" if is_3d else "without both"
    mean = sum(map(abs, errors)) / len(errors)
    near, nearer = (sum(abs(error) <= limit for error in errors) for limit in (0.15, 0.1))
    return (
        f"{len(errors)} runs {what} that nothing was fitted to: mean error {mean:.1%}, from {min(errors):+.1%} to "
        f"{max(errors):+.1%}; {nearer} within 10%, {near} within 15%."
    )


def held_out_errors(is_3d: bool) -> list[float]:
    """Of the simulated MFU, as a fraction of the published one, of all runs but the fitted, each once."""
    held_out = [run for run in PUBLISHED if run.is_3d == is_3d and not run.fitted and not run.quoted]
    return [run.simulated()[0] / run.mfu - 1 for run in held_out]


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
