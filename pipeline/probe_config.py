"""The probe of the representation during training: its options, and what it costs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline import costs
from pipeline.value_checks import require_minimums

if TYPE_CHECKING:
    from transformers import GPT2Config

STRENGTHS = tuple(10.0**exponent for exponent in range(2, -7, -1))
"""The L2 strengths that are tried, the strongest first, as fractions of the mean eigenvalue of the Gram matrix."""
EIGEN_FLOPS = 9
"""FLOPs of the eigendecomposition of a symmetric D x D matrix with eigenvectors, over D^3 (Golub and Van Loan)."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A ridge classifier on the features of each layer, fitted in closed form while the model trains."""

    every_steps: int = 0
    """Steps between probes; the last step is always probed. 0 for no probes."""
    train_images: int = 5000
    """Labelled images of the `train` split to which the classifiers are fitted, equally many of each class where there
    are so many."""
    test_images: int = 2000
    """Labelled images of the `valid` split on which the accuracy is measured. As many others of `valid` choose the L2
    strength and the layer."""
    shards: str | None = None
    """Folder or URL of a labelled shard set of the training set's palette and resolution; null: the training set, or
    the first labelled one of a mixture."""

    def __post_init__(self) -> None:
        require_minimums("probe", self, every_steps=0, train_images=2, test_images=1)

    @property
    def images(self) -> int:
        """Images whose features a probe computes."""
        return self.train_images + 2 * self.test_images

    def count(self, steps: int) -> int:
        """The number of probes in a run of so many steps."""
        return -(-steps // self.every_steps) if self.every_steps else 0

    def flops(self, model: "GPT2Config", classes: int) -> float:
        """FLOPs of one probe: forward passes, and the classifiers of all layers."""
        forward = self.images * model.n_positions * costs.flops_per_token(model) / 3
        width, held_out = model.n_embd, 2 * self.test_images
        gram = 2 * self.train_images * width**2 + EIGEN_FLOPS * width**3
        scores = 2 * held_out * width * (width + len(STRENGTHS) * classes)
        return forward + (model.n_layer + 1) * (gram + scores)
