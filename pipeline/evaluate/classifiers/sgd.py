"""A linear classifier by SGD, for training sets that L-BFGS can't hold in memory, and the search for its rate.

As the paper does on ImageNet (section 3.4): momentum .9, no weight decay, a cosine schedule to 0 without warm-up, and
rates 30, 10, 3, ... downward until the final validation loss stops falling. Features are standardised, as for L-BFGS,
so the search ends at lower rates than on features as they are.
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
    """Fits classifiers by SGD; what was fitted is cached."""

    options: SgdOptions
    seed: int
    device: torch.device
    get_or_compute: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]
    """Of a TaskCache."""

    def search(self, name: str, train: Labelled, valid: Labelled) -> dict[str, Any]:
        """The classifier of the rate with the least final loss on `valid`, with `valid_accuracy` and `valid_loss`."""
        best: dict[str, Any] | None = None
        for rate in sorted(set(self.options.rates), reverse=True):
            tried = self.fit(name, train, valid, rate, 0)
            if best is not None and isfinite(best["valid_loss"]) and tried["valid_loss"] >= best["valid_loss"]:
                break
            best = tried
        assert best is not None
        return best

    def fit(self, name: str, train: Labelled, valid: Labelled, rate: float, repeat: int) -> dict[str, Any]:
        """A classifier trained at one rate; `repeat` numbers the trainings of one rate, each in another order."""

        def train_and_validate() -> dict[str, Any]:
            random = generator(self.seed, "sgd", repeat)
            classifier = train_sgd(train, rate, self.options.epochs, self.options.batch_size, random, self.device)
            losses = classifier.losses(valid)
            loss = float(losses.mean(dtype=np.float64)) if len(losses) and classifier.converged else np.inf
            return asdict(classifier) | {"valid_accuracy": classifier.accuracy(valid), "valid_loss": loss}

        return self.get_or_compute(f"{name}-rate-{rate:g}-order-{repeat}", train_and_validate)


def train_sgd(
    train: Labelled, rate: float, epochs: int, batch_size: int, random: np.random.Generator, device: torch.device
) -> LinearClassifier:
    """Trains from zero weights; `random` gives the order of the images in each epoch."""
    mean, deviation = moments(train.features)
    classes, targets = np.unique(train.labels, return_inverse=True)  # (C,), (N,)
    weight, bias = torch.zeros(len(classes), len(mean), device=device), torch.zeros(len(classes), device=device)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM)
    schedule = CosineAnnealingLR(optimizer, T_max=epochs * -(-len(targets) // batch_size))
    for rows in _batches(len(targets), epochs, batch_size, random):
        inputs = torch.from_numpy(standardised(train.features[rows], mean, deviation)).to(device)  # (n, D)
        wanted = torch.from_numpy(targets[rows]).to(device)  # (n,)
        for batch, labels in zip(inputs.split(batch_size), wanted.split(batch_size), strict=True):
            optimizer.zero_grad()
            functional.cross_entropy(functional.linear(batch, weight, bias), labels).backward()
            optimizer.step()
            schedule.step()
    weights = [parameter.detach().cpu().numpy() for parameter in parameters]
    finite = all(np.isfinite(values).all() for values in weights)
    return LinearClassifier(mean, deviation, weights[0], weights[1], classes, rate, bool(finite))


def _batches(count: int, epochs: int, batch_size: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Row numbers of each epoch in a new order; whole batches, read many at once."""
    for _epoch in range(epochs):
        order = random.permutation(count)
        for start in range(0, count, batch_size * BATCHES_AT_ONCE):
            yield order[start : start + batch_size * BATCHES_AT_ONCE]
