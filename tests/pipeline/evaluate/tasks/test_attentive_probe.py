"""The attentive probe against torch's attention and numpy; what it learns, and invalid input."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ImageGPTModel

from data_prep.shards.reader import ShardSet
from pipeline.evaluate.cache import TaskCache
from pipeline.evaluate.features import attentive_pooling
from pipeline.evaluate.features.attentive_pooling import AttentivePooling, standardisation, token_features
from pipeline.evaluate.options import AttentiveProbeOptions
from pipeline.evaluate.tasks.attentive_probe import AttentiveProbe
from tests.pipeline.evaluate.tiny_sets import COLORS

QUICK = AttentiveProbeOptions(epochs=8, layers=[1, 3], learning_rates=[0.02, 1e-6], global_size=20, reflect_crop=1)


def some_pooling(heads: int = 4) -> AttentivePooling:
    pooling = AttentivePooling(16, 3, heads, np.random.default_rng(0))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    return pooling


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 4])
def test_pooling_is_attention_of_one_query(heads: int) -> None:
    pooling = some_pooling(heads)
    features = torch.randn(5, 36, 16, generator=torch.Generator().manual_seed(1))
    theirs = torch.nn.MultiheadAttention(16, heads, bias=False, batch_first=True)
    as_matrix = {name: getattr(pooling, name).reshape(16, 16) for name in ("key", "value")}
    theirs.in_proj_weight.copy_(torch.cat([torch.eye(16), as_matrix["key"], as_matrix["value"]]))
    theirs.out_proj.weight.copy_(torch.eye(16))
    pooled, _ = theirs(pooling.query.reshape(1, 1, 16).expand(5, 1, 16), features, features)
    np.testing.assert_allclose(pooling(features), pooled[:, 0] @ pooling.score.T, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pooling_is_its_definition_in_float64() -> None:
    pooling = some_pooling()
    features = np.random.default_rng(1).normal(size=(3, 10, 16))
    query, key, value, score = (parameter.double().numpy() for parameter in pooling.parameters())
    pooled = np.empty((3, 4, 4))
    for image in range(3):
        for head in range(4):
            keys, values = features[image] @ key[head].T, features[image] @ value[head].T  # (T, 4)
            weights = np.exp(keys @ query[head] / np.sqrt(4))
            pooled[image, head] = weights @ values / weights.sum()
    found = pooling(torch.from_numpy(features).float())
    np.testing.assert_allclose(found, pooled.reshape(3, 16) @ score.T, rtol=1e-4, atol=1e-5)


def test_features_and_their_moments_are_those_of_transformers(
    model_folder: Path, evaluation_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attentive_pooling, "IMAGES_PER_ITEM", 100)  # several parts, the last one smaller
    evaluation = evaluation_of(model_folder, batch_size=30)
    images = evaluation.images("train", labelled=True)
    tokens = torch.from_numpy(images.tokens().astype(np.int64))
    found = token_features(evaluation, tokens, images.indices, [0, 2, 3])

    reference = ImageGPTModel.from_pretrained(model_folder).eval()
    inputs = torch.cat([torch.full((len(tokens), 1), COLORS), tokens[:, :-1]], dim=1)
    with torch.no_grad():
        states = reference(input_ids=inputs, output_hidden_states=True).hidden_states
        expected = [reference.h[0].ln_1(states[0]), reference.h[2].ln_1(states[2]), states[3]]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)

    mean, deviation = standardisation(evaluation, images, [0, 2, 3])
    flat = np.stack([state.double().numpy().reshape(-1, 16) for state in expected])
    np.testing.assert_allclose(mean, flat.mean(1), atol=1e-5)
    np.testing.assert_allclose(deviation, np.sqrt(flat.var(1) + 1e-6), rtol=1e-5)
    assert not any(module._forward_hooks for module in evaluation.model.model.modules())


def test_it_learns_from_a_frozen_model(model_folder: Path, evaluation_of: Callable, separable: ShardSet) -> None:
    evaluation = evaluation_of(model_folder, separable)
    before = [parameter.clone() for parameter in evaluation.model.model.parameters()]
    result = AttentiveProbe(QUICK).measure(evaluation)
    assert result["test_accuracy"] > 0.9
    assert f"{result['test_accuracy']:.1%}" in AttentiveProbe.summary(result)
    for after, parameter in zip(evaluation.model.model.parameters(), before, strict=True):
        assert torch.equal(after, parameter)
    assert (result["layers"], result["heads"]) == ([1, 3], 2)
    assert result["best_layer"] in result["layers"]
    place = result["layers"].index(result["best_layer"])
    assert (
        result["valid_accuracy_by_layer"][place] == result["valid_accuracy"] == max(result["valid_accuracy_by_layer"])
    )
    assert result["learning_rate"] == 0.02
    assert result["valid_accuracy_by_epoch"][result["best_epoch"] - 1] == result["valid_accuracy"]
    assert (evaluation.results / result["figure"]).is_file()


def test_probes_of_several_layers_equal_probes_of_one(
    model_folder: Path, evaluation_of: Callable, separable: ShardSet, tmp_path: Path
) -> None:
    evaluation = evaluation_of(model_folder, separable)
    options = replace(QUICK, epochs=2, learning_rates=[0.02])
    both = AttentiveProbe(options).measure(evaluation)
    for place, layer in enumerate(both["layers"]):
        alone = replace(evaluation, cache=TaskCache.of_task(tmp_path, f"layer-{layer}", ""))
        result = AttentiveProbe(replace(options, layers=[layer])).measure(alone)
        assert result["valid_accuracy"] == both["valid_accuracy_by_layer"][place]


def test_a_masked_model_votes_over_masks(masked_folder: Path, evaluation_of: Callable, separable: ShardSet) -> None:
    result = AttentiveProbe(replace(QUICK, layers=[2])).measure(evaluation_of(masked_folder, separable))
    assert result["masks"] == 5
    assert min(result["test_accuracy_by_mask"]) > 0.8
    assert result["ensembled_test_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [4]}, r"attentive_probe\.layers has 4; the model's layers are 0 to 3"),
        ({"heads": 3}, r"attentive_probe\.heads is 3; it must divide the model's width, 16"),
    ],
)
def test_options_that_do_not_fit_the_model(
    options: dict, message: str, model_folder: Path, evaluation_of: Callable
) -> None:
    with pytest.raises(ValueError, match=message):
        AttentiveProbe(AttentiveProbeOptions(**{"reflect_crop": 0, **options})).measure(evaluation_of(model_folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, r"attentive_probe\.layers is \[\]"),
        ({"layers": [1, 1]}, r"attentive_probe\.layers is \[1, 1\]"),
        ({"heads": 0}, r"attentive_probe\.heads is 0"),
        ({"weight_decay": -1}, r"attentive_probe\.weight_decay is -1"),
        ({"learning_rates": []}, r"attentive_probe\.learning_rates"),
    ],
)
def test_invalid_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentiveProbeOptions(**options)


def test_losses_that_diverge_at_every_learning_rate(model_folder: Path, evaluation_of: Callable) -> None:
    with pytest.raises(ValueError, match=r"learning_rates is 1e\+36; at each the loss became NaN or Inf"):
        AttentiveProbe(replace(QUICK, learning_rates=[1e36])).measure(evaluation_of(model_folder))


def test_layers_around_the_middle_are_tried(model_folder: Path, evaluation_of: Callable) -> None:
    result = AttentiveProbe(AttentiveProbeOptions(epochs=1, learning_rates=[1e-3])).measure(evaluation_of(model_folder))
    assert result["layers"] == [1, 2, 3]
