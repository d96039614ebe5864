"""Run by test_tasks.py under torchrun: FEATURES_FILE, then the arguments of `evaluate`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from data_prep.shards import open_shard_set
from pipeline.evaluate.features import pooled_features
from pipeline.evaluate.inputs import Evaluation, Sizes, start_accelerator
from pipeline.evaluate.tasks import evaluate
from pipeline.model.huggingface import load_model_folder

if __name__ == "__main__":
    file, model, _, shards, *_ = sys.argv[1:]
    accelerator = start_accelerator("fp32")
    evaluation = Evaluation(
        load_model_folder(Path(model)), open_shard_set(Path(shards)), Path(), accelerator, 0, Sizes(batch_size=20)
    )
    pooled_features(evaluation, evaluation.pictures("test"), Path(file))
    if accelerator.num_processes > 1:
        evaluate(sys.argv[2:])
