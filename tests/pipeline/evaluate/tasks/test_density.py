"""Density against transformers' loss, the baselines against counting in plain Python."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import GPT2LMHeadModel, ImageGPTForCausalImageModeling

from data_prep.shards.reader import ShardSet
from pipeline.evaluate.cache import clear_unfinished
from pipeline.evaluate.options import DensityOptions
from pipeline.evaluate.tasks import density as density_module
from pipeline.evaluate.tasks.density import Counts, Density, nats_by_position
from tests.pipeline.evaluate.tiny_sets import COLORS, RESOLUTION

HUGGING_FACE = {"igpt": ImageGPTForCausalImageModeling, "gpt2": GPT2LMHeadModel}


@pytest.mark.parametrize("block", ["igpt", "gpt2"])
def test_density_is_the_loss_of_transformers(
    block: str, model_folders: dict[str, Path], evaluation_of: Callable
) -> None:
    evaluation = evaluation_of(model_folders[block], batch_size=48)
    result = Density(DensityOptions()).measure(evaluation)
    tokens = torch.from_numpy(evaluation.images("test").tokens().astype(np.int64))
    inputs = torch.cat([torch.full((len(tokens), 1), COLORS), tokens[:, :-1]], dim=1)
    with torch.no_grad():
        logits = HUGGING_FACE[block].from_pretrained(model_folders[block]).eval()(input_ids=inputs).logits
    expected = functional.cross_entropy(logits[..., :COLORS].flatten(0, 1), tokens.flatten()).item()
    assert result["nats_per_color"] == pytest.approx(expected, abs=1e-5)
    assert result["bits_per_color"] == pytest.approx(expected / math.log(2), abs=1e-5)
    assert result["images"] == 130
    assert abs(expected - math.log(COLORS)) > 0.01  # the model is not the trivial one


def test_density_agrees_with_the_loss_transformers_computes_itself(model_folder: Path, evaluation_of: Callable) -> None:
    """Its loss shifts labels by one and so leaves out a sequence's last prediction: images here are cut by one."""
    evaluation = evaluation_of(model_folder)
    tokens = torch.from_numpy(evaluation.images("test").tokens().astype(np.int64))
    sequence = torch.cat([torch.full((len(tokens), 1), COLORS), tokens[:, :-1]], dim=1)  # SOS, x0 .. x(n-2)
    hugging_face = ImageGPTForCausalImageModeling.from_pretrained(model_folder).eval()
    with torch.no_grad():
        theirs = hugging_face(input_ids=sequence, labels=sequence).loss.item()  # mean over x0 .. x(n-2)
        last = hugging_face(input_ids=sequence).logits[:, -1]
    of_last = functional.cross_entropy(last, tokens[:, -1]).item()
    positions = RESOLUTION**2
    expected = (theirs * (positions - 1) + of_last) / positions
    assert Density(DensityOptions()).measure(evaluation)["nats_per_color"] == pytest.approx(expected, abs=1e-5)


def test_the_heat_map_is_the_loss_at_each_position(model_folder: Path, evaluation_of: Callable) -> None:
    evaluation = evaluation_of(model_folder, batch_size=48)
    result = Density(DensityOptions()).measure(evaluation)
    tokens = torch.from_numpy(evaluation.images("test").tokens().astype(np.int64))
    inputs = torch.cat([torch.full((len(tokens), 1), COLORS), tokens[:, :-1]], dim=1)
    with torch.no_grad():
        logits = ImageGPTForCausalImageModeling.from_pretrained(model_folder).eval()(input_ids=inputs).logits
    nats = functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").numpy()  # (N, T)
    heat = np.array(result["nats_by_position"])
    np.testing.assert_allclose(heat, nats.mean(axis=0).reshape(RESOLUTION, RESOLUTION), atol=1e-5)
    assert heat.mean() == pytest.approx(result["nats_per_color"])
    assert (evaluation.results / "density.png").read_bytes().startswith(b"\x89PNG")


def test_a_masked_model_is_scored_on_masked_pixels_only(masked_folder: Path, evaluation_of: Callable) -> None:
    """Against log probabilities in float64, gathered manually under the evaluation's own masks."""
    evaluation = evaluation_of(masked_folder, batch_size=48)
    images = evaluation.images("test")
    result = Density(DensityOptions(draws=2)).measure(evaluation)
    tokens = torch.from_numpy(images.tokens().astype(np.int64))
    by_draw, nats, masked = [], [], []
    for draw in (0, 1):
        inputs, targets = evaluation.inputs_and_targets(tokens, images.indices, draw)
        with torch.no_grad():
            logits = evaluation.model.model(inputs).logits[..., :COLORS].numpy().astype(np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))  # (N, T, V)
        surprise = -np.take_along_axis(log_probabilities, tokens.numpy()[..., None], axis=-1)[..., 0]
        wanted = targets.numpy() >= 0
        by_draw.append(np.mean([row[mask].mean() for row, mask in zip(surprise, wanted, strict=True)]))
        nats.append(np.where(wanted, surprise, 0))
        masked.append(wanted)
    assert result["nats_by_draw"] == pytest.approx(by_draw, abs=1e-5)
    assert by_draw[0] != by_draw[1]
    assert result["nats_per_color"] == pytest.approx(np.mean(by_draw), abs=1e-5)
    heat = np.concatenate(nats).sum(axis=0) / np.concatenate(masked).sum(axis=0)
    np.testing.assert_allclose(np.array(result["nats_by_position"]).ravel(), heat, atol=1e-5)


def test_a_position_that_was_never_masked_has_no_nats() -> None:
    part = {"losses": np.ones(1), "sums": np.array([2.0, 0, 3, 4]), "counts": np.array([2.0, 0, 1, 1])}
    assert nats_by_position([part], 2) == [[1.0, None], [3.0, 4.0]]


def test_a_killed_measurement_resumes(
    model_folder: Path, evaluation_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(density_module, "BATCHES_PER_ITEM", 2)
    uninterrupted = evaluation_of(model_folder, batch_size=20)
    expected = Density(DensityOptions()).measure(uninterrupted)
    clear_unfinished(uninterrupted.results, "test")
    killed, read = evaluation_of(model_folder, batch_size=20), []

    def count(_module: object, inputs: tuple[torch.Tensor]) -> None:
        if len(read) == 5:  # in the third part
            raise KeyboardInterrupt
        read.append(len(inputs[0]))

    killed.model.model.transformer.register_forward_pre_hook(count)
    with pytest.raises(KeyboardInterrupt):
        Density(DensityOptions()).measure(killed)
    read.clear()
    again = evaluation_of(model_folder, batch_size=20)
    again.model.model.transformer.register_forward_pre_hook(count)
    assert Density(DensityOptions()).measure(again) == expected
    assert sum(read) == 130 - 80


@pytest.fixture
def counts(shards: ShardSet) -> Counts:
    return Counts.of(shards.split("train"), COLORS, RESOLUTION)


def grids(shards: ShardSet, split: str) -> np.ndarray:
    tokens, _ = shards.split(split).gather(np.arange(shards.split(split).images))
    return tokens.reshape(-1, RESOLUTION, RESOLUTION).astype(int)


def test_baselines_by_counting(shards: ShardSet, model_folder: Path, evaluation_of: Callable) -> None:
    result = Density(DensityOptions(split="valid")).measure(evaluation_of(model_folder))
    train, scored = grids(shards, "train").reshape(-1, RESOLUTION**2), grids(shards, "valid").reshape(-1, RESOLUTION**2)
    single = Counter(train.ravel().tolist())
    total = sum(single.values())

    def unigram(color: int) -> float:
        return (single[color] + 1) / (total + COLORS)

    pairs = Counter(pair for image in train.tolist() for pair in pairwise(image))
    after: dict[int, Counter] = {left: Counter() for left in range(COLORS)}
    for (left, color), count in pairs.items():
        after[left][color] = count

    def bigram(left: int, color: int) -> float:
        kinds, seen = len(after[left]), sum(after[left].values())
        return (after[left][color] + kinds * unigram(color)) / (seen + kinds)

    unigram_loss = -np.mean([[math.log(unigram(color)) for color in image] for image in scored.tolist()])
    bigram_losses = [
        [-math.log(unigram(image[0])), *(-math.log(bigram(*pair)) for pair in pairwise(image))]
        for image in scored.tolist()
    ]
    bigram_loss = np.mean(bigram_losses)
    assert result["uniform_nats_per_color"] == pytest.approx(math.log(COLORS))
    assert result["unigram_nats_per_color"] == pytest.approx(unigram_loss, rel=1e-9)
    assert result["bigram_nats_per_color"] == pytest.approx(bigram_loss, rel=1e-9)


def test_left_times_above_is_a_distribution(shards: ShardSet, counts: Counts) -> None:
    """At every place of an image the probabilities of all colors sum to one."""
    image = grids(shards, "test")[0]
    for row, column in [(0, 0), (0, 3), (4, 0), (2, 5)]:
        variants = np.repeat(image[None], COLORS, axis=0)
        variants[:, row, column] = np.arange(COLORS)
        tokens = variants.reshape(COLORS, -1).astype(np.int64)
        place = row * RESOLUTION + column
        for name, log_probability in counts.log_probabilities(tokens, RESOLUTION).items():
            assert np.exp(log_probability[:, place]).sum() == pytest.approx(1), name


def test_left_times_above_weighs_both_neighbors(shards: ShardSet, counts: Counts) -> None:
    image = grids(shards, "test")[0]
    left, above, color = image[2, 3], image[1, 4], image[2, 4]
    products = np.exp(counts.left[left] + counts.above[above] - counts.single)
    found = counts.log_probabilities(image.reshape(1, -1).astype(np.int64), RESOLUTION)["left_times_above"]
    assert found.reshape(RESOLUTION, RESOLUTION)[2, 4] == pytest.approx(math.log(products[color] / products.sum()))


class OneRecord:
    """A split of given images, (n, T)."""

    def __init__(self, tokens: list[list[int]]) -> None:
        self.record_images = np.array([len(tokens)])
        self.tokens = np.array(tokens, np.uint16)

    def record(self, _index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens, np.zeros(len(self.tokens), np.int32)


def test_rare_pairs_are_smoothed_as_witten_and_bell_do() -> None:
    counts = Counts.of(OneRecord([[0, 1, 0, 2], [0, 1, 0, 1]]), colors=4, side=2)
    unigram = (np.array([4, 3, 1, 0]) + 1) / 12
    after = np.array([[0, 3, 1, 0], [2, 0, 0, 0]])  # 0 is followed by two kinds, 1 by one
    np.testing.assert_allclose(np.exp(counts.left[0]), (after[0] + 2 * unigram) / 6)
    np.testing.assert_allclose(np.exp(counts.left[1]), (after[1] + 1 * unigram) / 3)
    np.testing.assert_allclose(np.exp(counts.left[3]), unigram)  # never seen: what is known of all


def test_above_is_the_color_of_the_row_above() -> None:
    """Rows of one color, 0 over 1."""
    counts = Counts.of(OneRecord([[0, 0, 1, 1]] * 40), colors=2, side=2)
    assert np.exp(counts.above[0, 1]) > 0.95
    assert np.exp(counts.above[0, 0]) < 0.05


def test_an_absent_split_is_named(model_folder: Path, evaluation_of: Callable) -> None:
    with pytest.raises(ValueError, match="has no split 'holdout'"):
        Density(DensityOptions(split="holdout")).measure(evaluation_of(model_folder))
