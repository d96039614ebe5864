"""The card that export writes: from the record of the run alone, and with code that runs."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from skimage import data

from data_prep.palette.codec import save_palette
from data_prep.shards.reader import open_shard_set
from pipeline.evaluate.features.pooled import pooled_layers
from pipeline.model.objectives import next_color
from pipeline.model_folder.card import write_card
from pipeline.model_folder.convert import load_model_folder
from pipeline.model_folder.tensorboard_events import copy_events
from tests.launch import run
from tests.pipeline.evaluate.tiny_sets import COLORS, RESOLUTION, random_palette, write_model


def test_the_code_for_a_masked_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model", objective="masked_color")
    write_card(folder, folder.name)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code[1], names)
    assert not names["model"].config.is_causal


def write_images(folder: Path) -> None:
    """Images of every kind that differs in how it is read, each a class of its own."""
    coffee, astronaut = (Image.fromarray(image) for image in (data.coffee(), data.astronaut()))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    for name, image, options in (
        ("wide.jpg", coffee, {}),
        ("tall.png", coffee.crop((100, 0, 300, 333)), {}),
        ("turned.jpg", coffee.resize((97, 61)), {"exif": rotated}),
        ("gray.jpg", astronaut.convert("L"), {}),
        ("transparent.png", astronaut.resize((50, 40)).convert("RGBA"), {}),
        ("few.png", astronaut.quantize(9), {}),
        ("small.png", coffee.resize((4, 5)), {}),
    ):
        path = folder / "train" / name.partition(".")[0] / name
        path.parent.mkdir(parents=True)
        image.save(path, **options)


@pytest.mark.parametrize(("block", "layer"), [("igpt", None), ("igpt", 3), ("gpt2", 2)])
def test_the_code_gives_the_tokens_of_a_shard_set_and_the_features_of_probes(
    block: str, layer: int | None, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "model", block)
    write_card(folder, folder.name, layer=layer)
    sampling, features = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    shards = open_shard_set(pictures / "shards")
    tokens, labels = shards.split("train").gather(np.arange(7))
    names: dict[str, Any] = {}
    exec(sampling, names)
    Path("photo.jpg").symlink_to(pictures / "train/wide/wide.jpg")
    exec(features, names)
    read = {path.parent.name: names["to_tokens"](path) for path in pictures.glob("train/*/*")}
    for label, expected in zip(labels, tokens, strict=True):
        np.testing.assert_array_equal(read[shards.classes[label]], expected, err_msg=shards.classes[label])

    model = load_model_folder(folder).model
    with torch.no_grad(), pooled_layers(model) as pooled:
        model.transformer(next_color(read["wide"][None], COLORS)[0])
    torch.testing.assert_close(names["features"], pooled[1 if layer is None else layer], atol=1e-5, rtol=0)
    half = RESOLUTION**2 // 2
    assert torch.equal(names["completed"][:half], read["wide"][:half])
    assert Image.open("completed.png").size == Image.open("sample.png").size == (RESOLUTION, RESOLUTION)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and in `shards` a set of them."""
    folder = tmp_path_factory.mktemp("pictures")
    write_images(folder)
    save_palette(folder / "palette.npy", random_palette())
    size = [f"--resolution={RESOLUTION}", f"--palette.colors={COLORS}", f"--palette.file={folder / 'palette.npy'}"]
    source = ["--source.kind=image_folder", f"--source.path={folder}", "--valid_fraction=0"]
    options = [*size, *source, "--views.random_crop=never", f"--out={folder / 'shards'}"]
    finished = run(1, "-m", "data_prep", "shards", *options, logs=folder / "logs")
    assert finished.codes == [0], finished.output
    return folder


@pytest.mark.parametrize(("scales", "heads", "named"), [(True, 2, True), (True, 1, False), (False, 2, False)])
def test_a_folder_that_old_versions_compute_otherwise(scales: bool, heads: int, named: bool, tmp_path: Path) -> None:
    """Exported before the scale was in the weights: heads of width 8, and of 16, whose root is a whole number."""
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"scale_attn_weights": scales, "n_head": heads}
    (folder / "config.json").write_text(json.dumps(config))
    write_card(folder, "model")
    assert ("5.21 or later" in (folder / "README.md").read_text()) == named


def test_a_license_that_the_hub_does_not_list(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    write_card(folder, "model", "cc-by-4.0")
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("cc-by-4.0", "cc-by-4"))
    with pytest.raises(ValueError, match=r"model's README.md is 'cc-by-4', .* such as cc-by-4.0, or other"):
        write_card(folder, "model")
    write_card(folder, "model", "other")


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
