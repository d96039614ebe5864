"""DeepSpeed's configuration and optimizer for a run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config import ParallelConfig, TrainConfig
from pipeline.distributed import Ranks
from pipeline.train.engine import offload
from pipeline.train.engine.deepspeed_internals import full_shape, new_cpu_adam

ADAM_EPSILON = 1e-8
BUCKET_ELEMENTS = 200_000_000
"""Gradients reduced at a time, from one of two buffers. DeepSpeed's default, 5e8, is a third of L: little overlap."""
OFFLOADED = {"none": (), "optimizer": ("offload_optimizer",), "parameters": ("offload_optimizer", "offload_param")}
"""Sections of DeepSpeed's `zero_optimization` for each value of parallel.offload."""


def deepspeed_config(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's configuration for a run. bf16 and fp8 runs have fp32 master weights and sum gradients in fp32."""
    data_ranks = config.parallel.data_ranks(ranks.count)
    settings: dict[str, Any] = {
        "train_batch_size": config.batch.global_size,
        "train_micro_batch_size_per_gpu": config.batch.micro_size,
        "gradient_accumulation_steps": config.batch.accumulation_steps(data_ranks),
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it synchronizes the device at every step
        "communication_data_type": config.parallel.communication,
        # Absent would be 1.0. With ZeRO-0 the engine clips.
        "gradient_clipping": 0.0
        if config.parallel.zero_stage == 0 or clips_in_update(config)
        else config.optimizer.clip_norm,
        "zero_allow_untested_optimizer": config.parallel.offload != "none",  # a subclass of DeepSpeed's CPU Adam
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": _overlaps(config.parallel, ranks),
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "reduce_scatter": True,
            "use_multi_rank_bucket_allreduce": False,
        },
    }
    settings["zero_optimization"] |= _offload_settings(config.parallel, pinned=ranks.device.type == "cuda")
    if config.parallel.tensor_parallel > 1 and config.parallel.pipeline_stages > 1:
        # DeepSpeed would send a part of the states from each tensor-parallel rank, as if all ranks had the same.
        settings["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if config.precision == "bf16" and config.parallel.zero_stage == 0:
        # Without ZeRO, the model itself holds the fp32 master weights.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif config.precision != "fp32":
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _overlaps(parallel: ParallelConfig, ranks: Ranks) -> bool:
    """Whether gradients are reduced during the backward pass; DeepSpeed's pipeline can't.

    Overlap makes the host wait for the device after each backward pass; a single data-parallel rank has nothing to
    reduce.
    """
    return ranks.device.type == "cuda" and parallel.pipeline_stages == 1 and parallel.data_ranks(ranks.count) > 1


def clips_in_update(config: TrainConfig) -> bool:
    """Whether torch's fused AdamW clips the gradients while it applies them, without another pass over them.

    Not with ZeRO-0 (the engine clips) and ZeRO-3 (DeepSpeed scales gradients by 1 if it does not clip); DeepSpeed's
    CPU Adam has no such scale.
    """
    return config.parallel.zero_stage in (1, 2) and config.parallel.offload == "none"


def _offload_settings(parallel: ParallelConfig, pinned: bool) -> dict[str, dict[str, Any]]:
    """The offload sections: ZeRO-Offload (to host memory) or ZeRO-Infinity (to NVMe)."""
    target: dict[str, Any] = {"device": "cpu", "pin_memory": pinned}
    if parallel.nvme_path is not None:
        folder = offload.new_folder(Path(parallel.nvme_path))
        target = {"device": "nvme", "nvme_path": str(folder), "pin_memory": pinned}
    return {section: dict(target) for section in OFFLOADED[parallel.offload]}


def new_optimizer(config: TrainConfig, parameters: Iterable[tuple[str, nn.Parameter]]) -> Any:
    """Adam with decoupled weight decay on the blocks' and the head's matrices."""
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in parameters:
        matrix = len(full_shape(parameter)) >= 2 and not name.startswith(("transformer.wte", "transformer.wpe"))
        (decayed if matrix else not_decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.optimizer.weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    if config.parallel.offload != "none":
        offload.add_environment_to_path()
        return new_cpu_adam(groups, config.optimizer.learning_rate, config.optimizer.betas, ADAM_EPSILON)
    return torch.optim.AdamW(
        groups,
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        eps=ADAM_EPSILON,
        fused=True,
    )
