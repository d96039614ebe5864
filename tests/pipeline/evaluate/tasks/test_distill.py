"""Distillation: what the student learns and from what, and teachers that do not fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch

from data_prep.common.files import read_json, write_json
from data_prep.shards.reader import ShardSet, open_shard_set
from pipeline.evaluate.cache import TaskCache
from pipeline.evaluate.context import Evaluation, start_accelerator
from pipeline.evaluate.options import DistillOptions, FineTuneOptions, Sizes
from pipeline.evaluate.tasks.distill import Distill
from pipeline.evaluate.tasks.fine_tune import FineTune
from pipeline.model_folder.classifier import load_classifier
from pipeline.model_folder.convert import load_model_folder
from pipeline.weights.model_files import model_digest
from tests.pipeline.evaluate.tiny_sets import (
    RESOLUTION,
    random_palette,
    separable_images,
    write_model,
    write_shard_set,
)

QUICK = DistillOptions(epochs=4, learning_rates=[0.02], global_size=20, reflect_crop=1)
TEACHING = FineTuneOptions(epochs=15, learning_rates=[0.01], global_size=20, reflect_crop=1)


@pytest.fixture(scope="module")
def trained_teacher(model_folder: Path, separable: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model fine-tuned on 60 labels of the separable set."""
    results = tmp_path_factory.mktemp("teacher")
    evaluation = Evaluation(
        model=load_model_folder(model_folder),
        shards=separable,
        results=results,
        accelerator=start_accelerator("fp32"),
        seed=0,
        sizes=Sizes(train_images=60),
        cache=TaskCache.of_task(results, "fine_tune", ""),
        features=results / "features",
        model_digest=model_digest(model_folder),
    )
    FineTune(TEACHING).measure(evaluation)
    return results / "fine_tuned"


@pytest.fixture
def teacher(trained_teacher: Path, tmp_path: Path) -> Path:
    """A copy where the task looks for it."""
    return copytree(trained_teacher, tmp_path / "results" / "fine_tuned")


def relabelled(shards: ShardSet, folder: Path) -> ShardSet:
    """The same images, with other labels in train."""
    splits = {}
    for name in shards.splits:
        split = shards.split(name)
        splits[name] = split.gather(np.arange(split.images))
    tokens, labels = splits["train"]
    splits["train"] = tokens, np.where(labels < 0, labels, (labels + 1) % 3).astype(np.int32)
    return open_shard_set(write_shard_set(folder, splits, shards.palette))


def test_a_student_learns_from_its_teacher_and_no_label(
    teacher: Path, model_folder: Path, evaluation_of: Callable, separable: ShardSet, tmp_path: Path
) -> None:
    evaluation = evaluation_of(model_folder, separable)
    result = Distill(QUICK).measure(evaluation)
    assert result["student"]["test_accuracy"] > 0.85
    assert result["agreement"] > 0.85
    shape = {key: result["student"][key] for key in ("layers", "width", "heads")}
    assert shape == {"layers": 1, "width": 8, "heads": 1}
    assert result["student"]["parameters"] < result["teacher"]["parameters"] / 3
    assert (result["unlabelled_images"], result["labelled_images"]) == (240, 60)  # the teacher's labels
    assert (result["images_per_training"], result["temperature"]) == (960, 1.0)
    for name in ("teacher", "student", "labels_alone"):
        assert f"{result[name]['test_accuracy']:.1%}" in Distill.summary(result)

    classifier, images = load_classifier(teacher), evaluation.images("test")
    tokens = torch.from_numpy(images.tokens().astype(np.int64))
    with torch.no_grad():
        predicted = classifier.classifier(evaluation.inputs_and_targets(tokens, images.indices)[0])[1].argmax(1)
        student = load_classifier(evaluation.results / "distilled").classifier
        students = student(evaluation.inputs_and_targets(tokens, images.indices)[0])[1].argmax(1)
    assert (predicted.numpy() == images.labels).mean() == result["teacher"]["test_accuracy"]
    assert (students.numpy() == images.labels).mean() == result["student"]["test_accuracy"]
    assert (predicted == students).float().mean().item() == pytest.approx(result["agreement"])

    other = relabelled(separable, tmp_path / "relabelled")
    blind = replace(
        evaluation, shards=other, cache=TaskCache.of_task(tmp_path, "blind", ""), results=tmp_path / "blind"
    )
    again = Distill(replace(QUICK, teacher=str(teacher))).measure(blind)
    assert again["student"]["trials"] == result["student"]["trials"]
    assert again["student"]["test_accuracy"] == result["student"]["test_accuracy"]
    assert again["labels_alone"]["test_accuracy"] < 0.3 < result["labels_alone"]["test_accuracy"]
    assert again["labelled_images"] == 200  # of another shard set than the teacher's: all there are


def test_a_student_may_start_from_a_model(
    teacher: Path, model_folder: Path, masked_folder: Path, evaluation_of: Callable, separable: ShardSet
) -> None:
    """A masked student reads masked images, while its teacher does not."""
    evaluation = evaluation_of(model_folder, separable)
    result = Distill(replace(QUICK, student=str(masked_folder), epochs=3)).measure(evaluation)
    assert result["student"]["masks"] == 5
    assert "masks" not in result["teacher"]
    assert result["student"]["test_accuracy"] > 0.85
    initial = load_model_folder(masked_folder)
    trained = load_classifier(evaluation.results / "distilled").loaded
    assert trained.mask_probability == initial.mask_probability
    assert torch.equal(trained.model.lm_head.weight, initial.model.lm_head.weight)


def test_another_teacher_is_another_measurement(teacher: Path, masked_folder: Path, tmp_path: Path) -> None:
    results = teacher.parent
    digests = Distill(QUICK).other_inputs(results)
    assert list(digests) == ["teacher_digest"]
    assert Distill(replace(QUICK, student=str(masked_folder))).other_inputs(results).keys() > digests.keys()
    other = tmp_path / "other"
    copytree(teacher, other)
    assert Distill(replace(QUICK, teacher=str(other))).other_inputs(tmp_path) == digests
    head = bytearray((other / "class_head.safetensors").read_bytes())
    head[-1] ^= 1
    (other / "class_head.safetensors").write_bytes(head)
    assert Distill(replace(QUICK, teacher=str(other))).other_inputs(tmp_path) != digests


def test_teachers_and_students_that_do_not_fit(
    teacher: Path, model_folders: dict[str, Path], evaluation_of: Callable, separable: ShardSet, tmp_path: Path
) -> None:
    evaluation: Evaluation = evaluation_of(model_folders["igpt"], separable)

    def check_error(message: str, evaluation: Evaluation = evaluation, **options: object) -> None:
        with pytest.raises(ValueError, match=message):
            Distill(replace(QUICK, **options)).measure(evaluation)

    with pytest.raises(ValueError, match=r"distill needs a teacher, but .*nowhere.fine_tuned has no classifier"):
        Distill(QUICK).other_inputs(tmp_path / "nowhere")
    check_error("distill needs a teacher", teacher=str(model_folders["igpt"]))
    check_error("was fine-tuned from another model; run the task", evaluation_of(model_folders["gpt2"], separable))
    check_error(r"distill\.heads is 3; it must divide the student's width, 8", heads=3)

    splits = {name: separable_images(20, 0) for name in ("train", "valid", "test")}
    repainted = open_shard_set(write_shard_set(tmp_path / "repainted", splits, random_palette(seed=1)))
    check_error("fine_tuned has palette", replace(evaluation, shards=repainted))
    small = {name: (tokens[:, :16], labels) for name, (tokens, labels) in splits.items()}
    shrunk = open_shard_set(write_shard_set(tmp_path / "shrunk", small, random_palette(), resolution=4))
    check_error("fine_tuned has a model of 6x6 pixels", replace(evaluation, shards=shrunk), reflect_crop=0)
    large = write_model(tmp_path / "large", resolution=RESOLUTION + 2)
    check_error("large has a model of 8x8 pixels, but", student=str(large))

    head = read_json(teacher / "class_head.json")
    write_json(teacher / "class_head.json", head | {"classes": ["cat", "dog", "frog"]})
    check_error(r"fine_tuned has 3 classes \(cat, dog, frog\), but .* has 3 classes \(class 0, class 1, class 2\)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"distill\.temperature is 0\.0; it must be above 0"),
        ({"layers": 0}, r"distill\.layers is 0; it must be at least 1"),
        ({"width": 8, "student": "small"}, r"distill\.width is 8, but distill\.student is small, which has its own"),
        ({"split": "test"}, r"distill\.split is test; valid and test are used for evaluation, so choose"),
        ({"learning_rates": []}, r"distill\.learning_rates is \[\]"),
    ],
)
def test_invalid_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillOptions(**options)
