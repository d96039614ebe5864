"""The files of a model folder that make the model, told without loading it."""

from pathlib import Path

from data_prep.common.files import file_sha256, json_digest

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
MODEL_FILES = ("config.json", "*.safetensors", "*.bin")
"""What loading reads; other files may change and the model is the same."""


def model_digest(folder: Path) -> str:
    """sha256 over the names and digests of the configuration and the weights: equal for equal models."""
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})
    return json_digest([[file.name, file_sha256(file)] for file in files])
