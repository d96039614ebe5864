"""The linear probe: multinomial logistic regression by L-BFGS on the features of every layer.

As the paper does on CIFAR and STL-10 (section 3.4; scikit-learn's solver, `openai/image-gpt#12`). What
the paper leaves open is decided here: features are standardised with the training pictures' mean and
deviation, and the L2 strength is searched for each layer on the validation split. The layer is chosen
on the validation split too; the test split is looked at once, with the chosen layer. The same probe
on raw pixels and on colour histograms stands beside it.
"""

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.files import written_aside
from pipeline.evaluate.inputs import Evaluation, Pictures, from_first

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

ITERATIONS = 1000
TOLERANCE = 1e-4
L2_STRENGTHS = (1.0, 0.1, 0.01, 0.001, 0.0001)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The linear probe over every layer."""

    l2: list[float] = field(default_factory=lambda: list(L2_STRENGTHS))
    """Strengths to try: each is s in (mean loss) + s/2 * (sum of squared weights)."""

    def __post_init__(self) -> None:
        if not self.l2 or min(self.l2) <= 0:
            raise ValueError(f"linear_probe.l2 is {self.l2}; it must be a list of numbers above 0.")


@dataclass(frozen=True)
class Probe:
    """A fitted probe and how it did on the validation split."""

    mean: np.ndarray  # (D,)
    deviation: np.ndarray  # (D,)
    classifier: "LogisticRegression"
    l2: float
    valid_accuracy: float

    @property
    def converged(self) -> bool:
        """False if L-BFGS ran into its limit of iterations."""
        return int(self.classifier.n_iter_.max()) < ITERATIONS

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """Fraction of the pictures, features (N, D), whose label (N,) is predicted."""
        return float((self.classifier.predict(self._standardise(features)) == labels).mean())

    def _standardise(self, features: np.ndarray) -> np.ndarray:
        return ((features - self.mean) / self.deviation).astype(np.float32)


Labelled = tuple[np.ndarray, np.ndarray]
"""(features float32 (N, D), labels int (N,))"""


def fit_probe(train: Labelled, valid: Labelled, strengths: list[float]) -> Probe:
    """The probe whose L2 strength does best on `valid`; the strongest of equals.

    From strong to weak, each fit starts where the one before ended.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    features, labels = train
    mean = features.mean(axis=0, dtype=np.float64)
    deviation = features.std(axis=0, dtype=np.float64)
    deviation[deviation == 0] = 1.0
    standardised = ((features - mean) / deviation).astype(np.float32)  # (N, D)
    classifier = LogisticRegression(tol=TOLERANCE, max_iter=ITERATIONS, warm_start=True)
    best: Probe | None = None
    for strength in sorted(strengths, reverse=True):
        classifier.set_params(C=1 / (strength * len(labels)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(standardised, labels)
        probe = Probe(mean, deviation, deepcopy(classifier), strength, 0.0)
        accuracy = probe.accuracy(*valid)
        if best is None or accuracy > best.valid_accuracy:
            best = Probe(mean, deviation, probe.classifier, strength, accuracy)
    assert best is not None
    return best


def raw_pixels(tokens: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Baseline features: the colours themselves, float32 (N, 3 T), of tokens (N, T)."""
    return palette[tokens].reshape(len(tokens), -1)


def color_histogram(tokens: np.ndarray, colors: int) -> np.ndarray:
    """Baseline features: the share of each palette colour, float32 (N, V), of tokens (N, T)."""
    pictures, positions = tokens.shape
    cells = tokens.astype(np.int64) + colors * np.arange(pictures)[:, None]
    counts = np.bincount(cells.ravel(), minlength=pictures * colors)
    return (counts.reshape(pictures, colors) / positions).astype(np.float32)


def measure(evaluation: Evaluation, options: Options) -> dict[str, Any]:
    """Runs the probe over every layer and both baselines, and draws accuracy by layer.

    Raises ValueError if train, valid or test is absent or unlabelled, or train has a single class.
    """
    pictures = {name: evaluation.pictures(name, labelled=True) for name in ("train", "valid", "test")}
    classes = len(np.unique(pictures["train"].labels))
    if classes < 2:
        raise ValueError(f"{evaluation.shards.path} has one class in train; a probe needs two or more.")
    result = _probe_layers(evaluation, pictures, options.l2)
    result = {"classes": classes, **{f"{name}_images": len(chosen) for name, chosen in pictures.items()}} | result
    from_first(evaluation.accelerator, lambda: draw(result, evaluation.results / "linear_probe.png"))
    return result


def summary(result: dict[str, Any]) -> str:
    """The result in a line."""
    layers = result["valid_accuracy_by_layer"]
    return (
        f"test accuracy {result['test_accuracy']:.1%} at layer {result['best_layer']}, best on validation "
        f"({layers[0]:.1%} at the first layer, {max(layers):.1%} at the best); "
        f"raw pixels {result['raw_pixel_test_accuracy']:.1%}, "
        f"colour histogram {result['color_histogram_test_accuracy']:.1%}"
    )


def _probe_layers(evaluation: Evaluation, pictures: dict[str, Pictures], strengths: list[float]) -> dict[str, Any]:
    from pipeline.evaluate.features import pooled_features

    def baseline(represent: Callable[[np.ndarray], np.ndarray]) -> Callable[[str], Labelled]:
        return lambda name: (represent(pictures[name].tokens()), pictures[name].labels)

    def of_layer(layer: int) -> Callable[[str], Labelled]:
        return lambda name: (features[name][layer], pictures[name].labels)

    features = {name: pooled_features(evaluation, pictures[name]) for name in ("train", "valid")}
    palette, colors = evaluation.shards.palette, evaluation.shards.colors
    jobs: dict[str | int, Callable[[str], Labelled]] = {
        "raw_pixel": baseline(lambda tokens: raw_pixels(tokens, palette)),
        "color_histogram": baseline(lambda tokens: color_histogram(tokens, colors)),
    }
    for layer in range(len(features["train"])):
        jobs[layer] = of_layer(layer)
    probes = _fit_shared(evaluation, jobs, strengths)

    layers = [probes[layer].valid_accuracy for layer in range(len(features["train"]))]
    best = int(np.argmax(layers))
    features["test"] = pooled_features(evaluation, pictures["test"])
    test_labels = pictures["test"].labels
    test_accuracy = probes[best].accuracy(features["test"][best], test_labels)
    result: dict[str, Any] = {
        "valid_accuracy_by_layer": layers,
        "best_layer": best,
        "best_l2": probes[best].l2,
        "best_layer_converged": probes[best].converged,
        "test_accuracy": test_accuracy,
        "test_standard_error": float(np.sqrt(test_accuracy * (1 - test_accuracy) / len(test_labels))),
        "majority_class_test_accuracy": float((test_labels == np.bincount(pictures["train"].labels).argmax()).mean()),
    }
    for name in ("raw_pixel", "color_histogram"):
        result[f"{name}_valid_accuracy"] = probes[name].valid_accuracy
        result[f"{name}_test_accuracy"] = probes[name].accuracy(*jobs[name]("test"))
    return result


def _fit_shared(
    evaluation: Evaluation, jobs: dict[str | int, Callable[[str], Labelled]], strengths: list[float]
) -> dict[str | int, Probe]:
    """Fits every job's probe, the jobs shared out among the ranks."""
    from accelerate.utils import gather_object

    accelerator = evaluation.accelerator
    mine = list(jobs)[accelerator.process_index :: accelerator.num_processes]
    fitted = []
    with evaluation.progress("linear probes", len(mine), "probes") as advance:
        for name in mine:
            fitted.append((name, fit_probe(jobs[name]("train"), jobs[name]("valid"), strengths)))
            advance(1)
    return dict(gather_object(fitted))


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws accuracy by layer, in percent, with the baselines on the same validation pictures."""
    from matplotlib.ticker import MaxNLocator

    from pipeline.evaluate.figures import ACCENT, BASELINES, new_figure, save_figure

    figure, axes = new_figure()
    accuracy = 100 * np.asarray(result["valid_accuracy_by_layer"])  # (L+1,)
    layers, best = np.arange(len(accuracy)), result["best_layer"]
    axes.plot(layers, accuracy, "-o", color=ACCENT, markersize=4, label="features of the model")
    axes.plot(best, accuracy[best], "o", markersize=11, markerfacecolor="none", markeredgecolor=ACCENT)
    for (name, words), color in zip(
        (("color_histogram", "colour histogram"), ("raw_pixel", "raw pixels")), BASELINES[:2], strict=True
    ):
        value = 100 * result[f"{name}_valid_accuracy"]
        axes.axhline(value, color=color, linestyle="--", linewidth=1.2, label=words)
    axes.set_xlabel(f"layer (0 = input of the first block, {len(accuracy) - 1} = after the final norm)")
    axes.set_ylabel("validation accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    with written_aside(path) as aside:
        save_figure(figure, aside)
