"""The options of `evaluate` and of its built-in tasks, declared apart from the tasks so that --help is quick.

A task that you add may declare its options in its own file instead: see registry.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import ClassVar, Literal

from pipeline.value_checks import require_at_least, require_positive

Weights = Literal["trained", "random"]
"""The model's own weights, or initial weights, which show what the architecture achieves without training."""
L2_STRENGTHS = (1.0, 0.1, 0.01, 0.001, 0.0001)
SGD_LEARNING_RATES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)


def _require_positive_list(key: str, values: Sequence[float]) -> None:
    if not values or not all(0 < value < inf for value in values):
        raise ValueError(f"{key} is {values}; it must be a list of finite numbers above 0.")


def _require_least(options: object, prefix: str, **least: float) -> None:
    """Raises ValueError for an option that is set and below its minimum; prefix: the prefix of the options' keys."""
    for name, least_value in least.items():
        value = getattr(options, name)
        if value is not None:
            require_at_least(f"{prefix}{name}", value, least_value)


def _require_unique(key: str, values: Sequence[float], each: str = "each") -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"{key} is {values}; {each} may be listed only once.")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many images to use."""

    train_images: int | None = None
    """Number of random images of `train` to use; all if not set."""
    valid_images: int | None = None
    """Number of random images of `valid` to use; all if not set."""
    test_images: int | None = None
    """Number of random images of `test` to use; all if not set."""
    batch_size: int = 64
    """Images per forward pass and rank."""

    def __post_init__(self) -> None:
        _require_least(self, "", train_images=1, valid_images=1, test_images=1, batch_size=1)

    def limit(self, split_name: str) -> int | None:
        """The limit on the images of a split; None for a split of another name."""
        return getattr(self, f"{split_name}_images", None)


# Probes on frozen features


@dataclass(frozen=True, kw_only=True)
class SgdOptions:
    """Training by SGD."""

    rates: list[float] = field(default_factory=lambda: list(SGD_LEARNING_RATES))
    """Peak learning rates to try, from large to small, until the final validation loss stops falling."""
    epochs: int = 100
    """Passes over the training images; on ImageNet, 100 passes are the paper's million steps at batch size 128."""
    batch_size: int = 128
    """Images per step."""
    seeds: int = 3
    """Training runs at the chosen layer and learning rate, each with another order of the images."""

    def __post_init__(self) -> None:
        _require_positive_list("linear_probe.sgd.rates", self.rates)
        _require_least(self, "linear_probe.sgd.", epochs=1, batch_size=1, seeds=1)


@dataclass(frozen=True, kw_only=True)
class LinearProbeOptions:
    """A linear probe on every layer."""

    solver: Literal["lbfgs", "sgd"] = "lbfgs"
    """lbfgs needs the features of one layer in memory; sgd does not, and is for sets of ImageNet's size."""
    l2: list[float] = field(default_factory=lambda: list(L2_STRENGTHS))
    """L2 strengths to try with lbfgs: s in (mean loss) + s/2 * (sum of squared weights)."""
    sgd: SgdOptions = field(default_factory=SgdOptions)
    """Options of the solver sgd."""
    concatenate: int = 5
    """Fit a second probe on this many concatenated layers, centered at the best; 0 for none."""

    def __post_init__(self) -> None:
        _require_positive_list("linear_probe.l2", self.l2)
        if self.concatenate < 0 or self.concatenate == 1:
            raise ValueError(f"linear_probe.concatenate is {self.concatenate}; it must be 0, or 2 or more layers.")


@dataclass(frozen=True, kw_only=True)
class KnnOptions:
    """Weighted k nearest neighbors on every layer."""

    k: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    """Numbers of neighbors to try; numbers above the number of training images are skipped."""
    temperature: float = 0.07
    """A neighbor with cosine similarity s has the weight exp(s / temperature)."""

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"knn.k is {self.k}; it must be a list of numbers of at least 1.")
        require_positive("knn.temperature", self.temperature)


@dataclass(frozen=True, kw_only=True)
class LowDataOptions:
    """The linear probe with few labels."""

    per_class: list[int] | None = None
    """Labels per class; if not set, 4, 25 and 400 as far as train has that many."""
    fractions: list[float] | None = None
    """Fractions of train's labels; if not set, 0.01 and 0.1 as far as each class then has enough."""
    subsets: int = 5
    """Random subsets per setting."""
    choose_on: Literal["labels", "valid"] = "labels"
    """labels: choose layer and L2 strength by cross-validation in the subset; valid: choose on the split valid,
    which uses more labels."""
    layer: int | None = None
    """Use this layer instead of choosing one."""
    l2: list[float] = field(default_factory=lambda: [10.0, *L2_STRENGTHS])
    """L2 strengths to try: s in (mean loss) + s/2 * (sum of squared weights)."""

    def __post_init__(self) -> None:
        if self.per_class is not None and any(number < self.least for number in self.per_class):
            instead = "" if self.least == 1 else " (1 with choose_on valid)"
            raise ValueError(
                f"low_data.per_class is {self.per_class}; with choose_on {self.choose_on} each must be at least "
                f"{self.least}{instead}."
            )
        if self.fractions is not None and not all(0 < share <= 1 for share in self.fractions):
            raise ValueError(f"low_data.fractions is {self.fractions}; each must be above 0 and at most 1.")
        if self.per_class == [] and self.fractions == []:
            raise ValueError("low_data.per_class and low_data.fractions are both empty; set at least one value.")
        _require_unique("low_data.per_class", self.per_class or [])
        _require_unique("low_data.fractions", self.fractions or [])
        require_at_least("low_data.subsets", self.subsets, 1)
        _require_positive_list("low_data.l2", self.l2)

    @property
    def least(self) -> int:
        """Labels per class that the choice needs: with cross-validation one to train on and one to hold out."""
        return 2 if self.choose_on == "labels" else 1

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits whose labels are used."""
        return ("train", "test") if self.choose_on == "labels" else ("train", "valid", "test")


# Tasks that train by gradient descent


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a task trains: epochs, batch size, augmentation, learning rates."""

    TASK: ClassVar[str] = ""
    """The task's name, for error messages about its options."""

    epochs: int = 50
    """Maximum number of passes over the training images."""
    patience: int = 5
    """Stop after this many epochs without a better validation accuracy; 0 never stops early."""
    global_size: int = 128
    """Images per optimizer step over all ranks; each rank processes them in batches of batch_size."""
    flip: bool = True
    """Flip training images horizontally with probability 1/2."""
    reflect_crop: int = 4
    """Pad training images by this many reflected pixels, then take a random crop of the original size."""
    learning_rates: list[float] = field(default_factory=lambda: [3e-4])
    """Learning rates to try."""

    def __post_init__(self) -> None:
        _require_least(self, f"{self.TASK}.", epochs=1, patience=0, global_size=1, reflect_crop=0)
        _require_positive_list(f"{self.TASK}.learning_rates", self.learning_rates)
        _require_unique(f"{self.TASK}.learning_rates", self.learning_rates, "each learning rate")

    def check_fits(self, resolution: int) -> None:
        """Raises ValueError if reflect_crop does not fit the image size."""
        if self.reflect_crop >= resolution:
            raise ValueError(
                f"{self.TASK}.reflect_crop is {self.reflect_crop}; for images of {resolution}x{resolution} it must be "
                f"less than {resolution}."
            )


@dataclass(frozen=True, kw_only=True)
class AttentiveProbeOptions(Recipe):
    """The attentive probe."""

    TASK: ClassVar[str] = "attentive_probe"

    epochs: int = 30
    """Passes over the training images, over which a cosine schedule lowers the learning rate to zero."""
    patience: int = 0
    """Stop after this many epochs without a better validation accuracy; 0 never stops early."""
    layers: list[int] | None = None
    """Layers to try, from 0 (input of the first block) to the number of blocks (after the final norm); if not set,
    five around the middle, where the paper's probes are best, and the last."""
    heads: int | None = None
    """Attention heads of the pooling; as many as the model has if not set."""
    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 3e-4])
    """Peak learning rates to try."""
    weight_decay: float = 0.01
    """Decoupled weight decay, as in AdamW."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_least(self, f"{self.TASK}.", weight_decay=0, heads=1)
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ValueError(f"{self.TASK}.layers is {self.layers}; it must be a list of different layers.")


@dataclass(frozen=True, kw_only=True)
class FullModelRecipe(Recipe):
    """Options of the tasks that train all weights of a model, once at each learning rate."""

    clip_norm: float = 1.0
    """Maximum norm of the gradients; 0 turns clipping off."""
    recompute: bool = False
    """Activation checkpointing: recompute each block in the backward pass to save memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(f"{self.TASK}.clip_norm", self.clip_norm, 0)


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions(FullModelRecipe):
    """Fine-tuning on labels."""

    TASK: ClassVar[str] = "fine_tune"

    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-4, 3e-5])
    """Constant learning rates to try, about ten times below the learning rate of pretraining; the model is trained
    once at each."""
    generative_weight: float = 1.0
    """Weight of the generative loss, which is added to the class loss; 0 trains on the class loss only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(f"{self.TASK}.generative_weight", self.generative_weight, 0)


@dataclass(frozen=True, kw_only=True)
class DistillOptions(FullModelRecipe):
    """Distillation of a fine-tuned model into a smaller one."""

    TASK: ClassVar[str] = "distill"

    epochs: int = 50
    """Passes over the unlabelled images, over which a cosine schedule lowers the learning rate to zero."""
    patience: int = 0
    """Stop after this many epochs without a better validation accuracy; 0 never stops early."""
    teacher: str | None = None
    """The folder of a classifier; if not set, the one that fine_tune wrote into the results."""
    student: str | None = None
    """A run, checkpoint or model folder from which the student starts; initial weights if not set."""
    layers: int | None = None
    """Number of blocks of a student with initial weights; half the teacher's if not set."""
    width: int | None = None
    """Width of a student with initial weights; half the teacher's if not set."""
    heads: int | None = None
    """Attention heads of a student with initial weights; if not set, of about the teacher's width per head."""
    split: str = "train"
    """The split to train on; its labels are not used."""
    temperature: float = 1.0
    """Temperature that softens the distributions of teacher and student."""
    learning_rates: list[float] = field(default_factory=lambda: [3e-3, 1e-3, 3e-4])
    """Peak learning rates to try; the student and the label-only baseline are each trained once at each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(f"{self.TASK}.temperature", self.temperature)
        _require_least(self, f"{self.TASK}.", layers=1, width=1, heads=1)
        for name, value in {"layers": self.layers, "width": self.width, "heads": self.heads}.items():
            if value is not None and self.student is not None:
                raise ValueError(
                    f"{self.TASK}.{name} is {value}, but {self.TASK}.student is {self.student}, which has its own "
                    f"shape; set only one of them."
                )
        if self.split in ("valid", "test"):
            raise ValueError(
                f"{self.TASK}.split is {self.split}; valid and test are used for evaluation, so choose another split."
            )


# Generation


@dataclass(frozen=True, kw_only=True)
class DensityOptions:
    """The model's loss, in nats and bits per color."""

    split: str = "test"
    """The split to score."""
    draws: int = 5
    """Random masks per image, for a model that predicts masked pixels."""

    def __post_init__(self) -> None:
        require_at_least("density.draws", self.draws, 1)


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """A figure of completed half images."""

    images: int = 8
    """Images to complete, one per row."""
    samples: int = 4
    """Completions per image."""
    temperature: float = 1.0
    """Sampling temperature: 1 samples from the model's distribution, as the paper does; 0 takes the most probable
    color."""
    split: str = "test"
    """The split from which the images are taken."""

    def __post_init__(self) -> None:
        _require_least(self, "", images=1, samples=1, temperature=0)


@dataclass(frozen=True, kw_only=True)
class CompletionsOptions(GridOptions):
    """Completed half images, and the Fréchet distance of completions to real images."""

    distance_images: int = 1000
    """Number of further images to complete for the Fréchet distance, at most half the split; 0 skips the distance."""
    feature_network: str | None = None
    """A TorchScript file with the feature network, such as Inception; EfficientNet-Lite0 if not set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distance_images < 0 or self.distance_images == 1:
            raise ValueError(f"distance_images is {self.distance_images}; it must be 0, or at least 2.")
        if self.feature_network is not None and not Path(self.feature_network).is_file():
            raise ValueError(
                f"feature_network is {self.feature_network}, which does not exist; give a TorchScript file."
            )
