"""Distillation of a fine-tuned teacher into a smaller student, on pictures without labels.

The third stage of SimCLRv2 (Chen et al. 2020b, "Big Self-Supervised Models are Strong Semi-Supervised Learners",
section 2): the student learns the teacher's distribution over classes, by - sum p_teacher ln p_student with both
softened by a temperature, on all pictures of a split whose labels are not looked at. Teacher and student see the same
flipped and cropped picture. Labels serve twice: the teacher learned from some, and validation chooses rate and epoch.

The teacher is what the task fine_tune left in the results, or any such folder. The student begins from another model
(a model folder or a run), or from initial weights, by default with half the teacher's blocks and half its width. Beside
it stands the same student taught by labels alone: by class loss on the labelled pictures, those that the teacher had
where they are of the same shard set, with the same rates, the same number of steps and pictures, and the same choice on
validation. A teacher that learned from few labels is made by fine_tune with --train_images into other results.

Adam as in pretraining, under a cosine; temperature, rates and epochs are chosen here. To try it on a CPU:
--distill.learning_rates [0.003] --distill.epochs 5.

The result, beside what is said of the pictures:

    split, unlabelled_images, labelled_images, class_names, temperature, images_per_training (at most)
    teacher, student, labels_alone    of each: layers, width, heads, parameters, valid_accuracy, test_accuracy,
                                      test_standard_error, test_accuracy_by_class, confusion (and of masked models by
                                      vote); of the students also learning_rate, best_epoch and trials, as of fine_tune
    agreement                         share of the test pictures for which student and teacher say the same class
    classifier                        a folder in the results: the distilled student
    figure                            the student's confusion matrix
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pipeline.config import require_at_least, require_positive
from pipeline.evaluate.classifiers.recipe import WholeModelRecipe
from pipeline.evaluate.context import Evaluation, Pictures, check_match, choose_pictures, from_first
from pipeline.evaluate.features.labelled import unfit as unfit
from pipeline.evaluate.tasks.fine_tune import FOLDER as TEACHER_FOLDER

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from pipeline.config import ModelConfig
    from pipeline.evaluate.classifiers.finetune_loop import Batch, Losses, Training
    from pipeline.model_folder.classifier import LoadedClassifier
    from pipeline.model_folder.convert import LoadedModel

FOLDER = "distilled"
FIGURE = "distill.png"


@dataclass(frozen=True, kw_only=True)
class Options(WholeModelRecipe):
    """Distillation of a fine-tuned model into a smaller one."""

    TASK: ClassVar[str] = "distill"

    epochs: int = 50
    """Passes over the unlabelled pictures; the rate falls to zero by half a cosine over them."""
    patience: int = 0
    """Stop after so many epochs without a better validation accuracy; 0 never stops early."""
    teacher: str | None = None
    """A classifier's folder; what fine_tune left in the results if not set."""
    student: str | None = None
    """A run, a checkpoint or a model folder that the student begins from; initial weights if not set."""
    layers: int | None = None
    """Blocks of a student from initial weights; half the teacher's if not set."""
    width: int | None = None
    """Its width; half the teacher's if not set."""
    heads: int | None = None
    """Its heads; of the same width as the teacher's, as far as that divides, if not set."""
    split: str = "train"
    """The split whose pictures, labelled or not, are learned from."""
    temperature: float = 1.0
    """Both distributions are softened by it."""
    learning_rates: list[float] = field(default_factory=lambda: [3e-3, 1e-3, 3e-4])
    """Peak rates to try; each is a training of its own, of the student and of the one taught by labels alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rates(self.learning_rates)
        require_positive(f"{self.TASK}.temperature", self.temperature)
        for name in ("layers", "width", "heads"):
            value = getattr(self, name)
            if value is None:
                continue
            require_at_least(f"{self.TASK}.{name}", value, 1)
            if self.student is not None:
                raise ValueError(
                    f"{self.TASK}.{name} is {value}, but {self.TASK}.student is {self.student}, which has a shape of "
                    f"its own; give one or the other."
                )
        if self.split in ("valid", "test"):
            raise ValueError(f"{self.TASK}.split is {self.split}; it must be another than valid and test.")


def read_besides(results: Path, options: Options) -> dict[str, str]:
    """Digests of the teacher and of the student's beginning: other ones are another measurement.

    Raises ValueError if there is no teacher, or no such student.
    """
    from pipeline.model_folder.files import model_digest
    from pipeline.model_folder.resolve import model_folder

    teacher = _teacher_folder(results, options)
    student = {} if options.student is None else {"student_digest": model_digest(model_folder(Path(options.student)))}
    return {"teacher_digest": model_digest(teacher), **student}


def check(evaluation: Evaluation, options: Options, coming: list[str]) -> None:
    """Raises ValueError if the teacher or the student does not fit the shard set, or the split is absent."""
    options.check_fits(evaluation.shards.resolution)
    evaluation.pictures(options.split)
    to_come = options.teacher is None and "fine_tune" in coming  # it will be this model, fine-tuned
    teacher = evaluation.model if to_come else _load_teacher(evaluation, options).loaded
    if options.student is None:
        _shape(teacher, options)
    else:
        from pipeline.model_folder.resolve import model_folder

        _load_student(model_folder(Path(options.student)), evaluation)


def measure(evaluation: Evaluation, options: Options) -> dict[str, Any]:
    """Trains both students, tests them and the teacher, and writes the distilled one.

    Raises ValueError if the teacher or the student does not fit the shard set, or a split is absent or unlabelled.
    """
    from pipeline.evaluate.classifiers.finetune_loop import search
    from pipeline.evaluate.features.labelled import description, labelled_splits

    options.check_fits(evaluation.shards.resolution)
    teacher = _load_teacher(evaluation, options)
    student = _beginning(evaluation, teacher, options)
    unlabelled = evaluation.pictures(options.split)
    pictures = labelled_splits(evaluation, Options.TASK)
    pictures["train"] = _teachers_pictures(evaluation, teacher) or pictures["train"]
    # How a picture is read is the model's matter.
    taught, learning = replace(evaluation, model=teacher.loaded), replace(evaluation, model=student)
    teacher.classifier.to(evaluation.accelerator.device)

    scores, said = {}, {}
    scores["teacher"], said["teacher"] = _judged(taught, teacher.classifier, "teacher", pictures)
    for name, losses, lessons in (
        ("student", _teachers_word(taught, teacher.classifier, learning, options.temperature), unlabelled),
        ("labels_alone", _labels_word(learning), pictures["train"]),
    ):
        trial = partial(_training, learning, options, name, losses, lessons, len(unlabelled), pictures["valid"])
        module, trials = search(learning, options.learning_rates, trial, options)
        scores[name], said[name] = _judged(learning, module, name, pictures, trials)
        if name == "student":
            from_first(evaluation.accelerator, partial(_write, learning, module, teacher, options))
    result = {
        **description(evaluation, pictures),
        "split": options.split,
        "unlabelled_images": len(unlabelled),
        "labelled_images": len(pictures["train"]),
        "images_per_training": options.epochs * len(unlabelled),
        "temperature": options.temperature,
        "teacher_folder": str(_teacher_folder(evaluation.results, options)),
        **scores,
        "agreement": float((said["student"] == said["teacher"]).mean()),
        "classifier": FOLDER,
        "figure": FIGURE,
    }
    from_first(evaluation.accelerator, partial(_draw, result, evaluation.results / FIGURE))
    return result


def summary(result: dict[str, Any]) -> str:
    """The result in a line."""
    student, teacher, alone = (result[name] for name in ("student", "teacher", "labels_alone"))
    return (
        f"test accuracy {student['test_accuracy']:.1%} of a student of {student['parameters']:,} parameters, "
        f"{teacher['test_accuracy']:.1%} of its teacher of {teacher['parameters']:,}, "
        f"{alone['test_accuracy']:.1%} of the student taught by {result['labelled_images']:,} labels alone"
    )


# The teacher and the student


def _teacher_folder(results: Path, options: Options) -> Path:
    from pipeline.model_folder.classifier import HEAD_FACTS

    folder = Path(options.teacher) if options.teacher else results / TEACHER_FOLDER
    if not (folder / HEAD_FACTS).is_file():
        again = " with --again" if options.teacher is None and (results / "fine_tune.json").is_file() else ""
        raise ValueError(
            f"distill needs a teacher, and {folder} is none; run the task fine_tune{again} on the same results before, "
            f"or name a folder that it wrote with distill.teacher."
        )
    return folder


def _load_teacher(evaluation: Evaluation, options: Options) -> "LoadedClassifier":
    """Raises ValueError if it is of another palette, resolution, classes, or, unless it was named, another model."""
    from pipeline.model_folder.classifier import load_classifier

    folder = _teacher_folder(evaluation.results, options)
    teacher = load_classifier(folder)
    check_match(teacher.loaded, folder, evaluation.shards)
    if teacher.classes != evaluation.shards.classes:
        raise ValueError(
            f"{folder} knows {_words(teacher.classes)}, but {evaluation.shards.path} has "
            f"{_words(evaluation.shards.classes)}; the teacher must be fine-tuned on the same classes."
        )
    if options.teacher is None and teacher.facts.get("model_digest") != evaluation.model_digest:
        raise ValueError(
            f"{folder} was fine-tuned from another model than this one; run the task fine_tune on this one, or name it "
            f"with distill.teacher."
        )
    teacher.classifier.requires_grad_(False)
    return teacher


def _words(classes: list[str]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"


def _beginning(evaluation: Evaluation, teacher: "LoadedClassifier", options: Options) -> "LoadedModel":
    """The student before it is taught. Raises ValueError if it does not fit the shard set."""
    from pipeline.model_folder.resolve import model_folder

    if options.student is None:
        return _untaught(evaluation, teacher.loaded, options)
    folder = from_first(evaluation.accelerator, partial(model_folder, Path(options.student)))
    return _load_student(folder, evaluation)


def _load_student(folder: Path, evaluation: Evaluation) -> "LoadedModel":
    from pipeline.model_folder.convert import load_model_folder

    student = load_model_folder(folder)
    check_match(student, folder, evaluation.shards)
    return student


def _untaught(evaluation: Evaluation, teacher: "LoadedModel", options: Options) -> "LoadedModel":
    """Initial weights in the teacher's kind of model."""
    from pipeline.model.gpt import build_model, gpt2_config, initialize

    masked = teacher.mask_probability is not None
    config = gpt2_config(_shape(teacher, options), teacher.config.colors, "masked_color" if masked else "next_color")
    if masked:
        config.mask_probability = teacher.mask_probability
    model = build_model(config)
    initialize(model, evaluation.seed)
    return replace(teacher, model=model.eval(), config=config)


def _shape(teacher: "LoadedModel", options: Options) -> "ModelConfig":
    """Of a student from initial weights. Raises ValueError if its width can't be divided among its heads."""
    from pipeline.config import ModelConfig

    theirs = teacher.config
    width = options.width or max(1, theirs.n_embd // 2)
    most = max(1, width * theirs.n_head // theirs.n_embd)
    heads = options.heads or max(heads for heads in range(1, most + 1) if width % heads == 0)
    if width % heads:
        raise ValueError(f"distill.heads is {heads}; it must divide the student's width, {width}.")
    layers = options.layers or max(1, theirs.n_layer // 2)
    block = cast(Literal["igpt", "gpt2"], teacher.block)
    return ModelConfig(size=None, layers=layers, width=width, heads=heads, resolution=teacher.resolution, block=block)


def _teachers_pictures(evaluation: Evaluation, teacher: "LoadedClassifier") -> Pictures | None:
    """The labelled pictures that the teacher learned from, if they are of this shard set."""
    told = teacher.facts
    if told.get("dataset_digest") != evaluation.shards.digest or "train_images" not in told:
        return None
    return choose_pictures(evaluation.shards, "train", limit=told["train_images"], seed=told["seed"], labelled=True)


# What they learn, and how well


def _teachers_word(taught: Evaluation, teacher: "nn.Module", learning: Evaluation, temperature: float) -> "Losses":
    """The loss of a student that is to say what the teacher says."""
    import torch

    from pipeline.model.objectives import softened_loss

    def losses(module: "nn.Module", batch: "Batch") -> "torch.Tensor":
        with torch.no_grad():
            read, _ = taught.inputs_and_targets(batch.tokens, batch.indices, batch.epoch)
            wanted = teacher(read)[1]  # (B, C)
        inputs, _ = learning.inputs_and_targets(batch.tokens, batch.indices, batch.epoch)
        return softened_loss(module(inputs)[1], wanted, temperature)[:, None]  # (B, 1)

    return losses


def _labels_word(learning: Evaluation) -> "Losses":
    """The loss of a student that is to say the label."""
    from pipeline.model.objectives import class_loss

    def losses(module: "nn.Module", batch: "Batch") -> "torch.Tensor":
        inputs, _ = learning.inputs_and_targets(batch.tokens, batch.indices, batch.epoch)
        return class_loss(module(inputs)[1], batch.labels)[:, None]  # (B, 1)

    return losses


def _training(
    learning: Evaluation,
    options: Options,
    name: str,
    losses: "Losses",
    lessons: Pictures,
    images_per_epoch: int,
    valid: Pictures,
    rate: float,
) -> "Training":
    from pipeline.evaluate.classifiers.finetune_loop import Training, adam
    from pipeline.evaluate.metrics.classification import valid_accuracy
    from pipeline.model_folder.classifier import Classifier

    model = deepcopy(learning.model.model).to(learning.accelerator.device)
    classifier = Classifier(model, len(learning.shards.classes))
    classifier.prepare_training(generative=False, recompute=options.recompute)
    return Training(
        name=f"{Options.TASK}-{name}-rate-{rate}",
        module=classifier,
        optimizer=adam(classifier, rate),
        losses=losses,
        accuracies=lambda: valid_accuracy(learning, classifier, valid),
        pictures=lessons,
        images_per_epoch=images_per_epoch,
        clip_norm=options.clip_norm,
        cosine=True,
    )


def _judged(
    evaluation: Evaluation,
    classifier: "nn.Module",
    name: str,
    pictures: dict[str, Pictures],
    trials: list[dict[str, Any]] | None = None,
) -> "tuple[dict[str, Any], np.ndarray]":
    """What the result says of one of the three, and the class it says of each test picture, int (N,)."""
    from pipeline.evaluate.classifiers.finetune_loop import best_of
    from pipeline.evaluate.metrics.classification import classes_said, test_scores, valid_accuracy

    config, first_look = evaluation.model.config, []

    def said(draw: int) -> "np.ndarray":
        classes = classes_said(evaluation, classifier, pictures["test"], f"distill, test of {name}", draw)
        first_look.append(classes)
        return classes

    if trials is None:
        validation: dict[str, Any] = {
            "valid_accuracy": float(valid_accuracy(evaluation, classifier, pictures["valid"])[0])
        }
    else:
        best = best_of(trials)
        validation = {key: best[key] for key in ("learning_rate", "best_epoch", "valid_accuracy")} | {"trials": trials}
    scores = {
        "layers": config.n_layer,
        "width": config.n_embd,
        "heads": config.n_head,
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        **validation,
        **test_scores(evaluation, pictures["test"], said),
    }
    return scores, first_look[0]


def _write(learning: Evaluation, classifier: "nn.Module", teacher: "LoadedClassifier", options: Options) -> None:
    from pipeline.model_folder.classifier import save_classifier

    facts = {"task": Options.TASK, "teacher": teacher.facts, "temperature": options.temperature}
    facts |= {"dataset": learning.shards.name, "dataset_digest": learning.shards.digest, "seed": learning.seed}
    palette, classes = learning.shards.palette, learning.shards.classes
    save_classifier(deepcopy(classifier).cpu(), palette, classes, learning.results / FOLDER, facts)


def _draw(result: dict[str, Any], path: Path) -> None:
    from pipeline.evaluate.metrics.classification import draw_confusion

    draw_confusion(result["student"] | {"class_names": result["class_names"]}, path)
