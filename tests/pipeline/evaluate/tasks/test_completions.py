"""Half images completed: what is given stays, what is drawn follows the seed, the figure and the command."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.shards.reader import ShardSet
from pipeline.evaluate.complete import complete_command
from pipeline.evaluate.options import CompletionsOptions
from pipeline.evaluate.tasks.completions import Completions, choose_examples, with_titles
from pipeline.model.sampling import complete_halves
from pipeline.model_folder.convert import load_model_folder
from tests.pipeline.evaluate.tiny_sets import COLORS, RESOLUTION
from tests.pipeline.evaluate.toy_network import write_toy_network


@pytest.fixture
def command(shards_folder: Path, model_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(*arguments: str, model: Path = model_folder) -> Path:
        out = tmp_path / "completions.png"
        assert complete_command([str(model), "--shards", str(shards_folder), "--out", str(out), *arguments]) == 0
        return out

    return run


def test_upper_halves_stay_and_lower_halves_are_drawn(shards: ShardSet, model_folder: Path) -> None:
    model = load_model_folder(model_folder).model
    tokens, _ = shards.split("test").gather(np.arange(5))
    drawn = complete_halves(model, tokens, samples=3, seed=0)
    half = RESOLUTION**2 // 2
    assert drawn.shape == (5, 3, RESOLUTION**2)
    assert drawn.dtype == np.uint16
    np.testing.assert_array_equal(drawn[:, :, :half], np.repeat(tokens[:, None, :half], 3, axis=1))
    assert drawn.max() < COLORS
    assert not np.array_equal(drawn[:, 0], drawn[:, 1])
    np.testing.assert_array_equal(drawn, complete_halves(model, tokens, samples=3, seed=0))
    assert not np.array_equal(drawn, complete_halves(model, tokens, samples=3, seed=1))


def test_examples_are_of_different_classes_first(shards: ShardSet) -> None:
    for seed in range(10):
        chosen = choose_examples(shards, "valid", 8, seed)
        _, labels = shards.split("valid").gather(chosen)
        assert set(labels[:3].tolist()) == {0, 1, 2}
        assert len(set(chosen.tolist())) == 8
    chosen = choose_examples(shards, "valid", 8, seed=3)
    np.testing.assert_array_equal(chosen, choose_examples(shards, "valid", 8, seed=3))
    assert not np.array_equal(chosen, choose_examples(shards, "valid", 8, seed=4))


def test_titles_are_above_an_unchanged_grid() -> None:
    grid = np.random.default_rng(0).integers(0, 256, (50, 300, 3), dtype=np.uint8)
    titled = with_titles(grid, ["given half", "sample 1", "original"], "test, seed 3, temperature 1")
    height = (len(titled) - 50) // 2
    above, below = titled[:height], titled[-height:]
    np.testing.assert_array_equal(titled[height:-height], grid)
    assert all((above[:, start : start + 100] < 128).any() for start in (0, 100, 200))
    assert (below[:, :200] < 128).any()
    other = with_titles(grid, ["given half", "sample 1", "original"], "test, seed 4, temperature 1")
    assert (other != titled).any()


def test_the_command_writes_the_grid(command: Callable[..., Path], shards: ShardSet) -> None:
    image = np.asarray(Image.open(command("--images", "3", "--samples", "2", "--split", "valid")))
    original, _ = shards.split("valid").gather(choose_examples(shards, "valid", 3, seed=0))
    colors = np.rint(127.5 * (shards.palette[original[0]] + 1)).astype(np.uint8)
    # 2 samples between the given half and the original; the last column's last cell ends in the last color.
    assert image.shape[1] > 4 * 90
    assert (image == colors[-1]).all(axis=2).any()
    again = np.asarray(Image.open(command("--images", "3", "--samples", "2", "--split", "valid")))
    np.testing.assert_array_equal(image, again)


def test_a_masked_model_cant_complete(command: Callable[..., Path], masked_folder: Path) -> None:
    with pytest.raises(ValueError, match="trained with masked_color: it predicts masked pixels and can't generate"):
        command(model=masked_folder)


def test_another_feature_network_under_the_same_name_is_another_measurement(tmp_path: Path) -> None:
    options = CompletionsOptions(feature_network=str(write_toy_network(tmp_path / "toy.pt")))
    first = Completions(options).other_inputs(tmp_path)
    write_toy_network(tmp_path / "toy.pt", returns_features=True)
    assert Completions(options).other_inputs(tmp_path) != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "images is 0; it must be at least 1"),
        (["--images", "999"], "images is 999, but .* has 130 images in its split test"),
        (["--temperature", "-1"], "temperature is -1.0; it must be at least 0"),
        (["--split", "dev"], "has no split 'dev'; it has train, valid, test"),
        (["--out", "a.jpg"], r"--out is a.jpg; it must be a file that ends in \.png"),
        (["--rows", "4"], "rows is not a known key"),
    ],
)
def test_invalid_input_is_one_sentence(
    arguments: list[str], message: str, command: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        command(*arguments)
    assert not list(tmp_path.iterdir())
