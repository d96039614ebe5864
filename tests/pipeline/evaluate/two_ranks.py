"""Run by test_command.py under torchrun: FEATURES_FILE, then the arguments of `evaluate`.

All ranks but the first check late for finished batches; the others may have finished by then.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import numpy as np

from data_prep.common.logs import configure_logging
from data_prep.shards.reader import open_shard_set
from pipeline.evaluate.cache import CachedArray, TaskCache
from pipeline.evaluate.command import evaluate
from pipeline.evaluate.context import Evaluation, start_accelerator
from pipeline.evaluate.features.pooled import pooled_features
from pipeline.evaluate.options import Sizes
from pipeline.model_folder.convert import load_model_folder

if __name__ == "__main__":
    configure_logging()
    file, model, _, shards, *_ = sys.argv[1:]
    accelerator = start_accelerator("fp32")
    evaluation = Evaluation(
        model=load_model_folder(Path(model)),
        shards=open_shard_set(Path(shards)),
        results=Path(),
        accelerator=accelerator,
        seed=0,
        sizes=Sizes(batch_size=20),
        cache=TaskCache.of_task(Path(file).parent, "test", ""),
        features=Path(file).with_suffix(".features"),
        model_digest="",
    )
    if not accelerator.is_main_process:
        finished_batches = CachedArray.finished_batches
        CachedArray.finished_batches = lambda array: time.sleep(1) or finished_batches(array)  # type: ignore[method-assign]
    features = pooled_features(evaluation, evaluation.images("test"))
    if accelerator.is_main_process:
        np.save(file, features)
    if accelerator.num_processes > 1:
        evaluate(sys.argv[2:])
