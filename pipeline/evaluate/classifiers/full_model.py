"""Training of all weights of a model with a class head: what fine-tuning and distillation share."""

from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.evaluate.classifiers.finetune_loop import Batch, Losses, Training, best_of, search, trainable
from pipeline.evaluate.context import Evaluation, ImageSubset
from pipeline.evaluate.metrics.classification import predict_classes, test_scores, valid_accuracy
from pipeline.evaluate.options import FullModelRecipe
from pipeline.model.objectives import class_loss, joint_loss
from pipeline.model_folder.classifier import Classifier, save_classifier

BETAS = (0.9, 0.95)
"""Adam's betas, as in pretraining (appendix A.1 of the paper)."""


def label_loss(evaluation: Evaluation, generative_weight: float = 0.0) -> Losses:
    """The class loss; with a generative_weight above 0, plus the weighted loss of the colors."""
    generative, colors = generative_weight > 0, evaluation.shards.colors

    def losses(module: nn.Module, batch: Batch) -> torch.Tensor:
        inputs, targets = evaluation.inputs_and_targets(batch.tokens, batch.indices, batch.epoch)
        token_logits, class_logits = module(inputs, generative=generative)
        if token_logits is None:
            return class_loss(class_logits, batch.labels)[:, None]  # (B, 1)
        return joint_loss(token_logits, targets, class_logits, batch.labels, colors, generative_weight)[:, None]

    return losses


def train_classifier(
    evaluation: Evaluation,
    recipe: FullModelRecipe,
    name: str,
    losses: Losses,
    images: ImageSubset,
    valid: ImageSubset,
    *,
    generative: bool = False,
    cosine: bool = False,
    images_per_epoch: int | None = None,
) -> tuple[Classifier, dict[str, Any]]:
    """Trains a copy of the evaluated model with a class head at every learning rate of the recipe.

    name: the prefix of the names in the cache. generative: whether the output head of the colors is trained too. The
    other arguments are those of `Training`. Returns the classifier that is best on `valid`, and its `learning_rate`,
    `best_epoch` and `valid_accuracy`, with the `trials` of `search`.
    """

    def training_at(learning_rate: float) -> Training:
        model = deepcopy(evaluation.model.model).to(evaluation.accelerator.device)
        classifier = Classifier(model, len(evaluation.shards.classes))
        classifier.prepare_training(generative=generative, recompute=recipe.recompute)
        return Training(
            name=f"{name}-rate-{learning_rate}",
            module=classifier,
            optimizer=torch.optim.Adam(trainable(classifier).values(), lr=learning_rate, betas=BETAS),
            losses=losses,
            accuracies=lambda: valid_accuracy(evaluation, classifier, valid),
            images=images,
            images_per_epoch=images_per_epoch,
            clip_norm=recipe.clip_norm,
            cosine=cosine,
        )

    module, trials = search(evaluation, recipe.learning_rates, training_at, recipe)
    assert isinstance(module, Classifier)
    best = best_of(trials)
    model = "" if name == recipe.TASK else f" ({name})"
    evaluation.log_if_at_limit(f"{recipe.TASK}.learning_rates{model}", recipe.learning_rates, [best["learning_rate"]])
    return module, {key: best[key] for key in ("learning_rate", "best_epoch", "valid_accuracy")} | {"trials": trials}


def test_classifier(
    evaluation: Evaluation, classifier: nn.Module, images: ImageSubset, classes: np.ndarray, label: str
) -> tuple[dict[str, Any], np.ndarray]:
    """`test_scores` of a classifier, and the class that it predicts for each image under the first mask, int (N,)."""
    return test_scores(evaluation, images, classes, partial(predict_classes, evaluation, classifier, images, label))


def write_classifier(
    evaluation: Evaluation, classifier: Classifier, folder: str, task: str, facts: dict[str, Any]
) -> None:
    """Writes a classifier's folder into the results; facts: recorded in addition to the shard set and the seed."""
    facts = {"task": task} | facts | {"dataset": evaluation.shards.name, "dataset_digest": evaluation.shards.digest}
    facts["seed"] = evaluation.seed
    palette, classes = evaluation.shards.palette, evaluation.shards.classes
    save_classifier(classifier.cpu(), palette, classes, evaluation.results / folder, facts)
