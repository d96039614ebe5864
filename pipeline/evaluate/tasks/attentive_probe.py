"""The attentive probe of AIM (El-Nouby et al. 2024): pooling by attention, then a linear classifier.

A model that predicts the next colour has no place where all of a picture is gathered, and a mean over positions may
lose what single positions know. Here the trunk is frozen, and a learned query attends to a layer's token features: for
each of H heads the weights are softmax(q_h . W_k,h x / sqrt(D / H)) over positions, the pooled value is W_v,h x under
these weights, heads are put side by side, and a linear layer gives the classes. No biases, one query, no second layer,
as in AIM's code (github.com/apple/ml-aim, AttentionPoolingClassifier).

The features of layer l are those of the linear probe before they are pooled: the input of attention block l after its
ln_1, l = 0 .. L-1, or the output of ln_f (l = L). AIM's code standardises them by a batch norm without gain; here it is
done by the mean and deviation over all training pictures and positions, the same whatever the batch and the ranks. The
optimizer (AdamW under a cosine), its numbers and the heads (as many as the model's) are chosen here.

Token features are T times as large as pooled ones (CIFAR-10 at the size of iGPT-S: 94 GB a layer), so they are not
cached: the frozen trunk runs once for each batch and epoch, and the probes of all layers and rates learn from that one
pass. Layer, rate and epoch are chosen on validation; the test split is looked at once. To try it on a CPU:
--train_images 2000 --attentive_probe.epochs 5 and fewer layers.

The result, beside what `labelled.description` says of the pictures and `verdicts.test_scores` of the test:

    layers, valid_accuracy_by_layer    the layers tried, and the best of rates and epochs for each
    learning_rates, heads
    best_layer, learning_rate, best_epoch, valid_accuracy    of the chosen probe
    valid_accuracy_by_epoch, train_loss_by_epoch             of the chosen probe
    figure                                                   the confusion matrix
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.config import require_at_least
from pipeline.evaluate.classifiers.recipe import Recipe
from pipeline.evaluate.context import Evaluation, Pictures, from_first
from pipeline.evaluate.features.labelled import unfit as unfit

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.evaluate.classifiers.finetune_loop import Batch, Training
    from pipeline.evaluate.features.attentive_pooling import Probes

FIGURE = "attentive_probe.png"
DEFAULT_DEPTHS = (0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
"""Layers to try, as shares of the blocks: around the middle, where the paper's probes are best, and the last."""


@dataclass(frozen=True, kw_only=True)
class Options(Recipe):
    """The attentive probe."""

    TASK: ClassVar[str] = "attentive_probe"

    epochs: int = 30
    """Passes over the training pictures; the rate falls to zero by half a cosine over them."""
    patience: int = 0
    """Stop after so many epochs without a better validation accuracy; 0 never stops early."""
    layers: list[int] | None = None
    """Layers to try, 0 (input of the first block) to the number of blocks (after the final norm); if not set, five
    around the middle, where the paper's probes are best, and the last."""
    heads: int | None = None
    """Heads of the pooling; as many as the model's if not set."""
    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 3e-4])
    """Peak rates to try."""
    weight_decay: float = 0.01
    """Decoupled, AdamW's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rates(self.learning_rates)
        require_at_least(f"{self.TASK}.weight_decay", self.weight_decay, 0)
        if self.heads is not None:
            require_at_least(f"{self.TASK}.heads", self.heads, 1)
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ValueError(f"{self.TASK}.layers is {self.layers}; it must be a list of layers, each once.")


def check(evaluation: Evaluation, options: Options, _coming: list[str]) -> None:
    """Raises ValueError if an option does not fit the model."""
    options.check_fits(evaluation.shards.resolution)
    _layers(evaluation, options)
    _heads(evaluation, options)


def measure(evaluation: Evaluation, options: Options) -> dict[str, Any]:
    """Trains the probes of all layers and rates side by side, and tests the best.

    Raises ValueError if train, valid or test is absent or unlabelled, train has a single class, or an option does not
    fit the model.
    """
    import numpy as np

    from pipeline.evaluate.classifiers.finetune_loop import all_lost, predictions, train
    from pipeline.evaluate.features.attentive_pooling import token_features
    from pipeline.evaluate.features.labelled import description, labelled_splits
    from pipeline.evaluate.metrics.classification import draw_confusion, test_scores

    options.check_fits(evaluation.shards.resolution)
    layers, heads = _layers(evaluation, options), _heads(evaluation, options)
    pictures = labelled_splits(evaluation, Options.TASK)
    probes, training = _training(evaluation, pictures, options, layers, heads)
    record = train(evaluation, training, options)
    if not np.isfinite(record.losses).any():
        raise all_lost(options.learning_rates)
    epoch, chosen = record.best
    accuracies = np.array(record.accuracies)  # (E, K)
    by_layer = accuracies.max(axis=0).reshape(len(layers), -1).max(axis=1)  # (layers,)

    def said(draw: int) -> np.ndarray:
        def logits(tokens: "torch.Tensor", indices: np.ndarray) -> "torch.Tensor":
            features = token_features(evaluation, tokens, indices, [probes.layers[chosen]], draw)
            return probes.one(chosen, features[0])  # (B, C)

        return predictions(evaluation, pictures["test"], "attentive_probe, test", logits)

    result = {
        **description(evaluation, pictures),
        "layers": layers,
        "valid_accuracy_by_layer": by_layer.tolist(),
        "learning_rates": options.learning_rates,
        "heads": heads,
        "best_layer": probes.layers[chosen],
        "learning_rate": options.learning_rates[chosen % len(options.learning_rates)],
        "best_epoch": epoch,
        "valid_accuracy": record.valid_accuracy,
        "valid_accuracy_by_epoch": accuracies[:, chosen].tolist(),
        "train_loss_by_epoch": record.losses_of(chosen),
        **test_scores(evaluation, pictures["test"], said),
        "figure": FIGURE,
    }
    from_first(evaluation.accelerator, lambda: draw_confusion(result, evaluation.results / FIGURE))
    return result


def summary(result: dict[str, Any]) -> str:
    """The result in a line."""
    from pipeline.evaluate.metrics.classification import test_words

    return (
        f"{test_words(result)} at layer {result['best_layer']}, rate {result['learning_rate']:g}, "
        f"epoch {result['best_epoch']}, best on validation ({result['valid_accuracy']:.1%})"
    )


def _layers(evaluation: Evaluation, options: Options) -> list[int]:
    """The layers to try, ascending. Raises ValueError if the model has not one of them."""
    last = evaluation.model.config.n_layer
    if options.layers is None:
        return sorted({round(last * share) for share in DEFAULT_DEPTHS})
    for layer in options.layers:
        if not 0 <= layer <= last:
            raise ValueError(f"attentive_probe.layers has {layer}; the model's layers are 0 to {last}.")
    return sorted(options.layers)


def _heads(evaluation: Evaluation, options: Options) -> int:
    """Raises ValueError if the width can't be divided among them."""
    heads, width = options.heads or evaluation.model.config.n_head, evaluation.model.config.n_embd
    if width % heads:
        raise ValueError(f"attentive_probe.heads is {heads}; it must divide the model's width, {width}.")
    return heads


def _training(
    evaluation: Evaluation, pictures: dict[str, Pictures], options: Options, layers: list[int], heads: int
) -> "tuple[Probes, Training]":
    import numpy as np
    import torch

    from pipeline.evaluate.classifiers.finetune_loop import Training, predictions
    from pipeline.evaluate.features.attentive_pooling import Probes, standardisation, token_features
    from pipeline.model.objectives import class_loss

    mean, deviation = standardisation(evaluation, pictures["train"], layers)  # (layers, D)
    classes, rates = len(evaluation.shards.classes), options.learning_rates
    probes = Probes(layers, len(rates), mean, deviation, classes, heads, evaluation.seed)
    probes.to(evaluation.accelerator.device)

    def losses(module: "nn.Module", batch: "Batch") -> "torch.Tensor":
        features = token_features(evaluation, batch.tokens, batch.indices, layers, batch.epoch)
        logits = module(features)  # (B, K, C)
        labels = batch.labels[:, None].expand(logits.shape[:2])  # (B, K)
        return class_loss(logits.flatten(0, 1), labels.flatten()).view(labels.shape)

    def logits(tokens: "torch.Tensor", indices: np.ndarray) -> "torch.Tensor":
        return probes(token_features(evaluation, tokens, indices, layers))  # (B, K, C)

    def accuracies() -> np.ndarray:
        said = predictions(evaluation, pictures["valid"], "validation", logits)  # (N, K)
        return (said == pictures["valid"].labels[:, None]).mean(axis=0)

    groups = [
        {"params": probe.parameters(), "lr": rates[number % len(rates)]} for number, probe in enumerate(probes.probes)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    return probes, Training(Options.TASK, probes, optimizer, losses, accuracies, pictures["train"], cosine=True)
