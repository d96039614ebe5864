"""The card that export writes: from the record of the run alone, and with code that runs."""

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from pipeline.model_folder.card import write_card
from tests.pipeline.evaluate.tiny_sets import write_model


def test_the_code_for_a_masked_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model", objective="masked_color")
    write_card(folder, folder.name)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code[1], names)
    assert not names["model"].config.is_causal


def test_sections_stand_after_the_training_and_the_license_remains(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    write_card(folder, "model", "mit", "lab/dots", sections=["## Results\n\nGood.", ""])
    card = ModelCard.load(folder / "README.md")
    assert re.findall("^## .*", card.text, re.M) == ["## Use", "## Results", "## Limits and biases", "## What is here"]
    write_card(folder, "model")
    again = ModelCard.load(folder / "README.md")
    assert (again.data.license, again.data.datasets) == ("mit", ["lab/dots"])
    assert "## Results" not in again.text
