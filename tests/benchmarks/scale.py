"""The simulator of `plan` against published runs, and its layouts for XL: make bench PARTS=scale

Arithmetic: nothing is measured here. published_runs.py has the runs, their sources, and what MFU means.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

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


XL_RUNS = tuple(product((64, 256, 1024), (64, 256, 1024)))
"""H100s and batches; 64 is the paper's batch."""
XL_IMAGES = 128e6


def layouts_table(runs: Sequence[tuple[int, int]] = XL_RUNS) -> list[str]:
    """Lines of markdown: the fastest layout of XL at 64x64 that fits on H100s of 80 GB, for each number and batch.

    Beside it the fastest without sequence parallelism that does not combine stages and tensor parallelism.
    """
    lines = [
        "| H100s | batch | alone | MFU | combined | MFU | s a step | days for 128M images | of the step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks, images in runs:
        alone, best = (_fastest(ranks, images, combined) for combined in (False, True))
        parts = best.step.parts().items()
        shares = [f"{name.replace('_', ' ')} {part / best.seconds:.0%}" for name, part in parts]
        cells = [ranks, images, alone.name(), _mfu(alone, ranks), best.name(), _mfu(best, ranks), f"{best.seconds:.3f}"]
        cells += [f"{XL_IMAGES / images * best.seconds / 86400:.1f}", ", ".join(shares)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _fastest(ranks: int, images: int, combined: bool) -> Layout:
    config = TrainConfig(
        model=ModelConfig(size="xl", resolution=64),
        batch=BatchConfig(global_size=images, micro_size=1),
        parallel=ParallelConfig(zero_stage=2, sequence_parallel=combined),
        precision="bf16",
    )
    cluster = Cluster(H100, ranks, 8, hardware_of(H100))
    layouts = alternatives(config, gpt2_config(config.model), cluster)
    parallel = ((layout, layout.config.parallel) for layout in layouts if fits(layout, cluster))
    chosen = (one for one, two in parallel if combined or 1 in (two.pipeline_stages, two.tensor_parallel))
    return min(chosen, key=lambda layout: layout.seconds)


def _mfu(layout: Layout, ranks: int) -> str:
    model = gpt2_config(layout.config.model)
    tokens = layout.config.batch.global_size * model.n_positions
    return f"{mfu(model, tokens, layout.seconds, ranks, H100):.1f}%"


def table(_: Path) -> Iterator[str]:
    """Published runs beside their simulation, then the fastest layouts of XL."""
    yield from scale_table()
    yield "\nThe fastest layouts of iGPT-XL at 64x64, with estimated blocks. Alone: without sequence parallelism, and"
    yield "not with stages and tensor parallelism together.\n"
    yield from layouts_table()
