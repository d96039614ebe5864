"""The linear probe: a linear classifier on the features of every layer.

`solver lbfgs` is multinomial logistic regression, which the paper fits on CIFAR and STL-10. `solver sgd` is the paper's
method on ImageNet, for training sets that do not fit in memory. Details that the paper leaves open: features are
standardized with the mean and standard deviation of the training images, and the L2 strength of L-BFGS is chosen for
each layer on the validation split. The layer is chosen on the validation split too. The test split is used once, with
the chosen layer. A second probe uses 5 concatenated layers centered at the best one, as the paper does for iGPT-XL. The
same probe on raw pixels and on color histograms gives baselines. For a masked model, the accuracy under one mask and
the accuracy of the vote over five masks are reported (mask_ensemble.py); training and validation use one mask.

`linear_probe.json` has these keys, in addition to the keys of every result (accuracies are fractions):

    solver                            lbfgs or sgd
    valid_accuracy_by_layer           layers 0..L
    best_layer, best_l2 or best_rate, best_layer_converged
    test_accuracy, test_accuracy_interval (95%, Wilson), test_standard_error (binomial); both None for one image
    test_accuracy_by_class (None for a class without test images), test_mean_per_class_accuracy
    test_accuracy_by_seed, test_accuracy_deviation (n - 1)    sgd with 2 or more seeds; other test values are means;
                                      no intervals
    masks, test_accuracy_by_mask, ensembled_test_accuracy     masked models only
    concatenated                      {layers, features, l2 or rate, converged, valid_accuracy, and test_... as above}
    raw_pixel_{valid_accuracy,test_accuracy}, color_histogram_{...}
    classes (in train); class_names and class_labels of those that occur in a split, and in the same order
    images_by_class {split: [count, ...]}; {train,valid,test}_images, absent_classes {split: [name, ...]},
    majority_class_test_accuracy
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from pipeline.distributed import from_first
from pipeline.evaluate.classifiers.logistic import LinearClassifier, fit_logistic
from pipeline.evaluate.classifiers.sgd import Sgd
from pipeline.evaluate.context import Evaluation, ImageSubset
from pipeline.evaluate.features.labelled import (
    BASELINES,
    concatenated,
    description,
    known_features,
    labelled_splits,
    layer_name,
    occurring_classes,
)
from pipeline.evaluate.metrics.mask_ensemble import features_per_mask, score
from pipeline.evaluate.options import LinearProbeOptions
from pipeline.evaluate.task import LabelledTask
from pipeline.evaluate.work_sharing import WorkItem, map_over_ranks
from pipeline.results.figures import draw_by_layer, draw_or_log
from pipeline.results.published import PROBE
from pipeline.results.text import image_count

FIGURE = "linear_probe.png"
CONCATENATED = "concatenated"


class LinearProbe(LabelledTask[LinearProbeOptions]):
    """A linear probe on every layer."""

    title = "Linear probe"
    published = PROBE

    def measure(self, evaluation: Evaluation) -> dict[str, Any]:
        """Fits the probe on every layer and both baselines, and draws accuracy by layer.

        Raises ValueError if train, valid or test is absent or unlabelled, or train has a single class.
        """
        images = labelled_splits(evaluation, "linear_probe")
        train, valid = (known_features(evaluation, images[split]) for split in ("train", "valid"))
        sgd = None
        if self.options.solver == "sgd":
            device, cache = evaluation.accelerator.device, evaluation.cache
            sgd = Sgd(self.options.sgd, evaluation.seed, device, cache.get_or_compute)

        def search(name: str) -> WorkItem:
            if sgd is None:
                return partial(fit_logistic, train[name], valid[name], self.options.l2)
            return partial(sgd.search, name, train[name], valid[name])

        items = {name: search(name) for name in train}
        found = map_over_ranks(evaluation, "linear probes", items)
        accuracies = [found[name]["valid_accuracy"] for name in train if name not in BASELINES]  # (L+1,)
        best = int(np.argmax(accuracies))
        chosen, layers = [layer_name(best)], layers_around(best, len(accuracies), self.options.concatenate)
        if layers:
            chosen.append(CONCATENATED)
            for features in (train, valid):
                features[CONCATENATED] = concatenated([features[layer_name(layer)] for layer in layers])
            items[CONCATENATED] = search(CONCATENATED)
            found |= map_over_ranks(evaluation, "concatenated layers", {CONCATENATED: items[CONCATENATED]})
        self._log_if_at_limit(evaluation, [found[name]["setting"] for name in chosen])
        if sgd is not None:
            repeats: dict[str, WorkItem] = {
                f"{name}-again-{repeat}": partial(
                    sgd.fit, name, train[name], valid[name], found[name]["setting"], repeat
                )
                for name in chosen
                for repeat in range(1, self.options.sgd.seeds)
            }
            if repeats:
                map_over_ranks(evaluation, "other seeds", repeats)
            items |= repeats

        tested = _on_test(evaluation, images, items, [*chosen, *BASELINES], layers)
        result = description(evaluation, images) | {"valid_accuracy_by_layer": accuracies, "best_layer": best}
        result |= self._chosen_probes(chosen, layers, found, tested)
        if layers:
            result[CONCATENATED]["features"] = train[CONCATENATED].features[:1].shape[1]
        from_first(lambda: draw_or_log(draw_by_layer, result, evaluation.results / FIGURE))
        return result

    def _log_if_at_limit(self, evaluation: Evaluation, settings: list[float]) -> None:
        if self.options.solver == "lbfgs":
            evaluation.log_if_at_limit("linear_probe.l2", self.options.l2, settings)
        else:
            evaluation.log_if_at_limit("linear_probe.sgd.rates", self.options.sgd.rates, settings)

    def _chosen_probes(
        self, chosen: list[str], layers: list[int], found: dict[str, dict[str, Any]], tested: dict[str, Any]
    ) -> dict[str, Any]:
        """The part of the result about the chosen probes and the baselines."""
        setting, probe = "l2" if self.options.solver == "lbfgs" else "rate", found[chosen[0]]
        result = {
            "solver": self.options.solver,
            f"best_{setting}": probe["setting"],
            "best_layer_converged": probe["converged"],
            **tested[chosen[0]],
        }
        for name in BASELINES:
            result[f"{name}_valid_accuracy"] = found[name]["valid_accuracy"]
            result[f"{name}_test_accuracy"] = tested[name]["test_accuracy"]
        if layers:
            result[CONCATENATED] = {
                "layers": layers,
                setting: found[CONCATENATED]["setting"],
                "converged": found[CONCATENATED]["converged"],
                "valid_accuracy": found[CONCATENATED]["valid_accuracy"],
                **tested[CONCATENATED],
            }
        return result

    @classmethod
    def summary(cls, result: dict[str, Any]) -> str:
        layers = result["valid_accuracy_by_layer"]
        deviation = f" +- {100 * result['test_accuracy_deviation']:.1f}" if "test_accuracy_deviation" in result else ""
        voted = f", {result['ensembled_test_accuracy']:.1%} by vote" if "ensembled_test_accuracy" in result else ""
        more = ""
        if CONCATENATED in result:
            several = result[CONCATENATED]
            more = f"{several['test_accuracy']:.1%} from {len(several['layers'])} concatenated layers, "
        return (
            f"test accuracy {result['test_accuracy']:.1%}{deviation}{voted} of {image_count(result['test_images'])} at "
            f"layer {result['best_layer']}, best on "
            f"validation ({layers[0]:.1%} at the first layer, {max(layers):.1%} at the best); "
            f"{more}raw pixels {result['raw_pixel_test_accuracy']:.1%}, "
            f"color histogram {result['color_histogram_test_accuracy']:.1%}"
        )


def _on_test(
    evaluation: Evaluation,
    images: dict[str, ImageSubset],
    items: Mapping[str, WorkItem],
    names: list[str],
    layers: list[int],
) -> dict[str, Any]:
    """Scores of the named probes on the test images, over their repeats; computed on the first rank.

    layers: the layers to concatenate; empty for none.
    """
    test, classes = features_per_mask(evaluation, images["test"]), occurring_classes(images)
    if layers:
        by_mask = zip(*(test[layer_name(layer)] for layer in layers), strict=True)
        test[CONCATENATED] = [concatenated(of_mask) for of_mask in by_mask]

    def scores(name: str) -> dict[str, Any]:
        trained = [name, *(other for other in items if other.startswith(f"{name}-again-"))]
        probes = [LinearClassifier.of(evaluation.cache.get_or_compute(each, items[each])) for each in trained]
        return over_seeds([score(evaluation, test[name], probe.predict, classes) for probe in probes])

    def compute() -> dict[str, Any]:
        return {name: scores(name) for name in names}

    return from_first(lambda: evaluation.cache.get_or_compute("test", compute))


def layers_around(best: int, layers: int, count: int) -> list[int]:
    """`count` consecutive layers centered at the best, shifted inward at both ends; all layers if there are too few."""
    first = max(0, min(best - count // 2, layers - count))
    return list(range(first, min(first + count, layers)))


def over_seeds(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """The scores of a single training unchanged; of several, the means with all accuracies and their deviation.

    A mean has no Wilson interval, so there is none of several."""
    if len(scores) == 1:
        return scores[0]
    accuracies = [each["test_accuracy"] for each in scores]
    means = {key: _mean([each[key] for each in scores]) for key in scores[0] if not key.endswith("_interval")}
    return means | {
        "test_accuracy_by_seed": accuracies,
        "test_accuracy_deviation": float(np.std(accuracies, ddof=1)),
    }


def _mean(values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [_mean(list(entries)) for entries in zip(*values, strict=True)]
    return float(np.mean(values)) if isinstance(values[0], float) else values[0]
