"""The options of `evaluate` and of all its own tasks, declared without importing a task, so that --help is quick.

A task of its own file may declare its options there instead: see registry.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import ClassVar, Literal

from pipeline.value_checks import require_at_least, require_positive

Weights = Literal["trained", "random"]
"""The model's own, or initial ones in their place: what the architecture knows before any training."""
L2_STRENGTHS = (1.0, 0.1, 0.01, 0.001, 0.0001)
SGD_LEARNING_RATES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)


def _require_positive_list(key: str, values: Sequence[float]) -> None:
    if not values or not all(0 < value < inf for value in values):
        raise ValueError(f"{key} is {values}; it must be a list of numbers above 0, and finite.")


def _require_least(options: object, prefix: str, **least: float) -> None:
    """Raises ValueError for an option that is set and below its least value; prefix: of the options' keys."""
    for name, least_value in least.items():
        value = getattr(options, name)
        if value is not None:
            require_at_least(f"{prefix}{name}", value, least_value)


def _require_unique(key: str, values: Sequence[float], each: str = "each") -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"{key} is {values}; {each} must stand there once.")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many images are used."""

    train_images: int | None = None
    """Probe on this many random images of `train`; all if not set."""
    valid_images: int | None = None
    """Use this many random images of `valid`; all if not set."""
    test_images: int | None = None
    """Use this many random images of `test`; all if not set."""
    batch_size: int = 64
    """Images in one forward pass of one rank."""

    def __post_init__(self) -> None:
        _require_least(self, "", train_images=1, valid_images=1, test_images=1, batch_size=1)

    def limit(self, split_name: str) -> int | None:
        """The cap on a split; a split of another name has none."""
        return getattr(self, f"{split_name}_images", None)


# Probes on frozen features


@dataclass(frozen=True, kw_only=True)
class SgdOptions:
    """Training by SGD."""

    rates: list[float] = field(default_factory=lambda: list(SGD_LEARNING_RATES))
    """Peak learning rates to try, from large to small, until the final validation loss stops falling."""
    epochs: int = 100
    """Passes over the training images; on ImageNet 100 are the paper's million steps at batch 128."""
    batch_size: int = 128
    """Images in a step."""
    seeds: int = 3
    """Trainings of the chosen layer and learning rate, each with another order of the images."""

    def __post_init__(self) -> None:
        _require_positive_list("linear_probe.sgd.rates", self.rates)
        _require_least(self, "linear_probe.sgd.", epochs=1, batch_size=1, seeds=1)


@dataclass(frozen=True, kw_only=True)
class LinearProbeOptions:
    """The linear probe over every layer."""

    solver: Literal["lbfgs", "sgd"] = "lbfgs"
    """lbfgs holds a layer of the training set in memory; sgd does not, and is for sets of ImageNet's size."""
    l2: list[float] = field(default_factory=lambda: list(L2_STRENGTHS))
    """Strengths to try with lbfgs: each is s in (mean loss) + s/2 * (sum of squared weights)."""
    sgd: SgdOptions = field(default_factory=SgdOptions)
    """How to train with sgd."""
    concatenate: int = 5
    """A second probe on this many concatenated layers, centred at the best; 0 for none."""

    def __post_init__(self) -> None:
        _require_positive_list("linear_probe.l2", self.l2)
        if self.concatenate < 0 or self.concatenate == 1:
            raise ValueError(f"linear_probe.concatenate is {self.concatenate}; it must be 0, or 2 or more layers.")


@dataclass(frozen=True, kw_only=True)
class KnnOptions:
    """Weighted k nearest neighbours over every layer."""

    k: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    """Numbers of neighbours to try; those above the number of training images are skipped."""
    temperature: float = 0.07
    """A neighbour of cosine similarity s has the weight exp(s / temperature)."""

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"knn.k is {self.k}; it must be a list of numbers of at least 1.")
        require_positive("knn.temperature", self.temperature)


@dataclass(frozen=True, kw_only=True)
class LowDataOptions:
    """The linear probe with few labels."""

    per_class: list[int] | None = None
    """Labels of each class; if not set those of 4, 25, 400 that train has."""
    fractions: list[float] | None = None
    """Shares of train's labels; if not set those of 0.01, 0.1 that give each class enough."""
    subsets: int = 5
    """Random subsets of each setting."""
    choose_on: Literal["labels", "valid"] = "labels"
    """labels: layer and strength by cross-validation in the subset; valid: on the split valid, more labels."""
    layer: int | None = None
    """Take this layer instead of choosing one."""
    l2: list[float] = field(default_factory=lambda: [10.0, *L2_STRENGTHS])
    """Strengths to try: each is s in (mean loss) + s/2 * (sum of squared weights)."""

    def __post_init__(self) -> None:
        if self.per_class is not None and any(number < self.least for number in self.per_class):
            instead = "" if self.least == 1 else ", or choose_on valid"
            raise ValueError(
                f"low_data.per_class is {self.per_class}; layer and strength are chosen on {self.choose_on}, "
                f"which takes {self.least} or more labels of a class{instead}."
            )
        if self.fractions is not None and not all(0 < share <= 1 for share in self.fractions):
            raise ValueError(f"low_data.fractions is {self.fractions}; shares of the labels are above 0 and at most 1.")
        if self.per_class == [] and self.fractions == []:
            raise ValueError("low_data.per_class and low_data.fractions are both empty; give one setting or more.")
        _require_unique("low_data.per_class", self.per_class or [])
        _require_unique("low_data.fractions", self.fractions or [])
        require_at_least("low_data.subsets", self.subsets, 1)
        _require_positive_list("low_data.l2", self.l2)

    @property
    def least(self) -> int:
        """Labels of a class that the choice takes: one is held out, one is learned from."""
        return 2 if self.choose_on == "labels" else 1

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits whose labels are used."""
        return ("train", "test") if self.choose_on == "labels" else ("train", "valid", "test")


# Trainings by gradient descent


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a task trains: for how long, in which batches, at which learning rates."""

    TASK: ClassVar[str] = ""
    """The task's name, for the messages about its options."""

    epochs: int = 50
    """At most this many passes over the training images."""
    patience: int = 5
    """Stop after this many epochs without a better validation accuracy; 0 never stops early."""
    global_size: int = 128
    """Images of one optimizer step, over all ranks; batch_size of them go through a rank at once."""
    flip: bool = True
    """Mirror half of the training images."""
    reflect_crop: int = 4
    """Pad training images by this many pixels of their reflection and crop them to size again at random."""
    learning_rates: list[float] = field(default_factory=lambda: [3e-4])
    """Learning rates to try."""

    def __post_init__(self) -> None:
        _require_least(self, f"{self.TASK}.", epochs=1, patience=0, global_size=1, reflect_crop=0)
        _require_positive_list(f"{self.TASK}.learning_rates", self.learning_rates)
        _require_unique(f"{self.TASK}.learning_rates", self.learning_rates, "each rate")

    def check_fits(self, resolution: int) -> None:
        """Raises ValueError if the reflection would be wider than an image."""
        if self.reflect_crop >= resolution:
            raise ValueError(
                f"{self.TASK}.reflect_crop is {self.reflect_crop}; images of {resolution}x{resolution} have fewer "
                f"than {resolution} pixels to reflect."
            )


@dataclass(frozen=True, kw_only=True)
class AttentiveProbeOptions(Recipe):
    """The attentive probe."""

    TASK: ClassVar[str] = "attentive_probe"

    epochs: int = 30
    """Passes over the training images; the learning rate falls to zero by half a cosine over them."""
    patience: int = 0
    """Stop after this many epochs without a better validation accuracy; 0 never stops early."""
    layers: list[int] | None = None
    """Layers to try, 0 (input of the first block) to the number of blocks (after the final norm); if not set, five
    around the middle, where the paper's probes are best, and the last."""
    heads: int | None = None
    """Heads of the pooling; as many as the model's if not set."""
    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 3e-4])
    """Peak learning rates to try."""
    weight_decay: float = 0.01
    """Decoupled, AdamW's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_least(self, f"{self.TASK}.", weight_decay=0, heads=1)
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ValueError(f"{self.TASK}.layers is {self.layers}; it must be a list of layers, each once.")


@dataclass(frozen=True, kw_only=True)
class WholeModelRecipe(Recipe):
    """Of the tasks that train all of a model, at one learning rate after the other."""

    clip_norm: float = 1.0
    """Largest norm of a gradient; 0 leaves it as it is."""
    recompute: bool = False
    """Activation checkpointing: recompute each block in the backward pass, where memory is short."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(f"{self.TASK}.clip_norm", self.clip_norm, 0)


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions(WholeModelRecipe):
    """Fine-tuning on labels."""

    TASK: ClassVar[str] = "fine_tune"

    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-4, 3e-5])
    """Constant learning rates to try, about ten times below that of pretraining; each is a training of its own."""
    generative_weight: float = 1.0
    """Weight of the generative loss beside the class loss; 0 trains on the classes alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(f"{self.TASK}.generative_weight", self.generative_weight, 0)


@dataclass(frozen=True, kw_only=True)
class DistillOptions(WholeModelRecipe):
    """Distillation of a fine-tuned model into a smaller one."""

    TASK: ClassVar[str] = "distill"

    epochs: int = 50
    """Passes over the unlabelled images; the learning rate falls to zero by half a cosine over them."""
    patience: int = 0
    """Stop after this many epochs without a better validation accuracy; 0 never stops early."""
    teacher: str | None = None
    """A classifier's folder; what fine_tune left in the results if not set."""
    student: str | None = None
    """A run, a checkpoint or a model folder that the student starts from; initial weights if not set."""
    layers: int | None = None
    """Blocks of a student from initial weights; half the teacher's if not set."""
    width: int | None = None
    """Its width; half the teacher's if not set."""
    heads: int | None = None
    """Its heads; of the same width as the teacher's, as far as that divides, if not set."""
    split: str = "train"
    """The split whose images, labelled or not, are learned from."""
    temperature: float = 1.0
    """Both distributions are softened by it."""
    learning_rates: list[float] = field(default_factory=lambda: [3e-3, 1e-3, 3e-4])
    """Peak learning rates to try; each is a training of its own, of the student and of the one taught by labels
    alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(f"{self.TASK}.temperature", self.temperature)
        _require_least(self, f"{self.TASK}.", layers=1, width=1, heads=1)
        for name, value in {"layers": self.layers, "width": self.width, "heads": self.heads}.items():
            if value is not None and self.student is not None:
                raise ValueError(
                    f"{self.TASK}.{name} is {value}, but {self.TASK}.student is {self.student}, which has a shape of "
                    f"its own; give one or the other."
                )
        if self.split in ("valid", "test"):
            raise ValueError(f"{self.TASK}.split is {self.split}; it must be another than valid and test.")


# The model as a generator


@dataclass(frozen=True, kw_only=True)
class DensityOptions:
    """Nats and bits per color."""

    split: str = "test"
    """The split to score."""
    draws: int = 5
    """Masks drawn for each image, for a model of masked pixels."""

    def __post_init__(self) -> None:
        require_at_least("density.draws", self.draws, 1)


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """Half images completed."""

    images: int = 8
    """Images to complete, one a row."""
    samples: int = 4
    """Completions of each image."""
    temperature: float = 1.0
    """1 samples from the model as it is, the paper's choice; 0 takes the most probable color."""
    split: str = "test"
    """The split the images come from."""

    def __post_init__(self) -> None:
        _require_least(self, "", images=1, samples=1, temperature=0)


@dataclass(frozen=True, kw_only=True)
class CompletionsOptions(GridOptions):
    """Half images completed, and how far completions are from true images."""

    distance_images: int = 1000
    """Complete this many more images for the Fréchet distance; half the split if it has fewer; 0 for no distance."""
    feature_network: str | None = None
    """A TorchScript file of a network to compare features of, such as Inception; EfficientNet-Lite0 if not set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distance_images < 0 or self.distance_images == 1:
            raise ValueError(f"distance_images is {self.distance_images}; it must be 0, or 2 and above.")
        if self.feature_network is not None and not Path(self.feature_network).is_file():
            raise ValueError(
                f"feature_network is {self.feature_network}, which is no file; give a TorchScript network."
            )
