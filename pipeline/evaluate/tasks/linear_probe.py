"""The linear probe: a linear classifier on the features of every layer.

`solver lbfgs` is multinomial logistic regression, as the paper fits on CIFAR and STL-10; `solver sgd` is what it does
on ImageNet, for training sets that do not fit in memory. What the paper leaves open is decided here: features are
standardised with the training pictures' mean and deviation, and the L2 strength of L-BFGS is searched for each layer on
the validation split. The layer is chosen on the validation split too; the test split is looked at once, with the chosen
layer. A second number puts 5 layers centred at the best one side by side, as the paper does for iGPT-XL. The same probe
on raw pixels and on colour histograms stands beside it. Of a masked model the single-mask accuracy and the vote over
five masks are given (votes.py); training and choices see one mask.

`linear_probe.json` has, besides what every result has (fractions for accuracies):

    solver                            lbfgs or sgd
    valid_accuracy_by_layer           layers 0..L
    best_layer, best_l2 or best_rate, best_layer_converged
    test_accuracy, test_standard_error (binomial), test_accuracy_by_class (None: no test picture of that class)
    test_accuracy_by_seed, test_accuracy_deviation (n - 1)    sgd, 2 or more seeds; other test numbers are their means
    masks, test_accuracy_by_mask, ensembled_test_accuracy     masked models only
    concatenated                      {layers, features, l2 or rate, converged, valid_accuracy, and test_... as above}
    raw_pixel_{valid_accuracy,test_accuracy}, color_histogram_{...}
    classes (in train), class_names, {train,valid,test}_images, images_by_class {split: [count, ...]},
    absent_classes {split: [name, ...]}, majority_class_test_accuracy
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pipeline.evaluate.classifiers.logistic import L2_STRENGTHS, LinearClassifier, fit_logistic
from pipeline.evaluate.classifiers.sgd import SgdOptions, fit_sgd, search_rate
from pipeline.evaluate.context import Evaluation, from_first
from pipeline.evaluate.features.labelled import (
    BASELINES,
    Labelled,
    description,
    known_features,
    labelled_splits,
    layer_name,
    side_by_side,
)
from pipeline.evaluate.features.labelled import unfit as unfit
from pipeline.evaluate.metrics.mask_ensemble import judged, looks
from pipeline.evaluate.work_sharing import Piece, shared_out
from pipeline.results.figures import draw_by_layer

FIGURE = "linear_probe.png"
JOINED = "concatenated"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The linear probe over every layer."""

    solver: Literal["lbfgs", "sgd"] = "lbfgs"
    """lbfgs holds a layer of the training set in memory; sgd does not, and is for sets of ImageNet's size."""
    l2: list[float] = field(default_factory=lambda: list(L2_STRENGTHS))
    """Strengths to try with lbfgs: each is s in (mean loss) + s/2 * (sum of squared weights)."""
    sgd: SgdOptions = field(default_factory=SgdOptions)
    """How to train with sgd."""
    concatenate: int = 5
    """A second probe on so many layers side by side, centred at the best; 0 for none."""

    def __post_init__(self) -> None:
        if not self.l2 or min(self.l2) <= 0:
            raise ValueError(f"linear_probe.l2 is {self.l2}; it must be a list of numbers above 0.")
        if self.concatenate < 0 or self.concatenate == 1:
            raise ValueError(f"linear_probe.concatenate is {self.concatenate}; it must be 0, or 2 or more layers.")


@dataclass(frozen=True)
class Solver:
    """Fits probes by the chosen solver, in pieces."""

    evaluation: Evaluation
    options: Options

    @property
    def setting(self) -> str:
        """What is searched for each probe."""
        return "l2" if self.options.solver == "lbfgs" else "rate"

    @property
    def repeats(self) -> range:
        """Further trainings of a chosen probe, where there is randomness."""
        return range(1, self.options.sgd.seeds if self.options.solver == "sgd" else 1)

    def search(self, name: str, train: Labelled, valid: Labelled) -> Piece:
        """The piece that fits a probe with every setting and keeps the best on `valid`."""
        if self.options.solver == "lbfgs":
            return lambda: fit_logistic(train, valid, self.options.l2)
        return lambda: search_rate(name, train, valid, *self._how())

    def repeat(self, name: str, train: Labelled, valid: Labelled, rate: float, repeat: int) -> Piece:
        """The piece that trains a probe once more by SGD, in another order."""
        return lambda: fit_sgd(name, train, valid, rate, repeat, *self._how())

    def _how(self) -> tuple[Any, ...]:
        evaluation = self.evaluation
        return self.options.sgd, evaluation.seed, evaluation.accelerator.device, evaluation.kept.once


def measure(evaluation: Evaluation, options: Options) -> dict[str, Any]:
    """Runs the probe over every layer and both baselines, and draws accuracy by layer.

    Raises ValueError if train, valid or test is absent or unlabelled, or train has a single class.
    """
    pictures = labelled_splits(evaluation, "linear_probe")
    solver = Solver(evaluation, options)
    train, valid = (known_features(evaluation, pictures[split]) for split in ("train", "valid"))
    pieces = {name: solver.search(name, train[name], valid[name]) for name in train}
    found = shared_out(evaluation, "linear probes", pieces)
    accuracies = [found[name]["valid_accuracy"] for name in train if name not in BASELINES]  # (L+1,)
    best = int(np.argmax(accuracies))

    chosen, joined = [layer_name(best)], layers_around(best, len(accuracies), options.concatenate)
    if joined:
        chosen.append(JOINED)
        for features in (train, valid):
            features[JOINED] = side_by_side([features[layer_name(layer)] for layer in joined])
        pieces[JOINED] = solver.search(JOINED, train[JOINED], valid[JOINED])
        found |= shared_out(evaluation, "layers side by side", {JOINED: pieces[JOINED]})
    again = {
        f"{name}-again-{repeat}": solver.repeat(name, train[name], valid[name], found[name]["setting"], repeat)
        for name in chosen
        for repeat in solver.repeats
    }
    if again:
        shared_out(evaluation, "other seeds", again)

    test = looks(evaluation, pictures["test"])
    if joined:
        by_mask = zip(*(test[layer_name(layer)] for layer in joined), strict=True)
        test[JOINED] = [side_by_side(layers) for layers in by_mask]

    def scores(name: str) -> dict[str, Any]:
        names = [name, *(other for other in again if other.startswith(f"{name}-again-"))]
        kept = [evaluation.kept.once(each, (pieces | again)[each]) for each in names]
        return over_seeds([judged(evaluation, test[name], LinearClassifier.of(piece).predict) for piece in kept])

    def on_test() -> dict[str, Any]:
        return {name: scores(name) for name in (*chosen, *BASELINES)}

    tested = from_first(evaluation.accelerator, lambda: evaluation.kept.once("test", on_test))
    probe = found[chosen[0]]
    result = description(evaluation, pictures) | {
        "solver": options.solver,
        "valid_accuracy_by_layer": accuracies,
        "best_layer": best,
        f"best_{solver.setting}": probe["setting"],
        "best_layer_converged": probe["converged"],
        **tested[chosen[0]],
    }
    for name in BASELINES:
        result[f"{name}_valid_accuracy"] = found[name]["valid_accuracy"]
        result[f"{name}_test_accuracy"] = tested[name]["test_accuracy"]
    if joined:
        result[JOINED] = {
            "layers": joined,
            "features": train[JOINED].features[:1].shape[1],
            solver.setting: found[JOINED]["setting"],
            "converged": found[JOINED]["converged"],
            "valid_accuracy": found[JOINED]["valid_accuracy"],
            **tested[JOINED],
        }
    from_first(evaluation.accelerator, lambda: draw_by_layer(result, evaluation.results / FIGURE))
    return result


def layers_around(best: int, layers: int, count: int) -> list[int]:
    """`count` neighbouring layers centred at the best; at the first and last layers moved inwards; all if too few."""
    first = max(0, min(best - count // 2, layers - count))
    return list(range(first, min(first + count, layers)))


def over_seeds(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """One training's scores as they are; of several the means, with each one's accuracy and their deviation."""
    if len(scores) == 1:
        return scores[0]
    accuracies = [each["test_accuracy"] for each in scores]
    return {key: _mean([each[key] for each in scores]) for key in scores[0]} | {
        "test_accuracy_by_seed": accuracies,
        "test_accuracy_deviation": float(np.std(accuracies, ddof=1)),
    }


def _mean(values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [_mean(list(entries)) for entries in zip(*values, strict=True)]
    return float(np.mean(values)) if isinstance(values[0], float) else values[0]


def summary(result: dict[str, Any]) -> str:
    """The result in a line."""
    layers = result["valid_accuracy_by_layer"]
    deviation = f" +- {100 * result['test_accuracy_deviation']:.1f}" if "test_accuracy_deviation" in result else ""
    voted = f", {result['ensembled_test_accuracy']:.1%} by vote" if "ensembled_test_accuracy" in result else ""
    joined = ""
    if JOINED in result:
        joined = f"{result[JOINED]['test_accuracy']:.1%} from {len(result[JOINED]['layers'])} layers side by side, "
    return (
        f"test accuracy {result['test_accuracy']:.1%}{deviation}{voted} at layer {result['best_layer']}, best on "
        f"validation ({layers[0]:.1%} at the first layer, {max(layers):.1%} at the best); "
        f"{joined}raw pixels {result['raw_pixel_test_accuracy']:.1%}, "
        f"colour histogram {result['color_histogram_test_accuracy']:.1%}"
    )
