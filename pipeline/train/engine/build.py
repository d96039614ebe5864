"""Chooses the engine of a configuration, and checks that this machine has what the engine needs."""

import os
import shutil

import torch
from transformers import GPT2Config

from pipeline.config import TrainConfig
from pipeline.distributed import Ranks
from pipeline.train.engine import float8, offload
from pipeline.train.engine.base import Engine


def build_engine(config: TrainConfig, model_config: GPT2Config, ranks: Ranks, initial: bool = True) -> Engine:
    """Builds the model in its place, initialized by config.seed; needs the process group.

    initial: False leaves the weights as the memory is, for a checkpoint to fill.
    """
    # DeepSpeed, which takes seconds to import, is needed by none of the checks.
    if config.parallel.pipeline_stages > 1:
        from pipeline.train.engine.pipeline import PipelineEngine

        return PipelineEngine(config, model_config, ranks, initial)
    from pipeline.train.engine.zero import ZeroEngine

    return ZeroEngine(config, model_config, ranks, initial)


def check_machine(config: TrainConfig, device: torch.device) -> None:
    """Raises ValueError naming the key if this machine lacks what the engine needs: compilers, a disk, float8."""
    offload.check_compilers(config.parallel)
    if config.compile:
        check_torch_compiles(device)
    if config.precision == "fp8":
        float8.check_device(device)


def check_torch_compiles(device: torch.device) -> None:
    """Raises ValueError if torch.compile finds no compiler: CXX or g++ on CPU; CC, gcc or clang on CUDA, for Triton."""
    kind, variable, usual = ("C", "CC", ["gcc", "clang"]) if device.type == "cuda" else ("C++", "CXX", ["g++"])
    named = os.environ.get(variable)
    looked_for = usual if named is None else [named]  # neither looks further than at what is named
    if all(shutil.which(name) is None for name in looked_for):
        raise ValueError(
            f"compile is true; torch.compile needs a {kind} compiler on this device, and {' or '.join(looked_for)} is "
            f"not to be found on PATH; install it, name another in {variable}, or set compile to false."
        )
