"""How the batch and the model's state are divided over ranks: the options, and quantities derived from them."""

from dataclasses import dataclass
from typing import Literal

from pipeline.value_checks import require_minimums


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The batch. Gradient accumulation steps are global_size / (micro_size * data-parallel ranks)."""

    global_size: int = 128
    """Global batch size: images per optimizer step, over all ranks."""
    micro_size: int = 16
    """Micro-batch size: images per forward pass and rank."""
    warmup_steps: int = 0
    """Steps over which the batch grows to global_size."""
    first_size: int | None = None
    """Images of the first step, if the batch grows; also the increment by which it grows."""

    def __post_init__(self) -> None:
        require_minimums("batch", self, global_size=1, micro_size=1, warmup_steps=0)
        if (self.warmup_steps > 0) != (self.first_size is not None):
            raise ValueError(
                f"batch.warmup_steps is {self.warmup_steps} and batch.first_size is "
                f"{'not set' if self.first_size is None else self.first_size}; set both for a batch that grows, or "
                f"neither."
            )
        if self.first_size is not None and (self.first_size < 1 or self.global_size % self.first_size):
            raise ValueError(
                f"batch.first_size is {self.first_size}; it must divide batch.global_size, {self.global_size}."
            )

    def size_at(self, step: int) -> int:
        """Images of a step, counted from 1: a pure function of the step.

        During the warm-up the size takes each multiple of first_size for equally many steps.
        """
        if self.first_size is None or step > self.warmup_steps:
            return self.global_size
        sizes = self.global_size // self.first_size
        return self.first_size * (1 + (step - 1) * sizes // self.warmup_steps)

    def images_after(self, steps: int) -> int:
        """Images read by the first `steps` steps."""
        growing = min(steps, self.warmup_steps)
        return sum(map(self.size_at, range(1, growing + 1))) + (steps - growing) * self.global_size

    def images_between(self, first: int, last: int) -> int:
        """Images of the steps after `first`, up to `last`; 0 if there are none."""
        return max(self.images_after(last) - self.images_after(first), 0)

    def accumulation_steps(self, data_ranks: int) -> int:
        """Micro-batches of a rank in a step of global_size. Raises ValueError if a batch size is not divisible."""
        images = self.micro_size * data_ranks
        for key in ("first_size", "global_size"):
            size = getattr(self, key)
            if size is not None and size % images:
                raise ValueError(
                    f"batch.{key} is {size}; it must be a multiple of batch.micro_size times the data-parallel ranks, "
                    f"{self.micro_size} x {data_ranks} = {images}."
                )
        return self.global_size // images


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and its optimizer state are divided over ranks."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO partitions over ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights."""
    pipeline_stages: int = 1
    """Number of pipeline stages, each a sequence of blocks on ranks of its own; more than 1 needs ZeRO-1."""
    tensor_parallel: int = 1
    """Number of ranks over which each block's matrices and heads are split; more than 1 needs ZeRO-1 or 2."""
    sequence_parallel: bool = True
    """Whether tensor-parallel ranks also divide positions, in norms, residuals and dropout: fewer activations."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What is offloaded to host memory: nothing, the optimizer state, or (with ZeRO-3) weights too."""
    nvme_path: str | None = None
    """Folder on a local NVMe disk of each node, to which ZeRO-3 offloads instead of to host memory; needs libaio."""
    recompute: bool = False
    """Activation checkpointing: recompute each block in the backward pass."""
    communication: Literal["fp32", "bf16"] = "fp32"
    """Precision of gradients in messages between data-parallel ranks; bf16 halves them, and rounds each rank's sum."""

    def __post_init__(self) -> None:
        require_minimums("parallel", self, pipeline_stages=1, tensor_parallel=1)
        if self.pipeline_stages > 1 and self.zero_stage != 1:
            raise ValueError(
                f"parallel.zero_stage is {self.zero_stage}; with parallel.pipeline_stages {self.pipeline_stages} it "
                f"must be 1: DeepSpeed clips gradients wrongly with 0, and has no pipeline for 2 and 3."
            )
        if self.tensor_parallel > 1 and self.zero_stage not in (1, 2):
            raise ValueError(
                f"parallel.zero_stage is {self.zero_stage}; with parallel.tensor_parallel {self.tensor_parallel} it "
                f"must be 1 or 2."
            )
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(
                f"parallel.zero_stage is {self.zero_stage}; with parallel.offload {self.offload} it must be at least "
                f"{needed}."
            )
        if self.nvme_path is not None and (self.offload == "none" or self.zero_stage != 3):
            raise ValueError(
                f"parallel.nvme_path is {self.nvme_path}; with parallel.offload {self.offload} and parallel.zero_stage "
                f"{self.zero_stage} it must be null: only ZeRO-3 can offload to NVMe."
            )

    @property
    def model_ranks(self) -> int:
        """Number of ranks that share one copy of the model: pipeline stages times tensor-parallel ranks."""
        return self.pipeline_stages * self.tensor_parallel

    def data_ranks(self, ranks: int) -> int:
        """Number of data-parallel ranks. Raises ValueError if stages or tensor parallelism do not divide `ranks`."""
        for key in ("pipeline_stages", "tensor_parallel"):
            if ranks % getattr(self, key):
                raise ValueError(
                    f"parallel.{key} is {getattr(self, key)}; it must divide the number of ranks, {ranks}."
                )
        if ranks % self.model_ranks:
            raise ValueError(
                f"parallel.pipeline_stages is {self.pipeline_stages} and parallel.tensor_parallel "
                f"{self.tensor_parallel}; their product, {self.model_ranks}, must divide the number of ranks, {ranks}."
            )
        return ranks // self.model_ranks

    def describe(self, ranks: int) -> str:
        """How the ranks are divided, in words."""
        return (
            f"{ranks} ranks = {self.data_ranks(ranks)} data-parallel x {self.pipeline_stages} pipeline stages x "
            f"{self.tensor_parallel} tensor-parallel"
        )

    def random_rank(self, rank: int) -> int:
        """The rank whose random state a rank has: its own, or without sequence parallelism the first of its tensor
        group, whose ranks then drop the same elements. The ranks of a tensor group are neighbors."""
        return rank if self.sequence_parallel else rank - rank % self.tensor_parallel

    def check_model(self, blocks: int, heads: int, positions: int) -> None:
        """Raises ValueError naming the key if a model of these blocks, heads and positions can't be divided so."""
        if blocks < self.pipeline_stages:
            raise ValueError(
                f"parallel.pipeline_stages is {self.pipeline_stages}; it must be at most the model's blocks, {blocks}."
            )
        if heads % self.tensor_parallel:
            raise ValueError(
                f"parallel.tensor_parallel is {self.tensor_parallel}; it must divide the model's heads, {heads}."
            )
        if self.sequence_parallel and positions % self.tensor_parallel:
            raise ValueError(
                f"parallel.sequence_parallel is true; with parallel.tensor_parallel {self.tensor_parallel} and "
                f"{positions} positions (model.resolution squared) it must be false: positions must be divisible."
            )
