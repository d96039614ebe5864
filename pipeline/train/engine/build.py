"""Chooses the engine of a configuration, and checks that this machine meets its requirements."""

import torch
from transformers import GPT2Config

from pipeline.compilers import missing_compiler
from pipeline.config import TrainConfig
from pipeline.distributed import Ranks
from pipeline.train.engine import float8, offload
from pipeline.train.engine.base import Engine


def build_engine(config: TrainConfig, model_config: GPT2Config, ranks: Ranks, initial: bool = True) -> Engine:
    """Builds the engine and its model, initialized by config.seed; needs the process group.

    initial: False leaves the weights uninitialized, for a checkpoint to fill.
    """
    # Imported here: DeepSpeed takes seconds to import, and the checks do not need it.
    if config.parallel.pipeline_stages > 1:
        from pipeline.train.engine.pipeline import PipelineEngine

        return PipelineEngine(config, model_config, ranks, initial)
    from pipeline.train.engine.zero import ZeroEngine

    return ZeroEngine(config, model_config, ranks, initial)


def check_machine(config: TrainConfig, device: torch.device) -> None:
    """Raises ValueError naming the key if this machine lacks a compiler, a disk or float8 products that are needed."""
    offload.check_compilers(config.parallel, device)
    if config.compile is True:
        check_torch_compiles(device)
    if config.precision == "fp8":
        float8.check_device(device)


def check_torch_compiles(device: torch.device) -> None:
    """Raises ValueError if torch.compile has no compiler on this device."""
    missing = missing_compiler(device.type)
    if missing is not None:
        raise ValueError(f"compile is true; {missing}.")
