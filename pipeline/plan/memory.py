"""The peak memory of a rank, part by part, by formula.

What DeepSpeed 0.19.8 holds was read in its optimizers and compared with runs on CPU (tests/benchmarks/memory.py); what
autograd saves is counted again by a test. Nothing here was measured on an accelerator. Letters: B images of a
micro-batch, T positions, D width, V colours, L layers; P parameters that a rank computes with, of `ranks` that share
their optimizer state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline import costs
from pipeline.config import TrainConfig

if TYPE_CHECKING:
    from transformers import GPT2Config

REDUCE_BUCKET = 500_000_000
"""Elements of DeepSpeed's default bucket of gradients under ZeRO-2 and 3."""
LIVE_PARAMETERS = 1_000_000_000
"""Elements of whole weights that ZeRO-3 keeps at a time, by default."""
FIXED_BYTES = {"cpu": 64e6, "accelerator": 2e9}
"""Libraries' own: measured on CPU; on an accelerator an allowance for its context and NCCL."""
FRAGMENTATION = {"cpu": 1.0, "accelerator": 1.05}
"""The allocator's waste: an allowance on an accelerator."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: what is there all the time, and on top of it one of three peaks.

    While activations go, gradients come, so the backward pass is largest at its beginning or at its end.
    """

    always: dict[str, float] = field(default_factory=dict)
    forward: dict[str, float] = field(default_factory=dict)
    """Before the first gradient."""
    backward: dict[str, float] = field(default_factory=dict)
    """After the last one."""
    update: dict[str, float] = field(default_factory=dict)
    fragmentation: float = 1.0

    @property
    def peak_parts(self) -> dict[str, float]:
        """By part, at the peak."""
        phases = (self.forward, self.backward, self.update)
        return self.always | max(phases, key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> float:
        """Bytes."""
        return sum(self.peak_parts.values()) * self.fragmentation


def memory_of_rank(config: TrainConfig, model: GPT2Config, ranks: int, on_cpu: bool) -> Memory:
    """Of the rank that needs most: under pipeline stages the first or the last."""
    stages = range(config.parallel.pipeline_stages)
    return max((_of_stage(config, model, ranks, on_cpu, stage) for stage in stages), key=lambda memory: memory.peak)


def _of_stage(config: TrainConfig, model: GPT2Config, ranks: int, on_cpu: bool, stage: int) -> Memory:
    parallel, is_last = config.parallel, stage == config.parallel.pipeline_stages - 1
    blocks = blocks_of_stage(model.n_layer, parallel.pipeline_stages, stage)
    held = _held_parameters(config, model, blocks, stage == 0, is_last)
    kind = "cpu" if on_cpu else "accelerator"
    always, backward, update = _state(config, held, parallel.data_ranks(ranks), on_cpu)
    always["libraries"] = FIXED_BYTES[kind]
    saved = saved_bytes(config, model, on_cpu)
    micro_batches = config.batch.accumulation_steps(parallel.data_ranks(ranks))
    in_flight = min(parallel.pipeline_stages - stage, micro_batches)
    width = 4 if config.precision == "fp32" else 2
    one_stream = config.batch.micro_size * model.n_positions * model.n_embd * width
    kept = one_stream if parallel.recompute else saved
    forward = {"activations": in_flight * blocks * kept + (saved if parallel.recompute else 0.0)}
    if is_last:
        scores = config.batch.micro_size * model.n_positions * model.colors * 4
        forward["logits and loss"] = (3 if width == 4 else 4.5) * scores
    if parallel.pipeline_stages > 1:
        forward["stages' messages"] = 2 * in_flight * one_stream
    if parallel.zero_stage == 3:
        forward["whole weights"] = backward["whole weights"]
    if micro_batches > 1:  # the gradients of earlier micro-batches are there
        forward |= {part: size for part, size in backward.items() if part.endswith("gradients")}
    backward["activations"] = saved  # those of the first block
    if config.precision == "fp8":
        forward["float8 copies"] = backward["float8 copies"] = float8_bytes(config, model)
    return Memory(always, forward, backward, update, FRAGMENTATION[kind])


def saved_bytes(config: TrainConfig, model: GPT2Config, on_cpu: bool) -> float:
    """What autograd saves of one block and a micro-batch.

    In streams of B * T * D: the inputs of three of four matrix products (3), queries, keys and values (3), the fourth's
    input (4), what the activation function needs of its own (8, or 16 for GPT-2's), the two norms' inputs (2). A
    RMSNorm on CPU is made of small operations, which save twice that in fp32. Tensor parallelism cuts what lies inside
    the attention (4) and the MLP.
    """
    stream = config.batch.micro_size * model.n_positions * model.n_embd
    width = 4 if config.precision == "fp32" else 2
    parts = config.parallel.tensor_parallel
    inside = 8 + (8 if model.block == "igpt" else 16)
    norms = 4 * 4 if on_cpu and model.block == "igpt" else 2 * width
    return stream * (norms + width * (2 + inside / parts))


def float8_bytes(config: TrainConfig, model: GPT2Config) -> float:
    """Roughly, while one product is computed; autograd saves nothing of it. Not measured.

    The operands of the largest, c_proj of the MLP, in its backward pass: streams of B * T * D (1 + 4) and a matrix of
    4 * D^2, a byte each, and each once more for the layout that its second product wants.
    """
    stream = config.batch.micro_size * model.n_positions * model.n_embd
    return 2.0 * (5 * stream + 4 * model.n_embd**2)


def blocks_of_stage(layers: int, stages: int, stage: int) -> int:
    """DeepSpeed gives the first stages one block more, where they don't divide."""
    return layers // stages + (1 if stage < layers % stages else 0)


def _held_parameters(config: TrainConfig, model: GPT2Config, blocks: int, first: bool, last: bool) -> float:
    """P: those of a rank's blocks, cut by tensor parallelism, and of embeddings and head where they lie."""
    in_blocks = costs.matmul_parameters(model) - _head(model)
    held = in_blocks * blocks / model.n_layer / config.parallel.tensor_parallel
    held += (model.vocab_size + model.n_positions) * model.n_embd if first else 0
    return held + (_head(model) if last else 0)


def _head(model: GPT2Config) -> int:
    return model.n_embd * (model.colors if model.block == "igpt" else model.vocab_size)


State = tuple[dict[str, float], dict[str, float], dict[str, float]]
"""Bytes that are there always, at the end of the backward pass, and in the update."""


def _state(config: TrainConfig, held: float, ranks: int, on_cpu: bool) -> State:
    """Weights, gradients and optimizer of P parameters whose optimizer state `ranks` share."""
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
        sent = {"gradients as they are sent": 4 * min(held, REDUCE_BUCKET)}
        return always, {"bf16 gradients": 2 * held}, {"bf16 gradients": 2 * held} | sent
    bucket = min(held, REDUCE_BUCKET) if on_cpu else REDUCE_BUCKET
    backward = {
        "gradients": width * (held if stage == 1 else min(held, REDUCE_BUCKET)),
        # On an accelerator one is filled while the other is sent.
        "buckets": width * bucket * (1 if on_cpu else 2) + (0 if fp32 else 4 * min(held, REDUCE_BUCKET)),
        "own gradients": 0.0 if fp32 else 4 * held / ranks,
    }
    return always, backward, {"own gradients": 8 * held / ranks}


def _without_zero(held: float, fp32: bool) -> State:
    """Every rank holds all; under bf16 autocast keeps a copy of the weights until the backward pass is over."""
    always = {"weights": 4 * held, "moments": 8 * held}
    gradients = {"gradients": 4 * held}
    return always, gradients | ({} if fp32 else {"bf16 weights": 2 * held}), gradients


def _stage_3(always: dict[str, float], held: float, ranks: int, width: int, on_cpu: bool) -> State:
    """Whole weights and gradients of a few blocks at a time, on top of what the rank owns."""
    bucket = min(held, REDUCE_BUCKET)
    always["own gradients"] = 4 * held / ranks
    always["buckets"] = 4 * (bucket if on_cpu else REDUCE_BUCKET)
    backward = {"whole weights": width * min(held, LIVE_PARAMETERS), "gradients": width * bucket + 4 * bucket}
    return always, backward, {}
