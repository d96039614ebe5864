"""Classifiers of which the whole model is trained: what fine-tuning and distillation share."""

from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.evaluate.classifiers.finetune_loop import Batch, Losses, Training, best_of, search, trainable
from pipeline.evaluate.context import Evaluation, ImageSubset
from pipeline.evaluate.metrics.classification import predict_classes, test_scores, valid_accuracy
from pipeline.evaluate.options import WholeModelRecipe
from pipeline.model.objectives import class_loss, joint_loss
from pipeline.model_folder.classifier import Classifier, save_classifier

BETAS = (0.9, 0.95)
"""Of Adam, as in pretraining (the paper's appendix A.1)."""


def label_loss(evaluation: Evaluation, generative_weight: float = 0.0) -> Losses:
    """The loss of a classifier that is to predict the label, and with a weight above 0 the image's colors as well."""
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
    recipe: WholeModelRecipe,
    name: str,
    losses: Losses,
    images: ImageSubset,
    valid: ImageSubset,
    *,
    generative: bool = False,
    cosine: bool = False,
    images_per_epoch: int | None = None,
) -> tuple[Classifier, dict[str, Any]]:
    """Copies of the evaluated model, each with a class head, trained at every learning rate of the recipe.

    name: of the trainings in the cache; the other arguments as of `Training`. generative: whether the colors' head is
    trained too. Returns the classifier that did best on `valid`, and of it `learning_rate`, `best_epoch` and
    `valid_accuracy`, with `trials` as of `search`.
    """

    def training_at(rate: float) -> Training:
        model = deepcopy(evaluation.model.model).to(evaluation.accelerator.device)
        classifier = Classifier(model, len(evaluation.shards.classes))
        classifier.prepare_training(generative=generative, recompute=recipe.recompute)
        return Training(
            name=f"{name}-rate-{rate}",
            module=classifier,
            optimizer=torch.optim.Adam(trainable(classifier).values(), lr=rate, betas=BETAS),
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
    return module, {key: best[key] for key in ("learning_rate", "best_epoch", "valid_accuracy")} | {"trials": trials}


def test_classifier(
    evaluation: Evaluation, classifier: nn.Module, images: ImageSubset, label: str
) -> tuple[dict[str, Any], np.ndarray]:
    """`test_scores` of a classifier, and the class it predicts for each image under the first mask, int (N,)."""
    return test_scores(evaluation, images, partial(predict_classes, evaluation, classifier, images, label))


def write_classifier(
    evaluation: Evaluation, classifier: Classifier, folder: str, task: str, facts: dict[str, Any]
) -> None:
    """Writes a classifier's folder into the results; facts: what is recorded beside the shard set and the seed."""
    facts = {"task": task} | facts | {"dataset": evaluation.shards.name, "dataset_digest": evaluation.shards.digest}
    facts["seed"] = evaluation.seed
    palette, classes = evaluation.shards.palette, evaluation.shards.classes
    save_classifier(classifier.cpu(), palette, classes, evaluation.results / folder, facts)
