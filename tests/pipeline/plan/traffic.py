"""python -m tests.pipeline.plan.traffic CASE ...: counts the bytes of the passes over gradients and weights in a step.

CASE: JSON of options of ParallelConfig, and `precision`. Rank 0 prints a line a case: the bytes for one parameter that
a step reads and writes beyond plain forward and backward passes. Collectives don't count.
"""

import json
import os
import sys
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config import BatchConfig, ModelConfig, ParallelConfig, TrainConfig
from pipeline.distributed import Ranks, describe_ranks
from pipeline.model import objectives
from pipeline.model.gpt import build_model
from pipeline.model.gpt_config import gpt2_config
from pipeline.model.masks import Batch
from pipeline.train.engine.build import build_engine
from pipeline.train.engine.process_group import start_group

SHAPE = ModelConfig(layers=2, width=64, heads=2, resolution=4)
MICRO_BATCHES = 2
FREE = ("c10d", "aten.empty", "aten.new_empty", "aten.detach")


class Traffic(TorchDispatchMode):
    """Sums the bytes that operations read and write, each operation as one kernel; views are free."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not str(func).startswith(FREE):
            self.bytes += bytes_of_call(func, args, kwargs or {}, result)
        return result


def bytes_of_call(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Of all tensors that a call reads, and of all that it writes."""
    overwrites = any(word in str(func) for word in ("copy_", "zero_", "fill_"))
    total, written = 0, set()
    for number, argument in enumerate(func._schema.arguments):
        mutated = argument.alias_info is not None and argument.alias_info.is_write
        if argument.name == "grads":  # of a fused update: written if they are scaled
            mutated = kwargs.get("grad_scale") is not None
        for tensor in tensors(args[number] if number < len(args) else kwargs.get(argument.name)):
            total += (mutated + (not (mutated and overwrites))) * tensor.nbytes
            written |= {tensor.data_ptr()}
    return total + sum(tensor.nbytes for tensor in tensors(result) if tensor.data_ptr() not in written)


def tensors(tree: Any) -> list[torch.Tensor]:
    """All in a nest of lists."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def count(case: dict[str, Any], ranks: Ranks) -> float:
    """Bytes for one parameter."""
    parallel = ParallelConfig(**{key: value for key, value in case.items() if key != "precision"})
    size = MICRO_BATCHES * parallel.data_ranks(ranks.count)
    batch = BatchConfig(global_size=size, micro_size=1)
    config = TrainConfig(model=SHAPE, batch=batch, parallel=parallel, precision=case["precision"])
    model = gpt2_config(config.model)
    engine = build_engine(config, model, ranks, initial=True)
    images = Batch(np.zeros((MICRO_BATCHES, model.n_positions), np.uint16))
    engine.step(images, 1e-3)  # creates the optimizer's state
    with Traffic() as step:
        engine.step(images, 1e-3)
    plain = build_model(model).to(torch.float32 if case["precision"] == "fp32" else torch.bfloat16)
    with Traffic() as passes:
        inputs, targets = objectives.next_color(torch.zeros(1, model.n_positions, dtype=torch.long), model.colors)
        objectives.image_loss(plain(input_ids=inputs).logits, targets, model.colors).mean().backward()
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    return (step.bytes - MICRO_BATCHES * passes.bytes) / parameters


if __name__ == "__main__":
    ranks = describe_ranks()
    start_group(ranks)
    for text in sys.argv[1:]:
        print("COUNTED", count(json.loads(text), ranks), flush=True)
    os._exit(0)
