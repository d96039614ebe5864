"""DeepSpeed's configuration and optimizer for a run."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.config import TrainConfig
from pipeline.distributed import Ranks
from pipeline.train.engine import offload, tensor_parallel
from pipeline.train.engine.base import ADAM_EPSILON


def deepspeed_config(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's configuration for a run; bf16, and so fp8, keeps fp32 master weights and sums gradients in fp32."""
    settings: dict[str, Any] = {
        "train_batch_size": config.batch.global_size,
        "train_micro_batch_size_per_gpu": config.batch.micro_size,
        "gradient_accumulation_steps": config.batch.accumulation_steps(config.parallel.data_ranks(ranks.count)),
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": config.parallel.offload != "none",  # a class derived from DeepSpeed's own
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": ranks.device.type == "cuda",
        },
    }
    settings["zero_optimization"] |= offload.settings(config.parallel, pinned=ranks.device.type == "cuda")
    if config.parallel.tensor_parallel > 1:
        # DeepSpeed would check the batch against all ranks, before it knows which of them read the same pictures.
        del settings["train_batch_size"]
        settings["tensor_parallel"] = tensor_parallel.settings(config.parallel.tensor_parallel)
    if config.parallel.zero_stage > 0:
        settings["gradient_clipping"] = config.optimizer.clip_norm
    if config.precision == "bf16" and config.parallel.zero_stage == 0:
        # Without ZeRO nothing holds the fp32 master weights but the model itself.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif config.precision != "fp32":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings


def new_optimizer(config: TrainConfig, parameters: Iterable[tuple[str, nn.Parameter]]) -> Any:
    """Adam with decoupled weight decay on the blocks' and the head's matrices."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in parameters:
        matrix = len(full_shape(parameter)) >= 2 and not name.startswith(("transformer.wte", "transformer.wpe"))
        (decayed if matrix else spared).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.optimizer.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    if config.parallel.offload != "none":
        return offload.new_cpu_adam(groups, config.optimizer, ADAM_EPSILON)
    return torch.optim.AdamW(
        groups,
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        eps=ADAM_EPSILON,
        fused=True,
    )


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape before ZeRO-3 cut it over the ranks."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def to_device(tokens: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint16 on the host to int64 on the device; widened there, so that two bytes a token are copied, and not waited
    for on an accelerator."""
    narrow = torch.from_numpy(np.ascontiguousarray(tokens))
    if device.type == "cuda":
        narrow = narrow.pin_memory()
    return narrow.to(device, non_blocking=True).long()
