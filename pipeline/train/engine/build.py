"""Chooses the engine of a configuration."""

from transformers import GPT2Config

from pipeline.config import TrainConfig
from pipeline.distributed import Ranks
from pipeline.train.engine.base import Engine


def build_engine(config: TrainConfig, model_config: GPT2Config, ranks: Ranks, initial: bool = True) -> Engine:
    """Builds the model in its place, initialised by config.seed; needs the process group.

    initial: False leaves the weights as the memory is, for a checkpoint to fill.
    """
    if config.parallel.pipeline_stages > 1:
        from pipeline.train.engine.pipeline import PipelineEngine

        return PipelineEngine(config, model_config, ranks, initial)
    from pipeline.train.engine.zero import ZeroEngine

    return ZeroEngine(config, model_config, ranks, initial)
