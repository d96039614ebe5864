"""Fine-tuning of all weights on the class loss and the generative loss together (Chen et al. 2020, section 2.3).

A class head without bias, initialized to zero, reads the mean-pooled output of ln_f. The loss of an image is the
generative loss in nats per color plus the class loss in nats. For a masked model, the generative loss is the masked
loss, with new masks at each epoch. Batch size 128, Adam with betas (.9, .95), no weight decay, a constant learning
rate; images are flipped, and cropped after reflection padding of 4 pixels (the paper on CIFAR). The learning rate is
chosen about ten times below the one of pretraining, and training stops when validation no longer improves. The test
split is used once, with the learning rate and epoch that are best on validation. The paper leaves open: three learning
rates, patience 5, at most 50 epochs, gradient clipping as in pretraining.

At the size of iGPT-S an epoch of CIFAR-10 (45,000 images, 0.6 TFLOP each) takes 28 PFLOP per learning rate. To try it
on a CPU: a small model, --train_images 2000 --fine_tune.learning_rates [0.001] --fine_tune.epochs 5.

The result has these keys, in addition to `labelled.description` and `classification.test_scores`:

    trials               for each learning rate: learning_rate, valid_accuracy, best_epoch, valid_accuracy_by_epoch,
                         train_loss_by_epoch (nats: generative_weight x nats per color + nats of the class)
    learning_rate, best_epoch, valid_accuracy    of the chosen trial
    generative_weight    0: class loss only
    classifier           a folder in the results: the fine-tuned model with its class head (model_folder/classifier.py)
    figure               the confusion matrix
"""

from collections.abc import Collection
from typing import Any

from pipeline.distributed import from_first
from pipeline.evaluate.classifiers.full_model import label_loss, test_classifier, train_classifier, write_classifier
from pipeline.evaluate.context import Evaluation
from pipeline.evaluate.features.labelled import description, labelled_splits, occurring_classes
from pipeline.evaluate.metrics.classification import accuracy_text, draw_confusion
from pipeline.evaluate.options import FineTuneOptions
from pipeline.evaluate.task import LabelledTask
from pipeline.model_folder.classifier import Classifier
from pipeline.results.figures import draw_or_log
from pipeline.results.published import FINE_TUNING

FOLDER = "fine_tuned"
FIGURE = "fine_tune.png"


class FineTune(LabelledTask[FineTuneOptions]):
    """Fine-tuning on labels."""

    title = "Fine-tuning"
    published = FINE_TUNING

    def check(self, evaluation: Evaluation, earlier: Collection[str]) -> None:
        """Raises ValueError if an option does not fit the images."""
        self.options.check_fits(evaluation.shards.resolution)

    def measure(self, evaluation: Evaluation) -> dict[str, Any]:
        """Fine-tunes at every learning rate, tests the best model, writes the confusion matrix and the classifier.

        Raises ValueError if train, valid or test is absent or unlabelled, or train has a single class.
        """
        options = self.options
        options.check_fits(evaluation.shards.resolution)
        images = labelled_splits(evaluation, options.TASK)
        losses = label_loss(evaluation, options.generative_weight)
        classifier, validation = train_classifier(
            evaluation, options, options.TASK, losses, images["train"], images["valid"],
            generative=options.generative_weight > 0,
        )  # fmt: skip
        classes = occurring_classes(images)
        scores, _ = test_classifier(evaluation, classifier, images["test"], classes, "fine_tune, test")
        result = {
            **description(evaluation, images),
            "generative_weight": options.generative_weight,
            **validation,
            **scores,
            "classifier": FOLDER,
            "figure": FIGURE,
        }
        from_first(lambda: self._write(evaluation, classifier, result))
        return result

    def _write(self, evaluation: Evaluation, classifier: Classifier, result: dict[str, Any]) -> None:
        draw_or_log(draw_confusion, result, evaluation.results / FIGURE)
        facts = {key: result[key] for key in ("train_images", "learning_rate", "best_epoch", "valid_accuracy")}
        facts["model_digest"] = evaluation.model_digest
        write_classifier(evaluation, classifier, FOLDER, self.options.TASK, facts)

    @classmethod
    def summary(cls, result: dict[str, Any]) -> str:
        return (
            f"{accuracy_text(result)}, learning rate {result['learning_rate']:g}, epoch {result['best_epoch']}, best "
            f"on validation ({result['valid_accuracy']:.1%}); most common class "
            f"{result['majority_class_test_accuracy']:.1%}; the classifier is in {result['classifier']}"
        )
