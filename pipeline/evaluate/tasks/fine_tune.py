"""Fine-tuning: the whole model learns the classes, and goes on learning to generate (Chen et al. 2020, section 2.3).

A class head without bias, zero at the start, reads the mean-pooled output of ln_f. The loss of a picture is the
generative loss in nats per colour plus the class loss in nats; of a model of hidden colours the masked loss, its masks
drawn anew at each epoch. Batch 128, Adam with betas (.9, .95), no weight decay, a constant rate; pictures are flipped,
and cropped from a reflection of 4 pixels (the paper on CIFAR). The rate is searched about ten times below that of
pretraining, training ends when validation no longer improves, and the test split is looked at once, with the rate and
epoch that did best on validation. What the paper leaves open is decided here: three rates, patience 5, at most 50
epochs, gradients clipped as in pretraining.

At the size of iGPT-S an epoch of CIFAR-10 (45,000 pictures, 0.6 TFLOP each) takes 28 PFLOP for each rate. To try it on
a CPU: a small model, --train_images 2000 --fine_tune.learning_rates [0.001] --fine_tune.epochs 5.

The result, beside what `labelled.description` says of the pictures and `verdicts.test_scores` of the test:

    trials               of each rate: learning_rate, valid_accuracy, best_epoch, valid_accuracy_by_epoch,
                         train_loss_by_epoch (nats: generative_weight x nats per colour + nats of the class)
    learning_rate, best_epoch, valid_accuracy    of the chosen rate
    generative_weight    0: the classes alone
    classifier           a folder in the results: the fine-tuned model with its head (model_folder/classifier.py)
    figure               the confusion matrix
"""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.config import require_at_least
from pipeline.evaluate.classifiers.recipe import WholeModelRecipe
from pipeline.evaluate.context import Evaluation, Pictures, from_first
from pipeline.evaluate.features.labelled import unfit as unfit

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.evaluate.classifiers.finetune_loop import Batch, Training

FOLDER = "fine_tuned"
FIGURE = "fine_tune.png"


@dataclass(frozen=True, kw_only=True)
class Options(WholeModelRecipe):
    """Fine-tuning on labels."""

    TASK: ClassVar[str] = "fine_tune"

    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-4, 3e-5])
    """Constant rates to try, about ten times below that of pretraining; each is a training of its own."""
    generative_weight: float = 1.0
    """Weight of the generative loss beside the class loss; 0 leaves it out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rates(self.learning_rates)
        require_at_least(f"{self.TASK}.generative_weight", self.generative_weight, 0)


def check(evaluation: Evaluation, options: Options, _coming: list[str]) -> None:
    """Raises ValueError if an option does not fit the pictures."""
    options.check_fits(evaluation.shards.resolution)


def measure(evaluation: Evaluation, options: Options) -> dict[str, Any]:
    """Fine-tunes at every rate, tests the best, writes the confusion matrix and the classifier.

    Raises ValueError if train, valid or test is absent or unlabelled, or train has a single class.
    """
    from pipeline.evaluate.classifiers.finetune_loop import best_of, search
    from pipeline.evaluate.features.labelled import description, labelled_splits
    from pipeline.evaluate.metrics.classification import classes_said, test_scores

    options.check_fits(evaluation.shards.resolution)
    pictures = labelled_splits(evaluation, Options.TASK)
    classifier, trials = search(
        evaluation, options.learning_rates, lambda rate: _training(evaluation, pictures, options, rate), options
    )
    best = best_of(trials)
    result = {
        **description(evaluation, pictures),
        "generative_weight": options.generative_weight,
        "trials": trials,
        **{key: best[key] for key in ("learning_rate", "best_epoch", "valid_accuracy")},
        **test_scores(
            evaluation,
            pictures["test"],
            lambda draw: classes_said(evaluation, classifier, pictures["test"], "fine_tune, test", draw),
        ),
        "classifier": FOLDER,
        "figure": FIGURE,
    }
    from_first(evaluation.accelerator, lambda: _write(evaluation, classifier, result))
    return result


def summary(result: dict[str, Any]) -> str:
    """The result in a line."""
    from pipeline.evaluate.metrics.classification import test_words

    return (
        f"{test_words(result)}, rate {result['learning_rate']:g}, epoch {result['best_epoch']}, best on validation "
        f"({result['valid_accuracy']:.1%}); largest class {result['majority_class_test_accuracy']:.1%}; "
        f"the classifier is in {result['classifier']}"
    )


def _training(evaluation: Evaluation, pictures: dict[str, Pictures], options: Options, rate: float) -> "Training":
    """A copy of the model that is to be fine-tuned at one rate."""
    from pipeline.evaluate.classifiers.finetune_loop import Training, adam
    from pipeline.evaluate.metrics.classification import valid_accuracy
    from pipeline.model.objectives import class_loss, joint_loss
    from pipeline.model_folder.classifier import Classifier

    classifier = Classifier(deepcopy(evaluation.model.model), len(evaluation.shards.classes))
    classifier.prepare_training(generative=options.generative_weight > 0, recompute=options.recompute)

    def losses(module: "nn.Module", batch: "Batch") -> "torch.Tensor":
        inputs, targets = evaluation.inputs_and_targets(batch.tokens, batch.indices, batch.epoch)
        token_logits, class_logits = module(inputs, generative=options.generative_weight > 0)
        if token_logits is None:
            return class_loss(class_logits, batch.labels)[:, None]  # (B, 1)
        colors = evaluation.shards.colors
        return joint_loss(token_logits, targets, class_logits, batch.labels, colors, options.generative_weight)[:, None]

    return Training(
        name=f"{Options.TASK}-rate-{rate}",
        module=classifier,
        optimizer=adam(classifier, rate),
        losses=losses,
        accuracies=lambda: valid_accuracy(evaluation, classifier, pictures["valid"]),
        pictures=pictures["train"],
        clip_norm=options.clip_norm,
    )


def _write(evaluation: Evaluation, classifier: "nn.Module", result: dict[str, Any]) -> None:
    from pipeline.evaluate.metrics.classification import draw_confusion
    from pipeline.model_folder.classifier import save_classifier

    draw_confusion(result, evaluation.results / FIGURE)
    facts = {"task": Options.TASK, "model_digest": evaluation.model_digest, "seed": evaluation.seed}
    facts |= {"dataset": evaluation.shards.name, "dataset_digest": evaluation.shards.digest}
    facts |= {key: result[key] for key in ("train_images", "learning_rate", "best_epoch", "valid_accuracy")}
    palette, classes = evaluation.shards.palette, evaluation.shards.classes
    save_classifier(classifier.cpu(), palette, classes, evaluation.results / FOLDER, facts)
