"""Layouts of a run on N accelerators: their memory (memory.py) and step time (simulator.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from pipeline import costs
from pipeline.config import TrainConfig
from pipeline.plan.block_times import BlockTimes, estimated, measured, product_seconds
from pipeline.plan.hardware import Hardware
from pipeline.plan.memory import Memory, memory_of_rank
from pipeline.plan.passes import passes_of
from pipeline.plan.simulator import StepTime, Work, simulate

if TYPE_CHECKING:
    from transformers import GPT2Config


@dataclass(frozen=True)
class Cluster:
    """The cluster that a run is planned for."""

    accelerator: costs.Accelerator
    ranks: int
    ranks_per_node: int
    hardware: Hardware
    mfu: float | None = None
    """MFU of computing alone, without communication and bubbles; None to estimate blocks."""
    block_times: BlockTimes | None = None
    """Measured block times; without them and mfu, blocks are estimated."""

    @property
    def on_cpu(self) -> bool:
        """Whether the ranks are processes on CPUs, whose memory limit is unknown."""
        return self.accelerator.name == "CPU"


@dataclass(frozen=True)
class Layout:
    """A configuration whose sizes divide, with its estimated memory and step time."""

    config: TrainConfig
    memory: Memory
    step: StepTime
    """The simulated step."""
    bubble: float
    """The fraction of a step in which a stage is idle, if all stages take equally long."""

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.step.seconds

    def name(self) -> str:
        """A short description, such as "ZeRO-1, 2 stages, micro 4"."""
        parallel = self.config.parallel
        words = [f"ZeRO-{parallel.zero_stage}", f"{parallel.pipeline_stages} stages" * (parallel.pipeline_stages > 1)]
        words += [f"tensor {parallel.tensor_parallel}" * (parallel.tensor_parallel > 1)]
        words += [f"micro {self.config.batch.micro_size}", "recompute" * parallel.recompute]
        words += [f"offload {parallel.offload}" * (parallel.offload != "none")]
        return ", ".join(word for word in words if word)

    def overrides(self, beyond: TrainConfig | None = None) -> str:
        """The options of the layout, to copy to a command line; with `beyond`, only those that differ from it."""
        keys = ("zero_stage", "pipeline_stages", "tensor_parallel", "sequence_parallel", "recompute", "offload")
        own, other = (
            {f"--parallel.{key}": getattr(config.parallel, key) for key in keys}
            | {"--batch.micro_size": config.batch.micro_size}
            for config in (self.config, beyond or self.config)
        )
        chosen = {option: value for option, value in own.items() if beyond is None or value != other[option]}
        return " ".join(f"{option} {str(value).lower()}" for option, value in chosen.items())


def lay_out(config: TrainConfig, model: GPT2Config, cluster: Cluster) -> Layout:
    """Estimates a configuration. Raises ValueError naming the key if ranks, batch or model do not divide."""
    data_ranks = config.parallel.data_ranks(cluster.ranks)
    micro_batches = config.batch.accumulation_steps(data_ranks)
    config.parallel.check_model(model.n_layer, model.n_head, model.n_positions)
    bubble = costs.bubble(config.parallel.pipeline_stages, micro_batches)
    memory = memory_of_rank(config, model, cluster.ranks, cluster.on_cpu)
    work = work_of(config, model, cluster, data_ranks, micro_batches)
    return Layout(config, memory, simulate(work, cluster.hardware.links), bubble)


def fits(layout: Layout, cluster: Cluster) -> bool:
    """Whether the peak is at most the accelerator's memory."""
    return layout.memory.peak <= cluster.accelerator.memory_bytes


def alternatives(config: TrainConfig, model: GPT2Config, cluster: Cluster) -> Iterator[Layout]:
    """All layouts of the same run whose sizes divide; with offloading only under ZeRO-3."""
    divisors = [number for number in range(1, cluster.ranks + 1) if cluster.ranks % number == 0]
    choices: dict[str, Sequence[Any]] = {
        "zero_stage": (1, 2, 3),
        "pipeline_stages": divisors,
        "tensor_parallel": [parts for parts in divisors if parts <= cluster.ranks_per_node],
        "micro_size": (1, 2, 4, 8, 16, 32),
        "recompute": (False, True),
        "offload": ("none", "optimizer"),
    }
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        batch = replace(config.batch, micro_size=chosen.pop("micro_size"))
        if chosen["offload"] == "none" or chosen["zero_stage"] == 3:
            with suppress(ValueError):
                yield lay_out(replace(config, parallel=replace(config.parallel, **chosen), batch=batch), model, cluster)


def work_of(config: TrainConfig, model: GPT2Config, cluster: Cluster, data_ranks: int, micro_batches: int) -> Work:
    """The simulator's description of a run's step."""
    if cluster.block_times:
        seconds = measured(cluster.block_times, config, model)
    else:
        seconds = estimated(config, model, cluster.accelerator.bf16_flops, cluster.hardware, cluster.mfu)
    parallel, width, passes = config.parallel, 4 if config.precision == "fp32" else 2, passes_of(config)
    outer = (model.vocab_size + model.n_positions + costs.head_rows(model)) * model.n_embd
    return Work(
        layers=model.n_layer,
        micro_batches=micro_batches,
        forward=seconds.forward,
        backward=seconds.backward,
        head_forward=seconds.head_forward,
        head_backward=seconds.head_backward,
        update=seconds.byte * (passes.owned + micro_batches * passes.micro_batch_owned),
        update_replicated=seconds.byte * (passes.step + micro_batches * passes.micro_batch),
        block_parameters=(costs.parameter_count(model) - outer) / model.n_layer,
        outer_parameters=outer,
        product_seconds=product_seconds(seconds.backward, model),
        norm_bytes=float(model.n_embd * width),
        norm_parameters=2 if model.block == "igpt" else 4,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_parallel > 1,
        stream_bytes=float(config.batch.micro_size * model.n_positions * model.n_embd * width),
        weight_bytes=width,
        gradient_bytes=2 if parallel.communication == "bf16" else 4,
        sums_everywhere=parallel.zero_stage == 1 and config.precision != "fp32" and parallel.offload == "none",
        recompute=parallel.recompute,
        zero_stage=parallel.zero_stage,
        stages=parallel.pipeline_stages,
        tensor=parallel.tensor_parallel,
        data=data_ranks,
        ranks_per_node=cluster.ranks_per_node,
        offloads=parallel.offload != "none",
    )
