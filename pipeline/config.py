"""The configuration of a training run: dataclasses, filled from a YAML file and dotted overrides.

The docstring below a field is its line of --help.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from data_prep.shards.addresses import hide_secrets
from pipeline.layout import BatchConfig, ParallelConfig
from pipeline.probe_config import ProbeConfig
from pipeline.schedule import ScheduleConfig
from pipeline.start import StartConfig
from pipeline.value_checks import require_at_least, require_minimums, require_positive

FLOAT8_MULTIPLE = 16
"""The dimensions of a float8 matrix product must be multiples of this: the widths, and the tokens of a micro-batch."""


WEIGHT_PARTS = 1_000_000
"""The weights of a mixture are rounded to multiples of one part in this many."""


class ModelShape(NamedTuple):
    """Depth, width and heads of a model; a head has width / heads dimensions."""

    layers: int
    width: int
    heads: int


SIZES = {
    "s": ModelShape(layers=24, width=512, heads=8),
    "m": ModelShape(layers=36, width=1024, heads=8),
    "l": ModelShape(layers=48, width=1536, heads=16),
    # The head count of XL was never published; 24 gives the usual 128 dimensions a head. It changes no parameter count.
    "xl": ModelShape(layers=60, width=3072, heads=24),
}
"""The paper's sizes."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model: a size of the paper; layers, width and heads override those of the size, each by itself."""

    size: Literal["s", "m", "l", "xl"] | None = None
    """A size of the paper: s 76M, m 455M, l 1.4B, xl 6.8B parameters; null to set layers, width and heads instead."""
    layers: int | None = None
    """Number of transformer blocks; null: as in `size`."""
    width: int | None = None
    """Hidden size; null: as in `size`."""
    heads: int | None = None
    """Attention heads of each block; must divide `width`; null: as in `size`."""
    resolution: int = 32
    """Width and height of the images in pixels; a sequence has resolution * resolution tokens."""
    block: Literal["igpt", "gpt2"] = "igpt"
    """igpt: the paper's block; gpt2: transformers' stock block."""
    dropout: float = 0.0
    """Probability of dropping embeddings, attention weights and residual branches; the paper trained without."""

    def __post_init__(self) -> None:
        if self.size is None and None in (self.layers, self.width, self.heads):
            raise ValueError(
                "model.size is not set; set it to s, m, l or xl, or set model.layers, model.width and model.heads."
            )
        require_minimums("model", self, layers=1, width=1, heads=1, resolution=1)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; it must be at least 0 and below 1.")
        if self.shape.width % self.shape.heads:
            raise ValueError(
                f"model.width is {self.shape.width}; it must be a multiple of model.heads, {self.shape.heads}."
            )

    @property
    def shape(self) -> ModelShape:
        """Layers, width and heads: those of the size, overridden by the ones that are set."""
        return ModelShape(**_shape_values(asdict(self)))


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The training objective."""

    kind: Literal["next_color", "masked_color"] = "next_color"
    """next_color: predict each pixel's color from the pixels before it; masked_color: mask pixels and predict them from
    all others (the paper's BERT objective)."""
    mask_probability: float = 0.15
    """Probability of masking each pixel, under masked_color."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_probability < 1:
            raise ValueError(f"objective.mask_probability is {self.mask_probability}; it must be above 0 and below 1.")


@dataclass(frozen=True, kw_only=True)
class MixtureEntry:
    """A shard set of a mixture."""

    shards: str
    """Folder or URL of the shard set, as data.shards."""
    weight: float
    """Share of the images that come from this set, relative to the other weights."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data."""

    shards: str | None = None
    """Folder of a shard set (python -m data_prep shards), or its URL: https://host/set, s3://bucket/set,
    hf://datasets/owner/name/set, 'pipe:ssh HOST cat /sets/{}'. From a URL, `train` is streamed."""
    mixture: list[MixtureEntry] | None = None
    """Several shard sets instead of `shards`, each with a weight: [{shards: PATH, weight: 0.7}, {shards: PATH, weight:
    0.3}]; on the command line as JSON. Weights are relative to their sum."""
    flip: bool = False
    """Mirror half of the training images, chosen at random by seed and position in the data order."""
    reflect_crop: int = 0
    """Pad training images by this many pixels of their reflection, then crop them to their size at random, as is usual
    for CIFAR (4 pixels at 32x32); 0 for no crop."""

    def __post_init__(self) -> None:
        require_minimums("data", self, reflect_crop=0)
        if self.mixture is None:
            return
        if self.shards is not None:
            raise ValueError(
                f"data.shards is {hide_secrets(self.shards)} and data.mixture is set too; set one of the two."
            )
        if not self.mixture:
            raise ValueError("data.mixture is an empty list; it must name at least one shard set with its weight.")
        for number, entry in enumerate(self.mixture):
            require_positive(f"data.mixture[{number}].weight", entry.weight)
        least = sum(entry.weight for entry in self.mixture) / WEIGHT_PARTS
        for number, entry in enumerate(self.mixture):
            require_at_least(f"data.mixture[{number}].weight", entry.weight, least)

    @property
    def paths(self) -> list[str]:
        """Folder or URL of each shard set; empty if none is set."""
        return [entry.shards for entry in self.mixture or []] or ([self.shards] if self.shards else [])


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW: Adam as in the paper's appendix A.1, with decoupled weight decay on the weight matrices only."""

    learning_rate: float = 0.003
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the blocks' and the head's matrices."""
    clip_norm: float = 1.0
    """Global gradient norm to which larger gradients are clipped; 0 for no clipping."""

    def __post_init__(self) -> None:
        require_positive("optimizer.learning_rate", self.learning_rate)
        require_minimums("optimizer", self, weight_decay=0, clip_norm=0)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {list(self.betas)}; both must be at least 0 and below 1.")


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """An exponential moving average of the weights, which is validated beside them and saved in checkpoints."""

    decay: float = 0.0
    """After each applied step, average = decay * average + (1 - decay) * weights, in fp32, from the initial weights on;
    such as 0.999; 0 for no average."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}; it must be at least 0 (no average) and below 1.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved, and which are kept."""

    every_steps: int = 5000
    """Steps between checkpoints; the last step is always saved."""
    every_minutes: float = 0.0
    """Minutes between checkpoints, in addition to every_steps; 0 for never."""
    asynchronous: bool = True
    """Continue training while a thread writes the checkpoint; training waits only for a copy to host memory."""
    folder: str | None = None
    """Folder for the checkpoints of this run alone, such as one on a larger disk that all nodes share; RUN/checkpoints
    becomes a link to it. null: RUN/checkpoints."""
    keep_last: int = 2
    """Number of newest checkpoints to retain."""
    keep_every: int = 100_000
    """Retain the checkpoints at multiples of this step permanently; 0 for none."""

    def __post_init__(self) -> None:
        require_minimums("checkpoint", self, every_steps=1, every_minutes=0, keep_last=1, keep_every=0)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The loss on held-out images during training."""

    every_steps: int = 5000
    """Steps between validations; the last step is always validated."""
    images: int = 5120
    """Images of the `valid` split to evaluate, the same ones each time; all of them if the split is smaller. Of a
    mixture, so many images of each set."""

    def __post_init__(self) -> None:
        require_minimums("validation", self, every_steps=1, images=1)


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Completions of half images during training, written to TensorBoard and RUN/samples."""

    every_steps: int = 50_000
    """Steps between completions; 0 for none. A masked_color model draws none."""
    images: int = 4
    """Images of the `valid` split (of each set of a mixture) to complete, each twice."""

    def __post_init__(self) -> None:
        require_minimums("samples", self, every_steps=0, images=1)


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """When a step is skipped, and when a run ends with an error."""

    max_skipped: int = 10
    """Consecutive skipped steps after which the run ends."""
    spike_sigmas: float = 6.0
    """A loss or gradient norm this many standard deviations above the mean of the window is a loss spike; 0 for no
    detection."""
    spike_window: int = 128
    """Number of preceding applied steps that a step is compared with."""
    skip_spikes: bool = False
    """Skip the update of a loss spike; otherwise it is applied and logged."""
    replicas_every_steps: int = 1000
    """Steps between comparisons of the weights that data-parallel ranks replicate; they are also compared before each
    save. 0 for never, also not before saves."""
    hang_minutes: float = 20.0
    """Minutes without progress in a step after which the run writes the stacks of all ranks and ends; the first step,
    validation and saves may take three times as long; 0 for never."""

    def __post_init__(self) -> None:
        require_minimums(
            "health", self, max_skipped=1, spike_sigmas=0, spike_window=2, replicas_every_steps=0, hang_minutes=0
        )


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """torch.profiler traces of some steps; `touch RUN/PROFILE` starts the profiler too."""

    first_step: int = 10
    """First step to profile."""
    steps: int = 0
    """Number of steps to profile; 0 for none, and 3 if `touch RUN/PROFILE` starts the profiler."""

    def __post_init__(self) -> None:
        require_minimums("profile", self, first_step=1, steps=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The configuration of a training run."""

    seed: int = 0
    """Seeds the initial weights and the order of the images."""
    deterministic: bool = False
    """Use deterministic kernels only: the same command computes the same bits each time, more slowly on CUDA."""
    model: ModelConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    start: StartConfig = field(default_factory=StartConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Precision of forward and backward passes; master weights and moments are always fp32. fp8: bf16, with the blocks'
    matrix products in float8; needs block igpt, ZeRO-1 or 2, and an accelerator with float8 products."""
    compile: bool | Literal["auto"] = "auto"
    """Compile each block with torch.compile (needs a C++ compiler on CPU, a C compiler on CUDA); auto: on accelerators
    that have a compiler."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        if self.data.reflect_crop >= self.model.resolution:
            raise ValueError(
                f"data.reflect_crop is {self.data.reflect_crop}; it must be below model.resolution, "
                f"{self.model.resolution}: a reflection can't be larger than the image."
            )
        if self.profile.steps and self.profile.first_step > self.schedule.steps:
            raise ValueError(
                f"profile.first_step is {self.profile.first_step}; it must be at most schedule.steps, "
                f"{self.schedule.steps}."
            )
        if self.ema.decay and self.parallel.nvme_path is not None:
            raise ValueError(
                f"ema.decay is {self.ema.decay}; with parallel.nvme_path it must be 0: DeepSpeed's buffers for NVMe "
                f"hold four tensors of a partition: weights, gradients and two moments; the average would be a fifth."
            )
        if self.precision == "fp8":
            self._check_float8()

    def _check_float8(self) -> None:
        """Raises ValueError for options and dimensions that float8 products do not support."""
        parallel, positions = self.parallel, self.model.resolution**2
        refused = {
            f"model.block {self.model.block}": self.model.block != "igpt" and "its projections are not Linear modules",
            f"parallel.zero_stage {parallel.zero_stage}": {
                0: "it has no bf16 weights",
                3: "float8 products would keep the gathered weights in memory",
            }.get(parallel.zero_stage),
            f"parallel.tensor_parallel {parallel.tensor_parallel}": parallel.tensor_parallel > 1
            and "its split matrices have no float8 products",
        }
        for setting, reason in refused.items():
            if reason:
                raise ValueError(f"precision is fp8; with {setting} it must be bf16 or fp32: {reason}.")
        width = self.model.shape.width
        if width % FLOAT8_MULTIPLE:
            raise ValueError(f"model.width is {width}; with precision fp8 it must be a multiple of {FLOAT8_MULTIPLE}.")
        if self.batch.micro_size * positions % FLOAT8_MULTIPLE:
            raise ValueError(
                f"batch.micro_size is {self.batch.micro_size}; with precision fp8 micro_size x {positions} pixels must "
                f"be a multiple of {FLOAT8_MULTIPLE}, and is {self.batch.micro_size * positions}."
            )


def require_resolution(config: TrainConfig, resolution: int, path: object) -> None:
    """Raises ValueError naming the key if a shard set's images are not of the model's resolution."""
    if resolution != config.model.resolution:
        raise ValueError(
            f"model.resolution is {config.model.resolution}; it must be {resolution}, the resolution of the shard set "
            f"{path}."
        )


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain lists and dicts: the content of config.yaml."""
    plain = asdict(config)
    plain["optimizer"]["betas"] = list(config.optimizer.betas)
    plain["start"]["path"] = config.start.resolved_path
    return plain


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two plain configurations, each with (old, new).

    `model.size` and the layers, width and heads that it stands for are the same model: spelling one as the other is not
    a change. Where the models differ, a null of layers, width or heads is replaced by the size's value.
    """
    changes = _changed_keys(old, new)
    before, after = (_shape_values(config.get("model")) for config in (old, new))
    for name in ModelShape._fields:
        key = f"model.{name}"
        if key in changes:
            changes[key] = (before[name], after[name])
            if before[name] == after[name]:
                del changes[key]
    if before == after:
        changes.pop("model.size", None)
    return changes


def _shape_values(model: Any) -> dict[str, Any]:
    """Layers, width and heads of a plain `model` section: its own values, or the size's where they are null."""
    model = model if isinstance(model, dict) else {}
    size = SIZES.get(str(model.get("size")))
    defaults = dict.fromkeys(ModelShape._fields) if size is None else size._asdict()
    return {name: default if model.get(name) is None else model[name] for name, default in defaults.items()}


def _changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    changes: dict[str, tuple[Any, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes |= _changed_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            changes[prefix + key] = (before, after)
    return changes
