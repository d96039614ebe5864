"""Distillation of a fine-tuned teacher into a smaller student, on images without labels.

The third stage of SimCLRv2 (Chen et al. 2020b, "Big Self-Supervised Models are Strong Semi-Supervised Learners",
section 2). The student is trained to match the teacher's distribution over classes: the loss is
- sum p_teacher ln p_student, with both distributions softened by a temperature, on all images of a split. Its labels
are not used. Teacher and student receive the same augmented image. Labels are used in two places: the teacher was
trained on some, and validation chooses learning rate and epoch.

The teacher is the classifier that the task fine_tune wrote into the results, or any other such folder. The student
starts from another model (a model folder or a run), or from initial weights, by default with half the teacher's blocks
and half its width. The baseline is the same student trained on labels only: by class loss on the labelled images (the
teacher's, if they are of the same shard set), with the same learning rates, the same number of steps and images, and
the same choice on validation. To get a teacher trained on few labels, run fine_tune with --train_images into another
results folder.

Adam as in pretraining, with a cosine schedule; temperature, learning rates and epochs are our choice. To try it on a
CPU: --distill.learning_rates [0.003] --distill.epochs 5.

The result has these keys, in addition to `labelled.description`:

    split, unlabelled_images, labelled_images, class_names, temperature, images_per_training (at most)
    teacher, student, labels_alone    for each: layers, width, heads, parameters, valid_accuracy, test_accuracy,
                                      and the other scores of `classification.test_scores`; for the students also
                                      learning_rate, best_epoch and trials, as in fine_tune
    top_confusions                    of the student
    agreement                         fraction of the test images for which student and teacher predict the same class
    classifier                        a folder in the results: the distilled student
    figure                            the student's confusion matrix
"""

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.distributed import from_first
from pipeline.evaluate.classifiers.finetune_loop import Batch, Losses
from pipeline.evaluate.classifiers.full_model import label_loss, test_classifier, train_classifier, write_classifier
from pipeline.evaluate.context import Evaluation, ImageSubset, check_match, choose_images, load_matching
from pipeline.evaluate.features.labelled import description, labelled_splits, occurring_classes
from pipeline.evaluate.metrics.classification import draw_confusion, valid_accuracy
from pipeline.evaluate.options import DistillOptions
from pipeline.evaluate.task import LabelledTask
from pipeline.evaluate.tasks.fine_tune import FOLDER as TEACHER_FOLDER
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import gpt2_config
from pipeline.model.objectives import softened_loss
from pipeline.model_folder.classifier import HEAD_FACTS, LoadedClassifier, load_classifier
from pipeline.model_folder.convert import LoadedModel
from pipeline.model_folder.resolve import model_folder
from pipeline.results.figures import draw_or_log
from pipeline.weights.model_files import model_digest

FOLDER = "distilled"
FIGURE = "distill.png"


class Distill(LabelledTask[DistillOptions]):
    """Distillation of a fine-tuned model into a smaller one."""

    title = "Distillation"

    def other_inputs(self, results: Path) -> dict[str, str]:
        """Digests of the teacher and of the model that the student starts from.

        Raises ValueError if the teacher or the named student does not exist.
        """
        digests = {"teacher_digest": model_digest(_teacher_folder(results, self.options))}
        if self.options.student is not None:
            digests["student_digest"] = model_digest(model_folder(Path(self.options.student)))
        return digests

    def check(self, evaluation: Evaluation, earlier: Collection[str]) -> None:
        """Raises ValueError if the teacher or the student does not match the shard set, or if the split is absent."""
        options = self.options
        options.check_fits(evaluation.shards.resolution)
        evaluation.images(options.split)
        follows_fine_tune = options.teacher is None and "fine_tune" in earlier  # the teacher will be this model
        teacher = evaluation.model if follows_fine_tune else _load_teacher(evaluation, options).loaded
        if options.student is None:
            _shape(teacher, options)
        else:
            load_matching(model_folder(Path(options.student)), evaluation.shards)

    def measure(self, evaluation: Evaluation) -> dict[str, Any]:
        """Trains both students, tests them and the teacher, and writes the distilled student.

        Raises ValueError if the teacher or the student does not match the shard set, or if a split is absent or
        unlabelled.
        """
        options = self.options
        options.check_fits(evaluation.shards.resolution)
        teacher = _load_teacher(evaluation, options)
        # Inputs depend on the model: a masked model reads masked images.
        teaching = replace(evaluation, model=teacher.loaded)
        learning = replace(evaluation, model=_load_student(evaluation, teacher.loaded, options))
        unlabelled = evaluation.images(options.split)
        images = labelled_splits(evaluation, options.TASK)
        images["train"] = _teacher_images(evaluation, teacher) or images["train"]
        teacher.classifier.to(evaluation.accelerator.device)

        valid = float(valid_accuracy(teaching, teacher.classifier, images["valid"])[0])
        scores, predicted = {}, {}
        validation: dict[str, Any] = {"valid_accuracy": valid}
        scores["teacher"], predicted["teacher"] = _described(
            teaching, teacher.classifier, "teacher", images, validation
        )
        for name, losses, train_images in (
            ("student", distillation_loss(teaching, teacher.classifier, learning, options.temperature), unlabelled),
            ("labels_alone", label_loss(learning), images["train"]),
        ):
            classifier, validation = train_classifier(
                learning, options, f"{options.TASK}-{name}", losses, train_images, images["valid"],
                cosine=True, images_per_epoch=len(unlabelled),
            )  # fmt: skip
            scores[name], predicted[name] = _described(learning, classifier, name, images, validation)
            if name == "student":
                facts = {"teacher": teacher.facts, "temperature": options.temperature}
                from_first(partial(write_classifier, learning, classifier, FOLDER, options.TASK, facts))
        result = {
            **description(evaluation, images),
            "split": options.split,
            "unlabelled_images": len(unlabelled),
            "labelled_images": len(images["train"]),
            "images_per_training": options.epochs * len(unlabelled),
            "temperature": options.temperature,
            "teacher_folder": str(_teacher_folder(evaluation.results, options)),
            **scores,
            "top_confusions": scores["student"]["top_confusions"],
            "agreement": float((predicted["student"] == predicted["teacher"]).mean()),
            "classifier": FOLDER,
            "figure": FIGURE,
        }
        shown = scores["student"] | {"class_names": result["class_names"]}
        from_first(lambda: draw_or_log(draw_confusion, shown, evaluation.results / FIGURE))
        return result

    @classmethod
    def summary(cls, result: dict[str, Any]) -> str:
        student, teacher, alone = (result[name] for name in ("student", "teacher", "labels_alone"))
        return (
            f"test accuracy {student['test_accuracy']:.1%} of a student of {student['parameters']:,} parameters, "
            f"{teacher['test_accuracy']:.1%} of its teacher of {teacher['parameters']:,}, "
            f"{alone['test_accuracy']:.1%} of the student trained on {result['labelled_images']:,} labels only"
        )


# The teacher and the student


def _teacher_folder(results: Path, options: DistillOptions) -> Path:
    folder = Path(options.teacher) if options.teacher else results / TEACHER_FOLDER
    if not (folder / HEAD_FACTS).is_file():
        overwrite = " with --overwrite" if options.teacher is None and (results / "fine_tune.json").is_file() else ""
        raise ValueError(
            f"distill needs a teacher, but {folder} has no classifier; run the task fine_tune{overwrite} on the same "
            f"results first, or set distill.teacher to a folder that it wrote."
        )
    return folder


def _load_teacher(evaluation: Evaluation, options: DistillOptions) -> LoadedClassifier:
    """Raises ValueError if the teacher has another palette, resolution or classes, or, unless distill.teacher names it,
    was fine-tuned from another model."""
    folder = _teacher_folder(evaluation.results, options)
    teacher = load_classifier(folder)
    check_match(teacher.loaded, folder, evaluation.shards)
    if teacher.classes != evaluation.shards.classes:
        raise ValueError(
            f"{folder} has {_listed(teacher.classes)}, but {evaluation.shards.path} has "
            f"{_listed(evaluation.shards.classes)}; the teacher must be fine-tuned on the same classes."
        )
    if options.teacher is None and teacher.facts.get("model_digest") != evaluation.model_digest:
        raise ValueError(
            f"{folder} was fine-tuned from another model; run the task fine_tune on this model, or set distill.teacher "
            f"to the folder."
        )
    teacher.classifier.requires_grad_(False)
    return teacher


def _listed(classes: list[str]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"


def _load_student(evaluation: Evaluation, teacher: LoadedModel, options: DistillOptions) -> LoadedModel:
    """The student before training: the model that `student` names, or initial weights of the teacher's model type.

    Raises ValueError if it does not match the shard set.
    """
    if options.student is not None:
        path = Path(options.student)
        return load_matching(from_first(lambda: model_folder(path)), evaluation.shards)
    masked = teacher.mask_probability is not None
    config = gpt2_config(_shape(teacher, options), teacher.config.colors, "masked_color" if masked else "next_color")
    if masked:
        config.mask_probability = teacher.mask_probability
    model = build_model(config)
    initialize(model, evaluation.seed)
    return replace(teacher, model=model.eval(), config=config)


def _shape(teacher: LoadedModel, options: DistillOptions) -> ModelConfig:
    """The shape of a student with initial weights. Raises ValueError if its heads do not divide its width."""
    config = teacher.config
    width = options.width or max(1, config.n_embd // 2)
    max_heads = max(1, width * config.n_head // config.n_embd)
    heads = options.heads or max(heads for heads in range(1, max_heads + 1) if width % heads == 0)
    if width % heads:
        raise ValueError(f"distill.heads is {heads}; it must divide the student's width, {width}.")
    layers = options.layers or max(1, config.n_layer // 2)
    block = cast(Literal["igpt", "gpt2"], teacher.block)
    return ModelConfig(size=None, layers=layers, width=width, heads=heads, resolution=teacher.resolution, block=block)


def _teacher_images(evaluation: Evaluation, teacher: LoadedClassifier) -> ImageSubset | None:
    """The labelled images on which the teacher was trained, if they are of this shard set."""
    facts = teacher.facts
    if facts.get("dataset_digest") != evaluation.shards.digest or "train_images" not in facts:
        return None
    return choose_images(evaluation.shards, "train", limit=facts["train_images"], seed=facts["seed"], labelled=True)


# Losses and scores


def distillation_loss(teaching: Evaluation, teacher: nn.Module, learning: Evaluation, temperature: float) -> Losses:
    """The cross-entropy of the student's distribution over classes against the teacher's."""

    def losses(module: nn.Module, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            teacher_inputs, _ = teaching.inputs_and_targets(batch.tokens, batch.indices, batch.epoch)
            teacher_logits = teacher(teacher_inputs)[1]  # (B, C)
        inputs, _ = learning.inputs_and_targets(batch.tokens, batch.indices, batch.epoch)
        return softened_loss(module(inputs)[1], teacher_logits, temperature)[:, None]  # (B, 1)

    return losses


def _described(
    evaluation: Evaluation,
    classifier: nn.Module,
    name: str,
    images: dict[str, ImageSubset],
    validation: dict[str, Any],
) -> tuple[dict[str, Any], np.ndarray]:
    """The result of one of the three classifiers, and the class that it predicts for each test image, int (N,)."""
    config = evaluation.model.config
    classes = occurring_classes(images)
    scores, predicted = test_classifier(evaluation, classifier, images["test"], classes, f"distill, test of {name}")
    shape = {
        "layers": config.n_layer,
        "width": config.n_embd,
        "heads": config.n_head,
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
    }
    return shape | validation | scores, predicted
