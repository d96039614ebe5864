"""torch.compile in the engines: when it is used, what is compiled, and what must not disturb it."""

import logging
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from pipeline.compilers import missing_compiler
from pipeline.config import TrainConfig
from pipeline.model.trunk import Trunk
from pipeline.stop_signals import STOP_SIGNALS

logger = logging.getLogger(__name__)

eagerly = partial(torch.compiler.set_stance, "force_eager")
"""A context in which compiled functions run uncompiled. Forward passes outside of training use it: they would compile
again without gradients, and a save must not wait for a compiler."""


def is_on(config: TrainConfig, device: torch.device) -> bool:
    """Whether a run compiles on this device; `auto` does on accelerators that have a compiler."""
    if config.compile == "auto":
        return device.type != "cpu" and missing_compiler(device.type) is None
    return config.compile


def describe(config: TrainConfig, device: torch.device) -> str:
    """Whether and why the run compiles, for the derived quantities."""
    if is_on(config, device):
        return "each block, by torch.compile, in the first step"
    if config.compile == "auto" and device.type != "cpu":
        return f"off, which is slower: {missing_compiler(device.type)}"
    return "off"


def trunk(model: GPT2LMHeadModel, config: TrainConfig, device: torch.device) -> Trunk:
    """The model's forward pass, compiled if the run compiles. Call it before DeepSpeed gets the model."""
    if not is_on(config, device):
        return Trunk(model)
    start_workers(device)
    if config.parallel.zero_stage < 3 and not config.parallel.recompute:
        return Trunk(model, compiled)
    # Blocks that are gathered one by one, or recomputed from their input alone, are compiled as they are.
    if config.parallel.zero_stage == 3:
        from deepspeed.utils import set_z3_leaf_modules

        # DeepSpeed's hooks gather a block's weights around it, not inside, where they would break the graph.
        set_z3_leaf_modules(model, [GPT2Block])
    for block in model.transformer.h:
        compile_block(block)
    return Trunk(model)


def compile_block(block: Any) -> None:
    """Compiles a block's forward pass; hooks of the block stay outside."""
    block.forward = compiled(block.forward)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled for the shapes of its first call: the micro-batches of training have one shape."""
    return torch.compile(function, dynamic=False)


def start_workers(device: torch.device) -> None:
    """Starts Inductor's compile workers for Triton, with the signals blocked that ask a run to stop.

    The workers are children of the rank, so the signals that SLURM sends to all processes of a job would end them, and
    a later compilation would hang. They inherit the mask of the thread that starts them. Call it before torch.compile,
    which starts them too.
    """
    if device.type == "cpu":
        return
    from torch._inductor.async_compile import AsyncCompile

    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        AsyncCompile.warm_pool()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


class RecompileWatch:
    """Counts what torch.compile compiles more than once, and graph breaks, and warns of the first of either.

    A run compiles in its first step only. More than a few recompilations of a function make torch run it uncompiled.
    """

    def __init__(self) -> None:
        self.count = 0

    def check(self) -> None:
        """Call after each step. Logs a warning the first time that something was recompiled or broke a graph."""
        from torch._dynamo import utils

        reasons = [metrics.recompile_reason for metrics in utils.get_compilation_metrics() if metrics.recompile_reason]
        reasons += utils.counters["graph_break"]
        utils.clear_compilation_metrics()
        utils.counters["graph_break"].clear()
        if reasons and not self.count:
            logger.warning(
                f"torch.compile compiled a block again, or in parts, which may make steps slower; reason: "
                f"{' '.join(reasons[0].split())[:300]}"
            )
        self.count += len(reasons)
