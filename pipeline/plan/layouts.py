"""Layouts of a run on N accelerators: which fit, and how fast each would be, by a model that is stated and simple.

A step takes its FLOPs at the stated MFU, a third more where blocks are computed again, the pipeline's bubble, the wait
for its fullest stage, and the messages that nothing hides: tensor parallelism's inside a node, ZeRO's between nodes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import Literal

from transformers import GPT2Config

from pipeline import costs
from pipeline.config import TrainConfig
from pipeline.plan.memory import Memory, memory_of_rank

NODE_BYTES_A_SECOND = 450e9
"""Of one accelerator to its neighbours: NVLink 4, one direction, NVIDIA H100 data sheet."""
NETWORK_BYTES_A_SECOND = 50e9
"""Of one accelerator to other nodes: a 400 Gbit/s port each."""
MICRO_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Cluster:
    """What a run is planned for."""

    accelerator: costs.Accelerator
    ranks: int
    ranks_per_node: int
    mfu: float
    """Of computing alone: the fraction of the peak that matrix products and what lies between them reach."""

    @property
    def on_cpu(self) -> bool:
        """Whether the ranks are processes on CPUs, whose memory is no limit known here."""
        return self.accelerator.name == "CPU"


@dataclass(frozen=True)
class Layout:
    """A configuration whose batch divides, and what becomes of it."""

    config: TrainConfig
    memory: Memory
    seconds: float
    """Of one step."""
    bubble: float

    def name(self) -> str:
        """Its keys, as one reads them."""
        parallel = self.config.parallel
        words = [f"ZeRO-{parallel.zero_stage}", f"{parallel.pipeline_stages} stages" * (parallel.pipeline_stages > 1)]
        words += [f"tensor {parallel.tensor_parallel}" * (parallel.tensor_parallel > 1)]
        words += [f"micro {self.config.batch.micro_size}", "recompute" * parallel.recompute]
        words += [f"offload {parallel.offload}" * (parallel.offload != "none")]
        return ", ".join(word for word in words if word)

    def overrides(self) -> str:
        """To copy onto a command line."""
        keys = ("zero_stage", "pipeline_stages", "tensor_parallel", "recompute", "offload")
        words = [f"--parallel.{key} {str(getattr(self.config.parallel, key)).lower()}" for key in keys]
        return " ".join([*words, f"--batch.micro_size {self.config.batch.micro_size}"])


def lay_out(config: TrainConfig, model: GPT2Config, cluster: Cluster) -> Layout:
    """What becomes of a configuration. Raises ValueError naming the key if ranks or batch do not divide."""
    data_ranks = config.parallel.data_ranks(cluster.ranks)
    micro_batches = config.accumulation_steps(data_ranks)
    if model.n_layer < config.parallel.pipeline_stages:
        raise ValueError(
            f"parallel.pipeline_stages is {config.parallel.pipeline_stages}; it must be at most the model's blocks, "
            f"{model.n_layer}."
        )
    if model.n_head % config.parallel.tensor_parallel:
        raise ValueError(
            f"parallel.tensor_parallel is {config.parallel.tensor_parallel}; it must divide the model's heads, "
            f"{model.n_head}."
        )
    stages = config.parallel.pipeline_stages
    bubble = costs.bubble(stages, micro_batches)
    memory = memory_of_rank(config, model, cluster.ranks, cluster.on_cpu)
    return Layout(config, memory, _seconds(config, model, cluster, data_ranks, micro_batches, bubble), bubble)


def fits(layout: Layout, cluster: Cluster) -> bool:
    """Whether the peak is below the accelerator's memory."""
    return layout.memory.peak <= cluster.accelerator.memory_bytes


def alternatives(config: TrainConfig, model: GPT2Config, cluster: Cluster) -> Iterator[Layout]:
    """All layouts of the same run whose numbers divide; offloading only with ZeRO-3."""
    powers = [2**power for power in range(11)]
    zero_stages: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
    offloads: tuple[Literal["none", "optimizer"], ...] = ("none", "optimizer")
    for stage, stages, parts, micro, recompute, offload in product(
        zero_stages, powers, powers, MICRO_SIZES, (False, True), offloads
    ):
        if parts > cluster.ranks_per_node or (offload != "none" and stage != 3):
            continue
        try:
            parallel = replace(
                config.parallel,
                zero_stage=stage,
                pipeline_stages=stages,
                tensor_parallel=parts,
                recompute=recompute,
                offload=offload,
            )
            changed = replace(config, parallel=parallel, batch=replace(config.batch, micro_size=micro))
            yield lay_out(changed, model, cluster)
        except ValueError:
            continue


def _seconds(
    config: TrainConfig, model: GPT2Config, cluster: Cluster, data_ranks: int, micro_batches: int, bubble: float
) -> float:
    parallel, parameters = config.parallel, costs.parameter_count(model) / config.parallel.model_ranks
    tokens = config.batch.global_size * model.n_positions
    computing = tokens * costs.flops_per_token(model) * (4 / 3 if parallel.recompute else 1)
    stages = parallel.pipeline_stages
    fullest = (
        ceil(model.n_layer / stages) * stages / model.n_layer
    )  # the other stages wait for the one with most blocks
    seconds = fullest * computing / (cluster.accelerator.bf16_flops * cluster.mfu * cluster.ranks) / (1 - bubble)
    width = 4 if config.precision == "fp32" else 2
    stream = config.batch.micro_size * model.n_positions * model.n_embd * width
    if parallel.tensor_parallel > 1:
        rounds = 6 if parallel.recompute else 4  # all-reduces of a block: two forward, two backward
        sent = 2 * (parallel.tensor_parallel - 1) / parallel.tensor_parallel * stream * rounds
        seconds += micro_batches * model.n_layer * sent / NODE_BYTES_A_SECOND
    one_node = cluster.ranks <= cluster.ranks_per_node
    speed = NODE_BYTES_A_SECOND if one_node else NETWORK_BYTES_A_SECOND
    spread = (data_ranks - 1) / data_ranks
    exchanged = parameters * (4 + width) * spread  # gradients there, weights back, once a step
    if parallel.zero_stage == 3:
        # Whole weights for the forward and the backward pass of each micro-batch; half of it hidden behind computing.
        exchanged = parameters * spread * (4 + micro_batches * 2 * width / 2)
    seconds += exchanged / speed
    if parallel.offload != "none":
        seconds += parameters * 16 / data_ranks / 25e9  # over PCIe 4, and Adam on the host
    return seconds
