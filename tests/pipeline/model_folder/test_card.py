"""The card that export writes: from the record of the run alone, and with code that runs."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from pipeline.model_folder.card import write_card
from pipeline.model_folder.tensorboard_events import copy_events
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


def test_sections_follow_the_training_and_the_license_is_kept(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    write_card(folder, "model", "mit", "lab/dots", sections=["## Results\n\nGood.", ""])
    card = ModelCard.load(folder / "README.md")
    assert re.findall("^## .*", card.text, re.M) == ["## Use", "## Results", "## Limits and biases", "## Files"]
    write_card(folder, "model")
    again = ModelCard.load(folder / "README.md")
    assert (again.data.license, again.data.datasets) == ("mit", ["lab/dots"])
    assert "## Results" not in again.text


NULL = {"loss": None, "grad_norm": None, "images_per_second": None}


@pytest.mark.parametrize("finite", [True, False])
def test_null_numbers_in_metrics(finite: bool, tmp_path: Path) -> None:
    """metrics.jsonl has null for NaN and Inf: the card shows the last finite losses, or none."""
    folder = write_model(tmp_path / "model")
    (folder / "training").mkdir()
    rows: list[dict[str, Any]] = [
        {"step": 1, "images": 10, "loss": 2.5, "grad_norm": 1.0, "images_per_second": 2.0},
        {"step": 1, "images": 10, "valid_loss": 2.25},
    ]
    rows = rows * finite + [{"step": 2, "images": 20, **NULL}, {"step": 2, "images": 20, "valid_loss": None}]
    (folder / "training/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "training/checkpoint.json").write_text(json.dumps({"step": 2, "images": 20}))
    write_card(folder, "model")
    shown = dict(
        re.findall(
            r"^\| (Last .* loss|Training time \(steps only\)) \| (.*) \|$", (folder / "README.md").read_text(), re.M
        )
    )
    expected = {
        "Last training loss": "2.5000 nats per token",
        "Last validation loss": "2.2500 nats per token",
        "Training time (steps only)": "5 seconds",
    }
    assert shown == (expected if finite else {})


def test_events_with_nan_are_copied(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "run") as writer:
        for step, loss in ((1, 2.5), (2, math.nan), (3, 2.25)):
            writer.add_scalar("train/loss", loss, step)
    copy_events(tmp_path / "run", tmp_path / "copy", 2)
    first, second = EventAccumulator(str(tmp_path / "copy")).Reload().Scalars("train/loss")
    assert (first.step, first.value, second.step) == (1, 2.5, 2)
    assert math.isnan(second.value)
