"""A model with a class head, whose logits come from the mean-pooled output of the last norm, and its folder.

As the paper fine-tunes (Chen et al. 2020, section 2.3): the mean over positions of the output of ln_f, then a linear
layer without bias, initialized to zero. transformers' ImageGPTForImageClassification computes the same.

The folder is a model folder (convert.py) with two more files: `class_head.safetensors` with `score.weight`
(classes, D), and `class_head.json` with the names of the classes and facts about the training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import GPT2LMHeadModel

from data_prep.common.files import read_json, write_json
from pipeline.model.recompute import recompute_blocks
from pipeline.model_folder.convert import LoadedModel, load_model_folder, save_model_folder
from pipeline.weights.folder_reader import check_finite

HEAD_WEIGHTS = "class_head.safetensors"
HEAD_FACTS = "class_head.json"
HEAD_NAME = "score.weight"


class Classifier(nn.Module):
    """A model of images and its class head."""

    def __init__(self, model: GPT2LMHeadModel, classes: int) -> None:
        super().__init__()
        self.model = model
        self.score = nn.Linear(model.config.n_embd, classes, bias=False, device=next(model.parameters()).device)
        nn.init.zeros_(self.score.weight)

    def forward(self, inputs: torch.Tensor, generative: bool = False) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Logits for inputs long (B, T): colors (B, T, V), or None unless `generative`; classes, fp32 (B, C)."""
        states = self.model.transformer(inputs).last_hidden_state  # (B, T, D), after ln_f
        pooled = states.mean(dim=1, dtype=torch.float32)  # (B, D)
        with torch.autocast(inputs.device.type, enabled=False):
            class_logits = functional.linear(pooled, self.score.weight)  # (B, C)
        return (self.model.lm_head(states) if generative else None), class_logits

    def prepare_training(self, *, generative: bool, recompute: bool) -> None:
        """Freezes the output head of the colors unless `generative`; `recompute` turns on activation checkpointing."""
        self.model.lm_head.requires_grad_(generative)
        if recompute:
            recompute_blocks(self.model.transformer.h)


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier's folder, ready to use."""

    loaded: LoadedModel
    classifier: Classifier
    """fp32 on the CPU, in evaluation mode; its `model` is `loaded.model`."""
    classes: list[str]
    facts: dict[str, Any]
    """The facts about the training that `save_classifier` received."""


def save_classifier(
    classifier: Classifier, palette: np.ndarray, classes: list[str], folder: Path, facts: dict[str, Any]
) -> None:
    """Writes the folder atomically, as `save_model_folder` does; `facts` must be JSON data."""

    def add_head(temporary: Path) -> None:
        save_file({HEAD_NAME: classifier.score.weight.detach().float().cpu().contiguous()}, temporary / HEAD_WEIGHTS)
        write_json(temporary / HEAD_FACTS, {"classes": classes} | facts)
        settings = read_json(temporary / "config.json")
        settings["id2label"] = {str(number): name for number, name in enumerate(classes)}
        settings["label2id"] = {name: number for number, name in enumerate(classes)}
        write_json(temporary / "config.json", settings)

    save_model_folder(classifier.model, classifier.model.config, palette, folder, add_files=add_head)


def load_classifier(folder: Path) -> LoadedClassifier:
    """Reads a folder that `save_classifier` wrote. Raises ValueError, one sentence, if it is another or is damaged."""
    if not (folder / HEAD_FACTS).is_file():
        raise ValueError(f"{folder} has no {HEAD_FACTS}; give a folder that the task fine_tune wrote.")
    facts = read_json(folder / HEAD_FACTS)
    classes = facts.pop("classes", None) if isinstance(facts, dict) else None
    if not isinstance(classes, list) or not classes:
        raise ValueError(f"{folder / HEAD_FACTS} has no list of classes; run the task fine_tune again.")
    loaded = load_model_folder(folder)
    try:
        weight = load_file(folder / HEAD_WEIGHTS)[HEAD_NAME]  # (C, D)
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder / HEAD_WEIGHTS} can't be read ({error}); run the task fine_tune again.") from error
    classifier = Classifier(loaded.model, len(classes))
    if weight.shape != classifier.score.weight.shape:
        raise ValueError(
            f"{folder / HEAD_WEIGHTS} has a head of shape {tuple(weight.shape)}; with {len(classes)} classes and width "
            f"{loaded.config.n_embd} it must be {tuple(classifier.score.weight.shape)}."
        )
    check_finite(HEAD_NAME, weight, folder)
    with torch.no_grad():
        classifier.score.weight.copy_(weight)
    return LoadedClassifier(loaded, classifier.eval(), classes, facts)
