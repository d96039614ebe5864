"""The files of a model folder that define the model; nothing here loads it."""

from collections.abc import Sequence
from pathlib import Path

from data_prep.common.files import file_sha256, json_digest

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
NEEDED = ("config.json", "preprocessor_config.json")
"""The files that every exported model folder has besides the weights."""
MODEL_FILES = ("config.json", "*.safetensors", "*.bin")
"""The files that define the model; changes of other files do not change the digest."""


def model_digest(folder: Path) -> str:
    """sha256 over the names and digests of the configuration and the weights: equal for equal models."""
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})
    return json_digest([[file.name, file_sha256(file)] for file in files])


def may_replace(folder: Path, files: Sequence[str] = NEEDED) -> bool:
    """Whether a folder may be replaced: it is absent or empty, or it has all of `files` and no .git."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return True
    return all((folder / name).is_file() for name in files) and not (folder / ".git").exists()
