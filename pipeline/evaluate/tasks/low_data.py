"""Few labels: the linear probe (L-BFGS) trained on random subsets of the labelled images.

The settings are those of the paper on CIFAR-10 (4, 25 and 400 labels per class, 5 random subsets) and the usual ones on
ImageNet (1% and 10% of the labels). The paper does not state how it chose the layer and the regularization. Here both
are chosen for each subset by cross-validation within the subset's labels (five folds, or as many as a class has
labels). The criterion is the mean loss on the held-out labels, which is more informative than accuracy if there are few
labels. For each layer, L2 strengths are tried from strong to weak while this loss falls. So only the labels of the
setting are used. Two options use more, which the result records: `choose_on valid` chooses on the entire split valid;
`layer` sets a layer that is known from elsewhere. The test split is used once per subset. A masked model is evaluated
under one mask.

A subset has as many images of each class as the setting requires; a fraction of the labels is spread as evenly over the
classes as they allow. A default setting is skipped if a class has too few labels, and `left_out` lists it. If such a
setting was set explicitly, it is an error.

`low_data.json` has these keys, in addition to the keys of every result (accuracies are fractions):

    settings              a list of {name, per_class or fraction, labels, test_accuracy (mean over the subsets),
                          test_accuracy_deviation (n - 1; None for one subset),
                          subsets: [{labels, layer, l2, converged, test_accuracy}, ...]}
    left_out              a list of {name, reason}
    choice                how layer and strength were chosen, as text
    labels_for_choice     number of labels that the choice used in addition to the setting's
    classes, class_names, class_labels, {train,test}_images, images_by_class, absent_classes,
    majority_class_test_accuracy, as in linear_probe.py; valid_images if `choose_on` is valid
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedKFold

from data_prep.common.seeding import generator
from pipeline.distributed import from_first
from pipeline.evaluate.classifiers.logistic import logistic_path
from pipeline.evaluate.context import Evaluation, ImageSubset
from pipeline.evaluate.features.labelled import Labelled, description, labelled_splits, layers_of, why_unlabelled
from pipeline.evaluate.features.pooled import pooled_features
from pipeline.evaluate.options import LowDataOptions
from pipeline.evaluate.task import Task
from pipeline.evaluate.work_sharing import WorkItem, map_over_ranks
from pipeline.results.figures import ACCENT, BASELINES, draw_or_log, label_line, new_figure, save_figure
from pipeline.results.published import LOW_DATA
from pipeline.results.text import image_count

FIGURE = "low_data.png"
PER_CLASS = (4, 25, 400)
FRACTIONS = (0.01, 0.1)
FOLDS = 5


class LowData(Task[LowDataOptions]):
    """The linear probe with few labels."""

    title = "Few labels"
    published = LOW_DATA

    def unfit(self, evaluation: Evaluation) -> str | None:
        return why_unlabelled(evaluation, self.options.splits)

    def check(self, evaluation: Evaluation, earlier: Collection[str]) -> None:
        """Raises ValueError if an option does not fit the model or the labels."""
        splits = self.options.splits
        self._settings(evaluation, {split: evaluation.images(split, labelled=True) for split in splits})

    def measure(self, evaluation: Evaluation) -> dict[str, Any]:
        """Fits and tests the probe on every subset of every setting, and draws accuracy by number of labels.

        Raises ValueError if a split that is used is absent or unlabelled, train has a single class, the model does
        not have `layer`, train has too few labels, or valid has none to choose on.
        """
        options = self.options
        images = labelled_splits(evaluation, "low_data", options.splits)
        settings, left_out = self._settings(evaluation, images)
        for each in left_out:
            evaluation.log(f"low_data: {each['name']} skipped, {each['reason']}")
        features = {
            split: list(layers_of(pooled_features(evaluation, images[split]), images[split].labels).values())
            for split in options.splits
        }
        items: dict[str, WorkItem] = {
            f"{setting.name}-{number}".replace(" ", "-"): partial(
                self._test, evaluation.seed, setting, number, features
            )
            for number in range(options.subsets)
            for setting in settings
        }
        done = list(map_over_ranks(evaluation, "few labels", items).values())
        evaluation.log_if_at_limit("low_data.l2", options.l2, [each["l2"] for each in done])
        result = description(evaluation, images) | {
            "settings": [_summarize(setting, done[number :: len(settings)]) for number, setting in enumerate(settings)],
            "left_out": left_out,
            "choice": self._choice(),
            "labels_for_choice": len(images["valid"]) if options.choose_on == "valid" else 0,
        }
        from_first(lambda: draw_or_log(draw, result, evaluation.results / FIGURE))
        return result

    @classmethod
    def summary(cls, result: dict[str, Any]) -> str:
        parts = []
        for setting in result["settings"]:
            deviation = setting["test_accuracy_deviation"]
            spread = "" if deviation is None else f" +- {100 * deviation:.1f}"
            parts.append(f"{100 * setting['test_accuracy']:.1f}{spread}% with {setting['name']}")
        return f"test accuracy {', '.join(parts)}, of {image_count(result['test_images'])}; {result['choice']}"

    def _settings(
        self, evaluation: Evaluation, images: dict[str, ImageSubset]
    ) -> "tuple[list[Setting], list[dict[str, str]]]":
        """`settings_for` these images. Raises ValueError also if the layer does not exist, or valid can't be used."""
        last, layer = evaluation.model.config.n_layer, self.options.layer
        if layer is not None and not 0 <= layer <= last:
            raise ValueError(f"low_data.layer is {layer}; it must be 0 to {last}.")
        if "valid" in images and not np.isin(images["valid"].labels, images["train"].labels).any():
            raise ValueError(
                f"low_data.choose_on is valid, but in {evaluation.shards.path} no labelled image of valid is of a "
                f"class that train has; set low_data.choose_on labels."
            )
        return settings_for(images["train"].labels, self.options, str(evaluation.shards.path))

    def _test(self, seed: int, setting: "Setting", number: int, features: dict[str, list[Labelled]]) -> dict[str, Any]:
        """Draws one subset, chooses its layer and strength, and tests it."""
        random = generator(seed, "low_data", setting.name, number)
        rows = setting.draw(features["train"][0].labels, random)
        subset = [Labelled(layer.features[rows], layer.labels[rows]) for layer in features["train"]]
        layer, strength = choose(subset, features.get("valid"), self.options, int(random.integers(2**31)))
        probe = next(logistic_path(subset[layer], [strength]))
        return {
            "labels": len(rows),
            "layer": layer,
            "l2": strength,
            "converged": probe.converged,
            "test_accuracy": probe.accuracy(features["test"][layer]),
        }

    def _choice(self) -> str:
        layer, choose_on = self.options.layer, self.options.choose_on
        what = "layer and L2 strength" if layer is None else f"layer {layer} given; L2 strength"
        how = "cross-validation within each subset's labels" if choose_on == "labels" else "loss on the split valid"
        return f"{what} by {how}"


@dataclass(frozen=True)
class Setting:
    """A number of labels: per class, or in total."""

    name: str
    per_class: int | None
    fraction: float | None
    labels: int

    def draw(self, labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Rows of a random subset, ascending, of int (N,) labels."""
        classes, available = np.unique(labels, return_counts=True)
        counts = balanced(available, self.labels, random)
        rows = [
            random.choice(np.flatnonzero(labels == label), count, replace=False)
            for label, count in zip(classes, counts, strict=True)
        ]
        return np.sort(np.concatenate(rows))


def balanced(available: np.ndarray, total: int, random: np.random.Generator) -> np.ndarray:
    """Numbers per class, int (C,), that sum to `total` and are as equal as `available` (C,) allows."""
    taken = np.zeros_like(available)
    while (left := total - taken.sum()) > 0:
        open_classes = np.flatnonzero(taken < available)
        share = left // len(open_classes)
        if share == 0:  # fewer are left than there are classes
            open_classes, share = random.choice(open_classes, left, replace=False), 1
        taken[open_classes] += np.minimum(share, (available - taken)[open_classes])
    return taken


def settings_for(labels: np.ndarray, options: LowDataOptions, where: str) -> tuple[list[Setting], list[dict[str, str]]]:
    """The settings to measure with the labels int (N,) of train, and the skipped settings with reasons.

    Raises ValueError if an explicitly set one is impossible, or if none is left; `where` is the shard set.
    """
    counts = np.unique(labels, return_counts=True)[1]  # (C,)
    rarest, least = int(counts.min()), options.least * len(counts)
    possible: list[tuple[Setting, str, bool]] = []
    for number in PER_CLASS if options.per_class is None else options.per_class:
        reason = f"the rarest class has {rarest} labels in train" if rarest < number else ""
        setting = Setting(f"{number} per class", number, None, number * len(counts))
        possible.append((setting, reason, options.per_class is not None))
    for share in FRACTIONS if options.fractions is None else options.fractions:
        total = round(share * len(labels))
        reason = f"{total} of train's {len(labels)} labels are fewer than {options.least} for each class"
        setting = Setting(f"{100 * share:g}%", None, share, total)
        possible.append((setting, reason if total < least else "", options.fractions is not None))
    for setting, reason, explicit in possible:
        if reason and explicit:
            raise ValueError(f"low_data is set to use {setting.name}, but in {where} {reason}.")
    settings = [setting for setting, reason, _ in possible if not reason]
    left_out = [{"name": setting.name, "reason": reason} for setting, reason, _ in possible if reason]
    if not settings:
        raise ValueError(
            f"{where} has {len(labels)} labels in train, too few for low_data; the rarest class has {rarest}."
        )
    return settings, left_out


def choose(
    subset: Sequence[Labelled], valid: Sequence[Labelled] | None, options: LowDataOptions, seed: int
) -> tuple[int, float]:
    """The layer and the L2 strength with the lowest loss on held-out labels; of ties, the first and the strongest.

    subset, valid: by layer. Without `valid`, folds of the subset, drawn from `seed`, are held out in turn.
    """
    best, layer, strength = inf, -1, nan
    for number in range(len(subset)) if options.layer is None else [options.layer]:
        held_out = [(subset[number], valid[number])] if valid is not None else list(_folds(subset[number], seed))
        for tried, loss in _losses(held_out, options.l2):
            if loss < best:
                best, layer, strength = loss, number, tried
    return layer, strength


def _losses(held_out: list[tuple[Labelled, Labelled]], strengths: Sequence[float]) -> Iterator[tuple[float, float]]:
    """(L2 strength, mean loss of all held-out labels), from strong to weak while the loss falls."""
    before = inf
    for probes in zip(*(logistic_path(train, strengths) for train, _ in held_out), strict=True):
        parts = [probe.losses(others) for probe, (_, others) in zip(probes, held_out, strict=True)]
        loss = float(np.concatenate(parts).mean(dtype=np.float64))
        if loss >= before:
            return
        yield probes[0].setting, loss
        before = loss


def _folds(subset: Labelled, seed: int) -> Iterator[tuple[Labelled, Labelled]]:
    """(training part, held-out part) of each fold; the only label of a class is never held out."""
    features, labels = subset
    classes, counts = np.unique(labels, return_counts=True)
    single = np.isin(labels, classes[counts == 1])
    several, always = np.flatnonzero(~single), np.flatnonzero(single)
    folds = StratifiedKFold(min(FOLDS, int(counts.max())), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # raised if a class has fewer labels than there are folds
        divided = list(folds.split(several, labels[several]))
    for training, held_out in divided:
        parts = np.concatenate([several[training], always]), several[held_out]
        yield Labelled(features[parts[0]], labels[parts[0]]), Labelled(features[parts[1]], labels[parts[1]])


def _summarize(setting: Setting, subsets: list[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [subset["test_accuracy"] for subset in subsets]
    size = {"per_class": setting.per_class} if setting.fraction is None else {"fraction": setting.fraction}
    return {
        "name": setting.name,
        **size,
        "labels": setting.labels,
        "test_accuracy": float(np.mean(accuracies)),
        "test_accuracy_deviation": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None,
        "subsets": subsets,
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws test accuracy in percent by number of labels: mean and deviation over the subsets."""
    count = len(result["settings"][0]["subsets"])
    figure, axes = new_figure()
    kinds = (
        ("per_class", "labels per class", ACCENT, (6, -12)),
        ("fraction", "fraction of the labels", BASELINES[0], (-6, 6)),
    )
    for key, words, color, offset in kinds:
        shown = [setting for setting in result["settings"] if key in setting]
        if shown:
            axes.errorbar(
                [setting["labels"] for setting in shown],
                [100 * setting["test_accuracy"] for setting in shown],
                yerr=[100 * (setting["test_accuracy_deviation"] or 0) for setting in shown],
                fmt="-o" if key == "per_class" else "s", color=color, markersize=5, capsize=3, label=words,
            )  # fmt: skip
        for setting in shown:
            xy, side = (setting["labels"], 100 * setting["test_accuracy"]), "left" if offset[0] > 0 else "right"
            axes.annotate(setting["name"], xy, offset, textcoords="offset points", ha=side, fontsize=8, color=color)
    label_line(axes, 100 * result["majority_class_test_accuracy"], "most common class", BASELINES[1])
    axes.set(xscale="log", xlabel=f"total number of labels ({result['classes']} classes)", ylabel="test accuracy (%)")
    axes.margins(x=0.15)
    axes.legend(frameon=False, loc="upper left", title=f"labels, {count} random subsets")
    save_figure(figure, path)
