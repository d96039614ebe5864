"""Memory traffic of DeepSpeed's passes over gradients and weights, which the time of a block does not include.

Bytes that a kernel reads and writes for one parameter, from the source of DeepSpeed 0.19.8; each constant names the
method. tests/pipeline/plan/test_passes.py counts the bytes of real engines. Two kinds of parameters: those that a rank
computes with (all of its stage, also under ZeRO), and those whose optimizer state it owns.
"""

from dataclasses import dataclass, replace

from pipeline.config import TrainConfig

CAST = 2 + 4
"""From bf16 to fp32, or back."""
COPY, SCALE, ADD = 4 + 4, 4 + 4, 4 + 4 + 4
"""Of fp32: copied; multiplied or divided in place; added to another tensor."""
COPY_BF16, SCALE_BF16, ADD_BF16 = 2 + 2, 2 + 2, 2 + 2 + 2
READ, CLEAR, CLEAR_BF16 = 4, 4, 2
NORM_FP64 = 4 + 8 + 8
"""A norm of fp32 in fp64, through a copy (get_norm_dtype of zero/utils)."""
FIND_NON_FINITE = 2 * READ
"""Minimum and maximum (has_inf_or_nan of runtime/utils)."""
ADAM = 7 * 4
"""torch's fused AdamW: reads gradient, weight and two moments, writes all but the gradient."""
AVERAGE = 3 * 4
"""The moving average of the weights: reads it and the weight, writes it."""
SCALED = 4
"""The gradient, which the fused AdamW writes too if it clips it."""


@dataclass(frozen=True)
class Passes:
    """Bytes of traffic for one parameter."""

    micro_batch: int
    """Of each parameter that a rank computes with, in each micro-batch."""
    micro_batch_owned: int
    """Of each parameter that it owns, in each micro-batch."""
    step: int
    """Of each parameter that it computes with, once a step."""
    owned: int
    """Of each parameter that it owns, once a step."""


def _bf16_optimizer(bf16_messages: bool) -> Passes:
    """ZeRO-1 with bf16 and fp8, also with pipeline stages: every pass but the update is over all gradients, in fp32."""
    add_up = CAST + ADD  # BF16_Optimizer._update_hp_grad, as soon as autograd has computed a gradient
    reduce = CAST + SCALE_BF16 + CAST if bf16_messages else SCALE  # remove_repeated_passes: averaged in place
    return Passes(add_up, 0, reduce + READ + CLEAR, ADAM + SCALED + CAST)  # the norm; clear_hp_grads


def _zero_optimizer(stage: int, fp32: bool, bf16_messages: bool) -> Passes:
    """DeepSpeedZeroOptimizer (ZeRO-2, and ZeRO-1 with fp32) and its counterpart of ZeRO-3.

    Reduced gradients are averaged in their bucket; a rank then sums, scans and updates what it owns.
    """
    update = NORM_FP64 + ADAM + (SCALE if stage == 3 else SCALED)  # scaled_global_norm, _optimizer_step
    if stage == 3:  # concatenated partitions; the first micro-batch copies a gradient where others add one
        if fp32:
            bucket = COPY + COPY + SCALE
        elif bf16_messages:
            bucket = COPY_BF16 + SCALE_BF16 + COPY_BF16
        else:
            bucket = COPY_BF16 + SCALE_BF16 + CAST + COPY
        copy = COPY_BF16 + CAST if bf16_messages and not fp32 else COPY
        return Passes(bucket, copy + ADD, 0, COPY + update + (COPY if fp32 else CAST) - (ADD - COPY))
    if fp32:
        bucket = COPY + COPY + SCALE + COPY
        last = COPY + update + COPY
        return Passes(ADD, 0, bucket - ADD, last) if stage == 1 else Passes(bucket, ADD, 0, last - ADD)
    # average_tensor: copied to the bucket, divided, concatenated, cast for an fp32 message; copied back by the owner
    bucket = COPY_BF16 + SCALE_BF16 + COPY_BF16 + (0 if bf16_messages else CAST)
    back = COPY_BF16 if bf16_messages else CAST
    return Passes(bucket, back + CAST + ADD, 0, CLEAR + update + FIND_NON_FINITE + CAST)


def _without_zero(fp32: bool) -> Passes:
    """ZeRO-0: torch's own optimizer; with bf16, autocast casts weights and gradients in each micro-batch."""
    reduce = COPY + SCALE + COPY
    norm_and_clip = READ + SCALE
    return Passes(ADD + (0 if fp32 else 2 * CAST), 0, reduce + norm_and_clip + ADAM - ADD, 0)


def passes_of(config: TrainConfig) -> Passes:
    """The passes of a run's layout; those of several ranks, and a gradient that is clipped."""
    passes = _of_layout(config)
    if not config.ema.decay:
        return passes
    if config.parallel.zero_stage == 0:
        return replace(passes, step=passes.step + AVERAGE)
    return replace(passes, owned=passes.owned + AVERAGE)


def _of_layout(config: TrainConfig) -> Passes:
    stage, fp32 = config.parallel.zero_stage, config.precision == "fp32"
    bf16_messages = config.parallel.communication == "bf16"
    if stage == 0:
        return _without_zero(fp32)
    if stage == 1 and not fp32 and config.parallel.offload == "none":
        return _bf16_optimizer(bf16_messages)
    return _zero_optimizer(max(stage, 1 if fp32 else 2), fp32, bf16_messages)
