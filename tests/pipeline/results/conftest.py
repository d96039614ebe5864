"""The evaluation's shard sets and model folders: results are tested on what `evaluate` writes."""

from tests.pipeline.evaluate.conftest import (  # noqa: F401
    evaluation_of,
    log_level,
    masked_folder,
    model_folder,
    model_folders,
    one_thread,
    separable,
    shards,
    shards_folder,
    toy_network,
)
