"""The attentive probe of AIM (El-Nouby et al. 2024): attention pooling, then a linear classifier.

A model that predicts the next color has no position that summarizes the image, and a mean over positions may lose the
information of single positions. Here the trunk is frozen, and a learned query attends to a layer's token features. For
each of H heads, the weights are softmax(q_h . W_k,h x / sqrt(D / H)) over positions, and the pooled value is W_v,h x
averaged with these weights. The heads are concatenated, and a linear layer gives the class logits. There are no biases,
one query, and no second layer, as in AIM's code (github.com/apple/ml-aim, AttentionPoolingClassifier).

The features of layer l are the features of the linear probe before pooling: the input of attention block l after its
ln_1, l = 0 .. L-1, or the output of ln_f (l = L). AIM's code standardizes them by a batch norm without gain. Here the
mean and standard deviation over all training images and positions are used, which do not depend on batches and ranks.
The optimizer (AdamW with a cosine schedule), its settings and the number of heads (the model's) are our choice.

Token features are T times as large as pooled ones (CIFAR-10 at the size of iGPT-S: 94 GB per layer), so they are not
cached. The frozen trunk runs once per batch and epoch, and the probes of all layers and learning rates are trained in
that pass. Layer, learning rate and epoch are chosen on validation; the test split is used once. To try it on a CPU:
--train_images 2000 --attentive_probe.epochs 5 and fewer layers.

The result has these keys, in addition to `labelled.description` and `classification.test_scores`:

    layers, valid_accuracy_by_layer    the layers tried, and for each the best accuracy over learning rates and epochs
    learning_rates, heads
    best_layer, learning_rate, best_epoch, valid_accuracy    of the chosen probe
    valid_accuracy_by_epoch, train_loss_by_epoch             of the chosen probe
    figure                                                   the confusion matrix
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.distributed import from_first
from pipeline.evaluate.classifiers.finetune_loop import Batch, Training, all_diverged, train
from pipeline.evaluate.context import Evaluation, ImageSubset
from pipeline.evaluate.features.attentive_pooling import Probes, standardisation, token_features
from pipeline.evaluate.features.labelled import description, labelled_splits, occurring_classes
from pipeline.evaluate.metrics.classification import accuracy_text, draw_confusion, predict, test_scores
from pipeline.evaluate.options import AttentiveProbeOptions
from pipeline.evaluate.task import LabelledTask
from pipeline.model.objectives import class_loss
from pipeline.results.figures import draw_or_log

FIGURE = "attentive_probe.png"
DEFAULT_DEPTHS = (0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
"""Layers to try, as fractions of the depth: around the middle, where the paper's probes are best, and the last."""


class AttentiveProbe(LabelledTask[AttentiveProbeOptions]):
    """Attention pooling over token features, and a linear classifier."""

    title = "Attentive probe"

    def check(self, evaluation: Evaluation, earlier: Collection[str]) -> None:
        """Raises ValueError if an option does not fit the model."""
        self.options.check_fits(evaluation.shards.resolution)
        self._layers(evaluation)
        self._heads(evaluation)

    def measure(self, evaluation: Evaluation) -> dict[str, Any]:
        """Trains the probes of all layers and learning rates in the same passes, and tests the best one.

        Raises ValueError if train, valid or test is absent or unlabelled, train has a single class, or an option does
        not fit the model.
        """
        options = self.options
        self.check(evaluation, ())
        layers, learning_rates = self._layers(evaluation), options.learning_rates
        images = labelled_splits(evaluation, options.TASK)
        probes = self._probes(evaluation, images["train"], layers)
        record = train(evaluation, self._training(evaluation, images, probes, layers), options)
        if not np.isfinite(record.losses).any():
            raise all_diverged(learning_rates)
        epoch, chosen = record.best
        accuracies = np.array(record.accuracies)  # (E, K)
        learning_rate = learning_rates[chosen % len(learning_rates)]
        evaluation.log_if_at_limit(f"{options.TASK}.learning_rates", learning_rates, [learning_rate])
        by_layer = accuracies.max(axis=0).reshape(len(layers), -1).max(axis=1)  # (layers,)

        def predict_under(draw: int) -> np.ndarray:
            def logits(tokens: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
                features = token_features(evaluation, tokens, indices, [probes.layers[chosen]], draw)
                return probes.one(chosen, features[0])  # (B, C)

            return predict(evaluation, images["test"], "attentive_probe, test", logits)

        scores, _ = test_scores(evaluation, images["test"], occurring_classes(images), predict_under)
        result = {
            **description(evaluation, images),
            "layers": layers,
            "valid_accuracy_by_layer": by_layer.tolist(),
            "learning_rates": learning_rates,
            "heads": self._heads(evaluation),
            "best_layer": probes.layers[chosen],
            "learning_rate": learning_rate,
            "best_epoch": epoch,
            "valid_accuracy": record.valid_accuracy,
            "valid_accuracy_by_epoch": accuracies[:, chosen].tolist(),
            "train_loss_by_epoch": record.losses_of(chosen),
            **scores,
            "figure": FIGURE,
        }
        from_first(lambda: draw_or_log(draw_confusion, result, evaluation.results / FIGURE))
        return result

    @classmethod
    def summary(cls, result: dict[str, Any]) -> str:
        return (
            f"{accuracy_text(result)} at layer {result['best_layer']}, learning rate {result['learning_rate']:g}, "
            f"epoch {result['best_epoch']}, best on validation ({result['valid_accuracy']:.1%})"
        )

    def _layers(self, evaluation: Evaluation) -> list[int]:
        """The layers to try, ascending. Raises ValueError if the model lacks one of them."""
        last = evaluation.model.config.n_layer
        if self.options.layers is None:
            return sorted({round(last * share) for share in DEFAULT_DEPTHS})
        for layer in self.options.layers:
            if not 0 <= layer <= last:
                raise ValueError(f"attentive_probe.layers has {layer}; the model's layers are 0 to {last}.")
        return sorted(self.options.layers)

    def _heads(self, evaluation: Evaluation) -> int:
        """Raises ValueError if the width can't be divided among them."""
        heads, width = self.options.heads or evaluation.model.config.n_head, evaluation.model.config.n_embd
        if width % heads:
            raise ValueError(f"attentive_probe.heads is {heads}; it must divide the model's width, {width}.")
        return heads

    def _probes(self, evaluation: Evaluation, train: ImageSubset, layers: list[int]) -> Probes:
        moments, heads = standardisation(evaluation, train, layers), self._heads(evaluation)
        classes, lrs = len(evaluation.shards.classes), len(self.options.learning_rates)
        probes = Probes(layers, lrs, moments, classes, heads, evaluation.seed)
        return probes.to(evaluation.accelerator.device)

    def _training(
        self, evaluation: Evaluation, images: dict[str, ImageSubset], probes: Probes, layers: list[int]
    ) -> Training:
        options = self.options

        def losses(module: nn.Module, batch: Batch) -> torch.Tensor:
            features = token_features(evaluation, batch.tokens, batch.indices, layers, batch.epoch)
            logits = module(features)  # (B, K, C)
            labels = batch.labels[:, None].expand(logits.shape[:2])  # (B, K)
            return class_loss(logits.flatten(0, 1), labels.flatten()).view(labels.shape)

        def logits(tokens: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
            return probes(token_features(evaluation, tokens, indices, layers))  # (B, K, C)

        def accuracies() -> np.ndarray:
            predicted = predict(evaluation, images["valid"], "validation", logits)  # (N, K)
            return (predicted == images["valid"].labels[:, None]).mean(axis=0)

        lrs = options.learning_rates
        groups = [
            {"params": probe.parameters(), "lr": lrs[number % len(lrs)]} for number, probe in enumerate(probes.probes)
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
        return Training(options.TASK, probes, optimizer, losses, accuracies, images["train"], cosine=True)
