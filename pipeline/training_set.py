"""Opens the shard set of a training configuration."""

from data_prep.shards.reader import ShardSet, open_shard_set
from pipeline.config import TrainConfig, require_resolution


def open_training_set(config: TrainConfig) -> ShardSet:
    """Opens data.shards and checks what does not depend on the ranks.

    Raises ValueError naming the key, if it is not set, is not a shard set, has another resolution than the model, or
    lacks images that training reads.
    """
    if config.data.shards is None:
        raise ValueError("data.shards is not set; give the folder of a shard set (python -m data_prep shards).")
    shards = open_shard_set(config.data.shards)
    require_resolution(config, shards.resolution, shards.path)
    for name in ("train", "valid"):
        if shards.split(name).images == 0:
            raise ValueError(f"{shards.path} has no images in its split {name!r}; training reads train and valid.")
    return shards
