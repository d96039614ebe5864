"""The peak memory of a rank by formula, divided into parts.

DeepSpeed 0.19.8's buffers were taken from its source and compared with runs on CPU (tests/benchmarks/memory.py). A test
counts what autograd saves. Nothing was measured on an accelerator. Letters: B images of a micro-batch, T positions, D
width, V colors, L layers; P parameters that a rank computes with, whose optimizer state is divided over `ranks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline import costs
from pipeline.config import TrainConfig

if TYPE_CHECKING:
    from transformers import GPT2Config

REDUCE_BUCKET = 200_000_000
"""Elements of a bucket of gradients under ZeRO-2 and 3 (deepspeed_config.py)."""
GATHER_BUCKET = 500_000_000
"""Elements of weights that ZeRO-1 and 2 gather at a time: DeepSpeed's default (allgather_bucket_size)."""
LIVE_PARAMETERS = 1_000_000_000
"""Maximum number of elements of gathered weights under ZeRO-3, by default."""
FIXED_BYTES = {"cpu": 64e6, "accelerator": 2e9}
"""Memory of libraries: measured on CPU; on an accelerator an allowance for its context and NCCL."""
FRAGMENTATION = {"cpu": 1.0, "accelerator": 1.05}
"""Factor for the allocator's fragmentation: an allowance on an accelerator."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by part: allocated all the time, and in three phases, the largest of which is the peak.

    In the backward pass activations are freed while gradients are allocated, so its maximum is at its start or end.
    """

    always: dict[str, float] = field(default_factory=dict)
    forward: dict[str, float] = field(default_factory=dict)
    """At the end of the forward pass, before the first gradient."""
    backward: dict[str, float] = field(default_factory=dict)
    """At the end of the backward pass, after the last gradient."""
    update: dict[str, float] = field(default_factory=dict)
    fragmentation: float = 1.0

    @property
    def peak_parts(self) -> dict[str, float]:
        """Bytes by part at the peak."""
        phases = (self.forward, self.backward, self.update)
        return self.always | max(phases, key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> float:
        """Bytes at the peak."""
        return sum(self.peak_parts.values()) * self.fragmentation


def memory_of_rank(config: TrainConfig, model: GPT2Config, ranks: int, on_cpu: bool) -> Memory:
    """The memory of the rank that needs the most, over all pipeline stages."""
    stages = range(config.parallel.pipeline_stages)
    return max((_of_stage(config, model, ranks, on_cpu, stage) for stage in stages), key=lambda memory: memory.peak)


def _of_stage(config: TrainConfig, model: GPT2Config, ranks: int, on_cpu: bool, stage: int) -> Memory:
    parallel, is_last = config.parallel, stage == config.parallel.pipeline_stages - 1
    blocks = blocks_of_stage(model.n_layer, parallel.pipeline_stages, stage)
    held = _held_parameters(config, model, blocks, stage == 0, is_last)
    kind = "cpu" if on_cpu else "accelerator"
    always, backward, update = _state(config, held, parallel.data_ranks(ranks), on_cpu)
    always["libraries"] = FIXED_BYTES[kind]
    if config.ema.decay and (on_cpu or parallel.offload == "none"):
        always["averaged weights"] = 4 * held / (parallel.data_ranks(ranks) if parallel.zero_stage else 1)
    saved = saved_bytes(config, model, on_cpu)
    micro_batches = config.batch.accumulation_steps(parallel.data_ranks(ranks))
    in_flight = min(parallel.pipeline_stages - stage, micro_batches)
    width = 4 if config.precision == "fp32" else 2
    one_stream = config.batch.micro_size * model.n_positions * model.n_embd * width / _position_parts(config)
    per_block = one_stream if parallel.recompute else saved
    forward = {"activations": in_flight * blocks * per_block + (saved if parallel.recompute else 0.0)}
    if is_last:
        scores = config.batch.micro_size * model.n_positions * model.colors * 4
        forward["logits and loss"] = (3 if width == 4 else 4.5) * scores
    if parallel.pipeline_stages > 1:
        forward["stages' messages"] = 2 * in_flight * one_stream
    if parallel.zero_stage == 3:
        forward["whole weights"] = backward["whole weights"]
    if micro_batches > 1:  # the gradients of earlier micro-batches exist already
        forward |= {part: size for part, size in backward.items() if part.endswith("gradients")}
    backward["activations"] = saved  # of the first block
    if config.precision == "fp8":
        forward["float8 copies"] = backward["float8 copies"] = float8_bytes(config, model)
    return Memory(always, forward, backward, update, FRAGMENTATION[kind])


def saved_bytes(config: TrainConfig, model: GPT2Config, on_cpu: bool) -> float:
    """Bytes that autograd saves for one block and a micro-batch.

    In tensors of B * T * D: the inputs of three of the four matrix products (3), queries, keys and values (3), the
    input of the fourth product (4), intermediate values of the activation function (8, or 16 for GPT-2's), the inputs
    of the two norms (2). On CPU an RMSNorm consists of small operations, which save twice as much, in fp32. Tensor
    parallelism splits the tensors inside the attention (4) and the MLP; with sequence parallelism the others too.
    """
    stream = config.batch.micro_size * model.n_positions * model.n_embd
    width = 4 if config.precision == "fp32" else 2
    parts = config.parallel.tensor_parallel
    inside = 8 + (8 if model.block == "igpt" else 16)
    norms = 4 * 4 if on_cpu and model.block == "igpt" else 2 * width
    outside = stream * (norms + 2 * width)
    return outside / _position_parts(config) + stream * width * inside / parts


def _position_parts(config: TrainConfig) -> int:
    """The number of ranks that norms and residuals are divided over."""
    return config.parallel.tensor_parallel if config.parallel.sequence_parallel else 1


def float8_bytes(config: TrainConfig, model: GPT2Config) -> float:
    """Approximate bytes of float8 copies while one product is computed; autograd does not save them. Not measured.

    The operands of the largest product, c_proj of the MLP, in its backward pass: tensors of B * T * D (1 + 4) and a
    matrix of 4 * D^2, one byte per element, each twice because the second product needs another memory layout.
    """
    stream = config.batch.micro_size * model.n_positions * model.n_embd
    return 2.0 * (5 * stream + 4 * model.n_embd**2)


def blocks_of_stage(layers: int, stages: int, stage: int) -> int:
    """Number of blocks of a stage; DeepSpeed gives the first stages one block more if they don't divide evenly."""
    return layers // stages + (1 if stage < layers % stages else 0)


def _held_parameters(config: TrainConfig, model: GPT2Config, blocks: int, first: bool, last: bool) -> float:
    """P: parameters of a rank's blocks, split by tensor parallelism, and of embeddings and head on their stages."""
    head = model.n_embd * costs.head_rows(model)
    in_blocks = costs.matmul_parameters(model) - head
    held = in_blocks * blocks / model.n_layer / config.parallel.tensor_parallel
    held += (model.vocab_size + model.n_positions) * model.n_embd if first else 0
    return held + (head if last else 0)


State = tuple[dict[str, float], dict[str, float], dict[str, float]]
"""Bytes by part: allocated all the time, at the end of the backward pass, and in the update."""


def _state(config: TrainConfig, held: float, ranks: int, on_cpu: bool) -> State:
    """Weights, gradients and optimizer state of P parameters, with the state divided over `ranks`."""
    stage, fp32 = config.parallel.zero_stage, config.precision == "fp32"
    offloaded = config.parallel.offload != "none"
    width = 4 if fp32 else 2
    if stage == 0:
        return _without_zero(held, fp32)
    always = {
        "weights": width * held / (ranks if stage == 3 else 1),
        "fp32 weights": 0.0 if offloaded and not on_cpu else 4 * held / ranks,
        "moments": 0.0 if offloaded and not on_cpu else 8 * held / ranks,
    }
    if config.parallel.offload == "parameters" and not on_cpu:
        always["weights"] = 0.0
    if stage == 3:
        return _stage_3(always, held, ranks, width, on_cpu)
    if stage == 1 and not fp32 and not offloaded:  # DeepSpeed's BF16_Optimizer
        always["gradients"] = 4 * held
        # Each gradient in bf16 is added to those in fp32 and freed at once; these are sent in place, or as bf16.
        return always, {}, {"gradients as they are sent": 2 * held if config.parallel.communication == "bf16" else 0.0}
    bucket = min(held, REDUCE_BUCKET) if on_cpu else REDUCE_BUCKET
    backward = {
        "gradients": width * (held if stage == 1 else min(held, REDUCE_BUCKET)),
        # On an accelerator one bucket is filled while the other is sent, in fp32 to one owner after the other.
        "buckets": width * bucket * (1 if on_cpu else 2) + (0 if fp32 else 4 * min(held, REDUCE_BUCKET) / ranks),
        "own gradients": 0.0 if fp32 else 4 * held / ranks,
    }
    return always, backward, {"own gradients": 8 * held / ranks}


def _without_zero(held: float, fp32: bool) -> State:
    """ZeRO-0: every rank holds everything. With bf16, autocast caches bf16 weights until the backward pass ends."""
    always = {"weights": 4 * held, "moments": 8 * held}
    gradients = {"gradients": 4 * held}
    return always, gradients | ({} if fp32 else {"bf16 weights": 2 * held}), gradients


def _stage_3(always: dict[str, float], held: float, ranks: int, width: int, on_cpu: bool) -> State:
    """ZeRO-3: gathered weights and gradients of a few blocks at a time, in addition to the rank's own partition."""
    bucket = min(held, REDUCE_BUCKET)
    always["own gradients"] = 4 * held / ranks
    always["buckets"] = 4 * (bucket if on_cpu else REDUCE_BUCKET)
    backward = {"whole weights": width * min(held, LIVE_PARAMETERS), "gradients": width * bucket + 4 * bucket}
    return always, backward, {}
