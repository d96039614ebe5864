"""A linear classifier trained by SGD, for training sets too large for L-BFGS, and its learning-rate sweep.

As the paper does on ImageNet (section 3.4): momentum .9, no weight decay, a cosine schedule to 0 without warm-up, and
learning rates 30, 10, 3, ... downward until the final validation loss stops falling. Features are standardized, as for
L-BFGS, so the sweep ends at lower learning rates than it would on raw features.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from data_prep.common.seeding import generator
from pipeline.evaluate.classifiers.logistic import LinearClassifier, moments, standardised
from pipeline.evaluate.features.labelled import Labelled
from pipeline.evaluate.options import SgdOptions

MOMENTUM = 0.9
BATCHES_AT_ONCE = 64


@dataclass(frozen=True)
class Sgd:
    """Trains classifiers by SGD and caches them."""

    options: SgdOptions
    seed: int
    device: torch.device
    get_or_compute: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]
    """`TaskCache.get_or_compute`."""

    def search(self, name: str, train: Labelled, valid: Labelled) -> dict[str, Any]:
        """The classifier with the lowest final loss on `valid`, with `valid_accuracy` and `valid_loss`."""
        best: dict[str, Any] | None = None
        for lr in sorted(set(self.options.rates), reverse=True):
            tried = self.fit(name, train, valid, lr, 0)
            if best is not None and isfinite(best["valid_loss"]) and tried["valid_loss"] >= best["valid_loss"]:
                break
            best = tried
        assert best is not None
        return best

    def fit(self, name: str, train: Labelled, valid: Labelled, lr: float, repeat: int) -> dict[str, Any]:
        """A classifier trained at one learning rate; each `repeat` uses another order of the images."""

        def train_and_validate() -> dict[str, Any]:
            random = generator(self.seed, "sgd", repeat)
            classifier = train_sgd(train, lr, self.options.epochs, self.options.batch_size, random, self.device)
            losses = classifier.losses(valid)
            loss = float(losses.mean(dtype=np.float64)) if len(losses) and classifier.converged else np.inf
            return asdict(classifier) | {"valid_accuracy": classifier.accuracy(valid), "valid_loss": loss}

        return self.get_or_compute(f"{name}-rate-{lr:g}-order-{repeat}", train_and_validate)


def train_sgd(
    train: Labelled,
    lr: float,
    epochs: int,
    batch_size: int,
    random: np.random.Generator,
    device: torch.device,
) -> LinearClassifier:
    """Trains from zero weights; `random` draws the order of the images in each epoch."""
    mean, deviation = moments(train.features)
    classes, targets = np.unique(train.labels, return_inverse=True)  # (C,), (N,)
    weight, bias = torch.zeros(len(classes), len(mean), device=device), torch.zeros(len(classes), device=device)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM)
    schedule = CosineAnnealingLR(optimizer, T_max=epochs * -(-len(targets) // batch_size))
    for rows in _batches(len(targets), epochs, batch_size, random):
        inputs = torch.from_numpy(standardised(train.features[rows], mean, deviation)).to(device)  # (n, D)
        labels = torch.from_numpy(targets[rows]).to(device)  # (n,)
        for batch, expected in zip(inputs.split(batch_size), labels.split(batch_size), strict=True):
            optimizer.zero_grad()
            functional.cross_entropy(functional.linear(batch, weight, bias), expected).backward()
            optimizer.step()
            schedule.step()
    weights = [parameter.detach().cpu().numpy() for parameter in parameters]
    finite = all(np.isfinite(values).all() for values in weights)
    return LinearClassifier(mean, deviation, weights[0], weights[1], classes, lr, bool(finite))


def _batches(count: int, epochs: int, batch_size: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Row numbers of all epochs, each in a new order, as blocks of BATCHES_AT_ONCE batches."""
    for _epoch in range(epochs):
        order = random.permutation(count)
        for start in range(0, count, batch_size * BATCHES_AT_ONCE):
            yield order[start : start + batch_size * BATCHES_AT_ONCE]
