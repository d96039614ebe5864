"""python -m pipeline plan: estimates a run's memory and time on N accelerators, and the layouts that fit."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.common.command_line import fill, new_parser, parse, value_of
from data_prep.common.files import write_json
from pipeline import costs
from pipeline.command_line import with_one_kind_of_data
from pipeline.config import TrainConfig
from pipeline.plan.block_times import MEASURED_PRECISION, BlockTimes, read_block_times
from pipeline.plan.hardware import CPU, hardware_of
from pipeline.plan.layouts import Cluster, Layout, alternatives, fits, lay_out
from pipeline.plan.snapshot import snapshot_bytes
from pipeline.training_set import TrainingSets, open_training_sets
from pipeline.value_checks import require_at_least, require_positive

DISK_BYTES_A_SECOND = 1e9
HOST_COPY_BYTES_A_SECOND = 20e9
PROPOSED = 6
"""Number of layouts to list."""


def plan_command(arguments: list[str]) -> int:
    """Prints the plan. Returns 0 if the configured layout fits, 1 if not. Raises ValueError naming a wrong key."""
    named = value_of("--accelerator", arguments)
    if named is not None:
        _accelerator(named)  # checked before parsing, which takes a second
    parser = new_parser(
        "python -m pipeline plan", "Estimate memory, time and layouts of a run on N accelerators. Needs no accelerator."
    )
    parser.add_argument("--config", action="config", help="A YAML file with the keys below; see configs/.")
    parser.add_argument("--accelerator", type=str, required=True, help=f"One of {', '.join(costs.ACCELERATORS)}, cpu.")
    parser.add_argument("--ranks", type=int, required=True, help="Total number of accelerators.")
    parser.add_argument("--ranks_per_node", type=int, default=8, help="Accelerators in each node.")
    parser.add_argument(
        "--block_times",
        type=str,
        default=None,
        help="A JSON file of block times measured on the accelerator; pipeline/plan/README.md describes it.",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=None,
        help="Instead of block times: the MFU (0 to 1) of computing without communication.",
    )
    for link, where in (("node", "inside a node"), ("network", "between nodes")):
        parser.add_argument(
            f"--{link}_gb_per_second",
            type=float,
            default=None,
            help=f"Measured bandwidth of an accelerator {where}, GB/s; by default from a table.",
        )
    parser.add_argument("--json", type=str, default=None, help="Also write the plan to this JSON file.")
    parser.add_class_arguments(TrainConfig)
    parsed = parse(parser, with_one_kind_of_data(arguments))
    config, cluster = fill(TrainConfig, parsed), _cluster(parsed)
    if cluster.block_times and config.precision != MEASURED_PRECISION:
        raise ValueError(
            f"--block_times has blocks measured in {MEASURED_PRECISION}, but precision is {config.precision}; omit "
            f"--block_times, or use --mfu."
        )
    if config.precision == "fp8" and not (cluster.accelerator.float8 or cluster.on_cpu):
        raise ValueError(f"precision is fp8, but {cluster.accelerator.name} has no float8 products; it must be bf16.")
    return _plan(config, cluster, parsed.json)


def _cluster(parsed: Any) -> Cluster:
    for key in ("ranks", "ranks_per_node"):
        require_at_least(f"--{key}", parsed[key], 1)
    for key in ("node_gb_per_second", "network_gb_per_second"):
        if parsed[key] is not None:
            require_positive(f"--{key}", parsed[key])
    if parsed.mfu is not None and not 0 < parsed.mfu <= 1:
        raise ValueError(f"--mfu is {parsed.mfu}; it must be above 0 and at most 1.")
    if parsed.mfu is not None and parsed.block_times is not None:
        raise ValueError("--mfu and --block_times exclude each other; omit one.")
    accelerator = _accelerator(parsed.accelerator)
    times = _times(parsed.block_times, accelerator) if parsed.block_times is not None else None
    hardware = hardware_of(accelerator).with_links(parsed.node_gb_per_second, parsed.network_gb_per_second)
    return Cluster(accelerator, parsed.ranks, parsed.ranks_per_node, hardware, parsed.mfu, times)


def _times(path: str, accelerator: costs.Accelerator) -> BlockTimes:
    times = read_block_times(path)
    if (costs.find_accelerator(times.device) or CPU) is not accelerator:
        raise ValueError(
            f"{path} was measured on {times.device!r}; it must be measured on --accelerator, {accelerator.name}."
        )
    return times


def _accelerator(name: str) -> costs.Accelerator:
    if name == "cpu":
        return CPU
    if name not in costs.ACCELERATORS:
        raise ValueError(f"--accelerator is {name!r}; it must be one of {', '.join(costs.ACCELERATORS)}, cpu.")
    return costs.ACCELERATORS[name]


def _plan(config: TrainConfig, cluster: Cluster, json: str | None) -> int:
    from pipeline.model.gpt_config import gpt2_config

    sets = open_training_sets(config) if config.data.paths else None
    model = gpt2_config(config.model, sets.colors if sets else 512, config.objective.kind)
    layouts = sorted(alternatives(config, model, cluster), key=lambda layout: layout.seconds)
    chosen = _chosen(config, model, cluster, layouts)
    data_ranks = config.parallel.data_ranks(cluster.ranks)
    facts = {
        **_model_facts(config, model, cluster, chosen, sets),
        "ranks": config.parallel.describe(cluster.ranks),
        "layout": chosen.name(),
        "micro-batches": f"{config.batch.accumulation_steps(data_ranks)} per step and rank",
        "bubble": f"{chosen.bubble:.1%} of the step, without communication",
    }
    _print_facts(facts)
    print("\nstep time, s")
    _print_facts({part.replace("_", " "): f"{seconds:8.3f}" for part, seconds in chosen.step.parts().items()})
    print("\nmemory of the rank with the highest peak, GB")
    _print_facts({part: f"{size / 1e9:8.2f}" for part, size in chosen.memory.peak_parts.items() if size})
    limit = cluster.accelerator.memory_bytes / 1e9
    of = "" if cluster.on_cpu else f" of {limit:g} GB"
    fragmentation = f"x {chosen.memory.fragmentation:g} for fragmentation = " if chosen.memory.fragmentation > 1 else ""
    print(f"  total {fragmentation}{chosen.memory.peak / 1e9:.2f} GB{of}")
    if not cluster.on_cpu:
        _print_layouts(layouts, model, cluster)
    if json is not None:
        write_json(Path(json), {"facts": facts, "chosen": _as_json(chosen), "layouts": list(map(_as_json, layouts))})
    if fits(chosen, cluster):
        return 0
    better = next((layout for layout in layouts if fits(layout, cluster)), None)
    advice = f"use {better.overrides()}" if better else "no layout fits; use more ranks"
    print(
        f"\nthe configured layout needs {chosen.memory.peak / 1e9:.1f} GB per rank, and {cluster.accelerator.name} has "
        f"{limit:g} GB: {advice}."
    )
    return 1


def _chosen(config: TrainConfig, model: Any, cluster: Cluster, layouts: list[Layout]) -> Layout:
    """The configured layout. If ranks or batch do not divide, those that do are printed; the error names one."""
    try:
        return lay_out(config, model, cluster)
    except ValueError as error:
        better = next((layout for layout in layouts if fits(layout, cluster)), None)
        if better is None:
            raise
        if not cluster.on_cpu:
            _print_layouts(layouts, model, cluster)
            sys.stdout.flush()  # before the error, which is written to another stream
        raise ValueError(f"{error} The fastest layout that divides and fits is {better.overrides()}.") from error


def _model_facts(
    config: TrainConfig, model: Any, cluster: Cluster, chosen: Layout, sets: TrainingSets | None
) -> dict[str, str]:
    parameters, per_token = costs.parameter_count(model), costs.flops_per_token(model)
    images = config.batch.images_after(config.schedule.steps)
    flops, peak = images * model.n_positions * per_token, cluster.accelerator.bf16_flops
    tokens = config.batch.global_size * model.n_positions
    hours = chosen.seconds * images / config.batch.global_size / 3600
    size = parameters * costs.state_bytes(config.ema.decay)
    own, pinned = size / cluster.ranks, not cluster.on_cpu
    kept = snapshot_bytes(config, model, cluster.ranks, pinned)
    epochs = f", {_epochs(images, sets)}" if sets else ""
    return {
        "model": f"{parameters:,} parameters: {model.n_layer} layers, width {model.n_embd}, {model.n_head} heads, "
        f"{model.n_positions} positions, {config.precision}",
        "compute": f"{per_token / 1e9:.3g} GFLOP a token, {flops:.3g} FLOP in total (6 x matmul parameters + 12 x "
        f"layers x tokens x width)",
        "data": f"{images:,} images{epochs}; {images * model.n_positions * 2 / 1e12:.3g} TB read as tokens",
        "time": f"{chosen.seconds:.3f} s per step, {hours / 24:.1f} days, "
        f"{hours * cluster.ranks:,.0f} accelerator-hours on {cluster.ranks} x {cluster.accelerator.name}; "
        f"simulated, with blocks {_blocks(config, cluster)}",
        "speed": f"{tokens / chosen.seconds / cluster.ranks:,.0f} tokens/s per accelerator, "
        f"{_mfu(chosen, model, cluster):.1%} MFU of {peak / 1e12:g} TFLOP/s (dense bf16)",
        "checkpoint": f"{size / 1e9:.1f} GB, {own / 1e9:.2f} GB from each rank, which keeps {kept / 1e9:.2f} GB of "
        f"{'pinned ' * pinned}host memory for it ({kept * min(cluster.ranks, cluster.ranks_per_node) / 1e9:.1f} GB a "
        f"node); training waits {own / HOST_COPY_BYTES_A_SECOND:.2f} s for the copy (at 20 GB/s), or "
        f"{own / DISK_BYTES_A_SECOND:.1f} s for the disk if not asynchronous (at 1 GB/s)",
    }


def _epochs(images: int, sets: TrainingSets) -> str:
    """Of a single set, or of each set of a mixture with its share of the images."""
    counts = [one.shards.split("train").images for one in sets.sets]
    epochs = [f"{images * one.weight / n:.1f} epochs of {n:,}" for one, n in zip(sets.sets, counts, strict=True)]
    if not sets.is_mixture:
        return epochs[0]
    return "; ".join(f"{one.name} {one.weight:.1%}, {text}" for one, text in zip(sets.sets, epochs, strict=True))


def _blocks(config: TrainConfig, cluster: Cluster) -> str:
    if cluster.block_times:
        return f"measured on {cluster.block_times.device}"
    if cluster.mfu is not None:
        return f"at {cluster.mfu:.0%} of the peak (--mfu)"
    as_bf16 = " as under bf16" if config.precision == "fp8" else ""
    return f"estimated{as_bf16} (--block_times or --mfu are more accurate)"


def _print_facts(facts: dict[str, str]) -> None:
    width = max(map(len, facts))
    print("\n".join(f"  {key:<{width}}  {text}" for key, text in facts.items()))


def _print_layouts(layouts: list[Layout], model: Any, cluster: Cluster) -> None:
    """The fastest layouts that fit, and faster ones that don't, with the largest part of their memory."""
    fitting = [layout for layout in layouts if fits(layout, cluster)]
    print("\nlayouts that fit, by estimated speed")
    for layout in fitting[:PROPOSED]:
        print(f"{_cost(layout)}  bubble {layout.bubble:5.1%}  {_mfu(layout, model, cluster):5.1%} MFU  {layout.name()}")
    best = fitting[0].seconds if fitting else float("inf")
    too_large = [layout for layout in layouts if not fits(layout, cluster) and layout.seconds < best]
    if too_large or not fitting:
        print("faster layouts that do not fit" if fitting else "none; those with the lowest peak")
        nearest = sorted(too_large or layouts, key=lambda layout: layout.memory.peak)
        for layout in nearest[:PROPOSED]:
            part, size = max(layout.memory.peak_parts.items(), key=lambda item: item[1])
            print(f"{_cost(layout)}  {layout.name()}: {size / 1e9:.1f} GB of {part}")


def _mfu(layout: Layout, model: Any, cluster: Cluster) -> float:
    """A fraction of the peak."""
    flops = layout.config.batch.global_size * model.n_positions * costs.flops_per_token(model)
    return flops / (layout.seconds * cluster.ranks * cluster.accelerator.bf16_flops)


def _cost(layout: Layout) -> str:
    return f"  {layout.seconds:8.3f} s per step  {layout.memory.peak / 1e9:6.1f} GB"


def _as_json(layout: Layout) -> dict[str, Any]:
    return {
        "name": layout.name(),
        "overrides": layout.overrides(),
        "seconds": layout.seconds,
        "step": vars(layout.step),
        "bubble": layout.bubble,
        "peak_bytes": layout.memory.peak,
        "parts": layout.memory.peak_parts,
        "parallel": asdict(layout.config.parallel),
        "micro_size": layout.config.batch.micro_size,
    }
