"""The class head against transformers' own classifier and a manual forward pass; its folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel

from pipeline.config import ModelConfig
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import gpt2_config
from pipeline.model.objectives import joint_loss, next_color
from pipeline.model_folder.classifier import Classifier, load_classifier, save_classifier

COLORS, SIDE = 24, 6
CLASSES = ["cat", "dog", "frog"]


def classifier_of(objective: str = "next_color") -> Classifier:
    """With weights such that nothing is zero."""
    shape = ModelConfig(size=None, layers=3, width=16, heads=2, resolution=SIDE)
    config = gpt2_config(shape, COLORS, objective)
    if objective == "masked_color":
        config.mask_probability = 0.15
    model = build_model(config)
    initialize(model, seed=0)
    classifier = Classifier(model, len(CLASSES))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (model.lm_head.weight, classifier.score.weight):
            weight.copy_(torch.randn(weight.shape, generator=random))
    return classifier.eval()


@pytest.fixture
def palette() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (COLORS, 3)).astype(np.float32)


@pytest.fixture
def folder(palette: np.ndarray, tmp_path: Path) -> Path:
    save_classifier(classifier_of(), palette, CLASSES, tmp_path / "classifier", {"seed": 3})
    return tmp_path / "classifier"


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(COLORS, (5, SIDE**2), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_logits_match_transformers(folder: Path, images: torch.Tensor) -> None:
    inputs, _ = next_color(images, COLORS)
    found = load_classifier(folder).classifier(inputs)[1]

    theirs = ImageGPTForImageClassification.from_pretrained(folder).eval()
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    weights = load_file(folder / "class_head.safetensors")
    theirs.score.load_state_dict({"weight": weights["score.weight"]})
    np.testing.assert_allclose(found, theirs(input_ids=inputs).logits, atol=1e-5)

    by_hand = ImageGPTModel.from_pretrained(folder).eval()(input_ids=inputs).last_hidden_state  # (B, T, D)
    np.testing.assert_allclose(found, by_hand.mean(1) @ weights["score.weight"].T, atol=1e-5)


@torch.no_grad()
def test_the_joint_loss_matches_transformers(folder: Path, images: torch.Tensor) -> None:
    labels = torch.tensor([0, 2, 1, 1, 0])
    inputs, targets = next_color(images, COLORS)
    token_logits, class_logits = load_classifier(folder).classifier(inputs, generative=True)
    found = joint_loss(token_logits, targets, class_logits, labels, COLORS).mean()

    theirs = ImageGPTForImageClassification.from_pretrained(folder).eval()
    theirs.score.load_state_dict({"weight": load_file(folder / "class_head.safetensors")["score.weight"]})
    # Their target is the next token of the input, so the last color of the image is not a target.
    generative = ImageGPTForCausalImageModeling.from_pretrained(folder).eval()
    logits = generative(input_ids=inputs).logits.double()  # (B, T, V)
    last = torch.nn.functional.cross_entropy(logits[:, -1], targets[:, -1])
    of_others = generative(input_ids=inputs, labels=inputs).loss.double()
    side = SIDE**2
    expected = ((side - 1) * of_others + last) / side + theirs(input_ids=inputs, labels=labels).loss
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def test_before_training_all_classes_are_equal(images: torch.Tensor) -> None:
    classifier = Classifier(classifier_of().model, 3)
    token_logits, class_logits = classifier(next_color(images, COLORS)[0])
    assert token_logits is None
    assert not class_logits.any()


@torch.no_grad()
@pytest.mark.parametrize("objective", ["next_color", "masked_color"])
def test_what_is_saved_is_read_back(objective: str, palette: np.ndarray, images: torch.Tensor, tmp_path: Path) -> None:
    classifier = classifier_of(objective)
    save_classifier(classifier, palette, CLASSES, tmp_path / "folder", {"seed": 3})
    read = load_classifier(tmp_path / "folder")
    for ours, theirs in zip(classifier(images, generative=True), read.classifier(images, generative=True), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)  # queries were scaled and back
    assert (read.classes, read.facts, read.loaded.resolution) == (CLASSES, {"seed": 3}, SIDE)
    assert (read.loaded.mask_probability is None) == (objective == "next_color")


def test_recomputed_blocks_give_the_same_gradients(images: torch.Tensor) -> None:
    gradients = []
    for recompute in (False, True):
        classifier = classifier_of().train()
        classifier.prepare_training(generative=False, recompute=recompute)
        assert not classifier.model.lm_head.weight.requires_grad
        classifier(next_color(images, COLORS)[0])[1].square().sum().backward()
        gradients.append(classifier.model.transformer.h[0].attn.c_attn.weight.grad)
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-6)


def test_folders_without_a_classifier(folder: Path) -> None:
    head = load_file(folder / "class_head.safetensors")["score.weight"]
    save_file({"score.weight": head * torch.nan}, folder / "class_head.safetensors")
    with pytest.raises(ValueError, match=r"has NaN or Inf in 48 of 48 values of score\.weight"):
        load_classifier(folder)
    save_file({"score.weight": head[:2].contiguous()}, folder / "class_head.safetensors")
    with pytest.raises(ValueError, match=r"has a head of shape \(2, 16\); with 3 classes and width 16 it must be"):
        load_classifier(folder)
    (folder / "class_head.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"class_head.safetensors can't be read"):
        load_classifier(folder)
    (folder / "class_head.json").write_text(json.dumps({"classes": []}))
    with pytest.raises(ValueError, match="has no list of classes"):
        load_classifier(folder)
    (folder / "class_head.json").unlink()
    with pytest.raises(ValueError, match=r"has no class_head.json; give a folder that the task fine_tune"):
        load_classifier(folder)
