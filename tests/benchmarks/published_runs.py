"""Published training runs with their layouts, as the simulator of `plan` takes them. Used by scale.py.

MFU of all rows is 6 FLOPs a parameter and token and 12 * L * T * D for attention in full, recomputation not counted,
over 989 (H100) and 312 (A100) TFLOP/s.

- llm-foundry: the tables of scripts/train/benchmarking/README.md in mosaicml/llm-foundry; FSDP with gradients reduced
  as fp32 (MP mode DEFAULT; as bf16 in PURE), FULL_SHARD as ZeRO-3, SHARD_GRAD_OP as ZeRO-3 that gathers weights once;
  400 Gbit/s a GPU of H100 assumed, 200 of A100 stated.
- nanotron: docs/benchmark_summary.svg in huggingface/nanotron, which names the layouts, 1M tokens a step, T 4096; its
  colors encode the MFU, quoted elsewhere as 45, 40 and 19% for 8.9B on 1, 8 and 64 nodes, and between those three the
  color scale is linear, so that the rows with "~" are read off it, within a point. They are quoted as those of two
  stages with ZeRO-1 throughout, while the chart has four stages on 1 node and tensor parallelism on 64: both are
  simulated.
- Megatron-LM: table 2 of Narayanan et al. 2021 (arXiv 2104.04473), 175B and 530B on up to 2240 A100, in teraFLOP/s with
  recomputation counted. The stages were interleaved, to an unstated degree; simulated as plain 1F1B. Their run of 175B
  on 1024 GPUs is not here: its layout is not stated.
- BigScience: BLOOM and the layouts tried before it, in train/tr11-176B-ml/chronicles-prequel.md of
  bigscience-workshop/bigscience, in seconds a step (the second one of a run). 384 A100 of 80 GB, four 100 Gbit/s ports
  a node of eight; blocks recomputed; attention materialized. "bf16" rows accumulate in fp32 and count the embeddings as
  a block when stages are formed; the others are fp16.

Not here: Megatron-LM's 41 to 48% on H100, whose layouts are published as a figure only.
"""

from dataclasses import dataclass, replace
from typing import Any

from transformers import GPT2Config

from pipeline import costs
from pipeline.config import BatchConfig, ModelConfig, ParallelConfig, TrainConfig
from pipeline.plan.hardware import NETWORK_SHARE, hardware_of
from pipeline.plan.layouts import Cluster, work_of
from pipeline.plan.simulator import StepTime, Work, simulate

UPDATE_BYTES = 42.0
"""The memory traffic of these frameworks' updates for one parameter, without DeepSpeed's other passes: gradient read
for its norm, scaled and read again (16), fp32 weight and two moments read and written (24), bf16 weight written (2)."""
H100, A100, A100_40 = (costs.ACCELERATORS[name] for name in ("h100-80gb", "a100-80gb", "a100-40gb"))


@dataclass(frozen=True)
class Shape:
    """A published model: layers, width, rows of the vocabulary, width of a plain MLP of as many parameters."""

    layers: int
    width: int
    vocabulary: int
    inner: int | None = None
    tied: bool = True

    def config(self, positions: int) -> GPT2Config:
        """As a model that costs.py knows."""
        return GPT2Config(
            n_layer=self.layers,
            n_embd=self.width,
            n_head=self.width // 128,
            n_positions=positions,
            n_inner=self.inner,
            vocab_size=self.vocabulary,
            block="igpt",
            colors=self.vocabulary,
        )


MPT = {
    "355M": Shape(24, 1024, 50368),
    "760M": Shape(24, 1536, 50368),
    "1.3B": Shape(24, 2048, 50368),
    "2.7B": Shape(32, 2560, 50368),
    "6.7B": Shape(32, 4096, 50368),
    "13B": Shape(40, 5120, 50368),
    "30B": Shape(48, 7168, 50368),
    "65B": Shape(80, 8192, 50368),
}
LLAMA = {  # three MLP matrices as two wider ones
    "3.6B": Shape(28, 3072, 131072, 12288),
    "8.9B": Shape(32, 4096, 131072, 21504, tied=False),
}


GPT_3 = {"175B": Shape(96, 12288, 51200), "530B": Shape(105, 20480, 51200)}
BIGSCIENCE = {  # their vocabulary of 250,680, padded
    f"{layers} x {width}": Shape(layers, width, 250880)
    for layers, width in ((70, 14336), (72, 14336), (78, 13824), (82, 13312), (100, 12288), (106, 12288))
}
SHAPES = MPT | LLAMA | GPT_3 | BIGSCIENCE


@dataclass(frozen=True)
class Published:
    """A run that someone measured. `parallel` are fields of Work."""

    source: str
    model: str
    accelerator: costs.Accelerator
    ranks: int
    positions: int
    images: int
    """Sequences of a micro-batch."""
    micro_batches: int
    mfu: float
    """In percent."""
    parallel: tuple[tuple[str, Any], ...]
    fitted: bool = False
    """One of the runs that the simulator's constants were fitted to."""
    approximate: bool = False
    quoted: bool = False
    """A layout that is quoted with the MFU, not the chart's."""
    network_gbit: float | None = None
    """Of an accelerator; None: as `plan` assumes."""

    @property
    def is_3d(self) -> bool:
        """Whether it combines stages and tensor parallelism; these runs recompute their blocks too."""
        return all(dict(self.parallel).get(axis, 1) > 1 for axis in ("stages", "tensor"))

    def simulated(self) -> tuple[float, StepTime]:
        """MFU in percent, and the step."""
        shape = SHAPES[self.model]
        model, settings = shape.config(self.positions), dict(self.parallel)
        # Simulated with complete positions: the runs do not state it, and nothing was fitted to sequence parallelism.
        tensor = settings.get("tensor", 1)
        parallel = ParallelConfig(zero_stage=1, tensor_parallel=tensor, sequence_parallel=False)
        data = self.ranks // settings.get("tensor", 1) // settings.get("stages", 1)
        config = TrainConfig(
            model=ModelConfig(layers=1, width=1, heads=1),
            batch=BatchConfig(global_size=self.images * self.micro_batches * data, micro_size=self.images),
            parallel=parallel,
            precision="bf16",
        )
        network = None if self.network_gbit is None else self.network_gbit / 8 * NETWORK_SHARE
        hardware = hardware_of(self.accelerator).with_links(None, network)
        work = work_of(config, model, Cluster(self.accelerator, self.ranks, 8, hardware), data, self.micro_batches)
        outer = (shape.vocabulary * (1 if shape.tied else 2) + self.positions) * shape.width
        update = UPDATE_BYTES / hardware.memory_bytes
        work = replace(
            work, outer_parameters=outer, update=update, update_replicated=0.0, product_seconds=(0.0, 0.0), **settings
        )
        step = simulate(AS_IN.get(self.source, unchanged)(work), hardware.links)
        tokens = config.batch.global_size * self.positions
        return mfu(model, tokens, step.seconds, self.ranks, self.accelerator), step


def _as_in_nanotron(work: Work) -> Work:
    """It cuts embeddings and head for tensor parallelism too, and counts the head when it shares blocks out to stages.

    So the head's time is spread over the blocks.
    """
    forward = work.forward + work.head_forward / work.layers / work.tensor
    backward = work.backward + work.head_backward / work.layers / work.tensor
    outer = work.outer_parameters / work.tensor
    return replace(
        work, forward=forward, backward=backward, head_forward=0.0, head_backward=0.0, outer_parameters=outer
    )


def _as_in_megatron(work: Work) -> Work:
    """It splits embeddings and head for tensor parallelism too, and tensor ranks send a part each to the next stage."""
    return replace(
        work,
        head_forward=work.head_forward / work.tensor,
        head_backward=work.head_backward / work.tensor,
        outer_parameters=work.outer_parameters / work.tensor,
        splits_stage_messages=True,
    )


AS_IN = {"nanotron": _as_in_nanotron, "Megatron-LM": _as_in_megatron, "BigScience": _as_in_megatron}


def unchanged(work: Work) -> Work:
    """As simulated for this project."""
    return work


def mfu(model: GPT2Config, tokens: int, seconds: float, ranks: int, accelerator: costs.Accelerator) -> float:
    """In percent."""
    return 100 * costs.flops_per_token(model) * tokens / (seconds * ranks * accelerator.bf16_flops)


FSDP = (("zero_stage", 3),)
AGAIN = (*FSDP, ("recompute", True))
ONCE = (*FSDP, ("gathers", 1))
PURE = (("gradient_bytes", 2.0),)


def _nanotron(zero_stage: int, stages: int, tensor: int = 1) -> tuple[tuple[str, Any], ...]:
    settings = {"zero_stage": zero_stage, "stages": stages, "tensor": tensor, "sums_everywhere": False}
    return tuple(settings.items())


PUBLISHED = [
    Published("llm-foundry", "1.3B", H100, 8, 2048, 14, 1, 41.82, FSDP, fitted=True),
    Published("llm-foundry", "1.3B", H100, 8, 1024, 18, 4, 41.95, FSDP),
    Published("llm-foundry", "1.3B", H100, 8, 4096, 7, 4, 40.26, FSDP, fitted=True),
    Published("llm-foundry", "1.3B", H100, 64, 2048, 20, 1, 40.85, FSDP),
    Published("llm-foundry", "1.3B", H100, 128, 2048, 12, 1, 40.60, ONCE),
    Published("llm-foundry", "1.3B", H100, 256, 2048, 12, 1, 39.15, ONCE),
    Published("llm-foundry", "1.3B", H100, 512, 2048, 12, 1, 36.65, ONCE, fitted=True),
    Published("llm-foundry", "760M", H100, 8, 1024, 48, 2, 39.76, FSDP),
    Published("llm-foundry", "760M", H100, 32, 2048, 24, 1, 37.57, FSDP),
    Published("llm-foundry", "2.7B", H100, 16, 2048, 10, 3, 43.73, FSDP),
    Published("llm-foundry", "2.7B", H100, 64, 2048, 6, 3, 40.80, FSDP),
    Published("llm-foundry", "2.7B", H100, 512, 2048, 8, 1, 39.24, ONCE),
    Published("llm-foundry", "6.7B", H100, 8, 2048, 6, 1, 46.44, FSDP),
    Published("llm-foundry", "6.7B", H100, 8, 4096, 16, 2, 40.42, AGAIN),
    Published("llm-foundry", "6.7B", H100, 128, 2048, 6, 1, 45.71, FSDP),
    Published("llm-foundry", "6.7B", H100, 256, 2048, 6, 1, 44.15, FSDP),
    Published("llm-foundry", "6.7B", H100, 512, 2048, 6, 1, 42.20, FSDP),
    Published("llm-foundry", "13B", H100, 8, 2048, 2, 1, 39.79, FSDP),
    Published("llm-foundry", "13B", H100, 64, 2048, 2, 1, 39.86, FSDP),
    Published("llm-foundry", "13B", H100, 512, 2048, 16, 1, 41.12, AGAIN),
    Published("llm-foundry", "65B", H100, 512, 2048, 8, 1, 41.25, AGAIN),
    Published("nanotron", "8.9B", H100, 8, 4096, 1, 128, 45.0, _nanotron(1, 4)),
    Published("nanotron", "8.9B", H100, 8, 4096, 1, 64, 45.0, _nanotron(1, 2), quoted=True),
    Published("nanotron", "8.9B", H100, 64, 4096, 1, 8, 40.0, _nanotron(1, 2)),
    Published("nanotron", "8.9B", H100, 256, 4096, 8, 1, 33.0, _nanotron(0, 1, 8), approximate=True),
    Published("nanotron", "8.9B", H100, 512, 4096, 2, 1, 19.0, _nanotron(0, 1, 4)),
    Published("nanotron", "8.9B", H100, 512, 4096, 1, 1, 19.0, _nanotron(1, 2), quoted=True),
    Published("nanotron", "3.6B", H100, 8, 4096, 2, 32, 46.5, _nanotron(1, 2), approximate=True),
    Published("nanotron", "3.6B", H100, 64, 4096, 1, 8, 35.7, _nanotron(1, 2), approximate=True),
    Published("llm-foundry", "355M", A100, 8, 1024, 64, 2, 50.51, FSDP, fitted=True),
    Published("llm-foundry", "760M", A100, 8, 2048, 24, 2, 56.85, FSDP),
    Published("llm-foundry", "1.3B", A100, 8, 1024, 18, 4, 60.15, FSDP),
    Published("llm-foundry", "2.7B", A100, 8, 2048, 10, 2, 62.11, FSDP),
    Published("llm-foundry", "6.7B", A100, 8, 2048, 6, 2, 64.23, FSDP, fitted=True),
    Published("llm-foundry", "13B", A100, 8, 1024, 40, 3, 59.48, AGAIN),
    Published("llm-foundry", "2.7B", A100_40, 64, 2048, 6, 1, 55.94, (*FSDP, *PURE)),
    Published("llm-foundry", "2.7B", A100_40, 128, 2048, 6, 1, 54.80, (*FSDP, *PURE)),
    Published("llm-foundry", "6.7B", A100_40, 128, 2048, 18, 1, 50.14, (*AGAIN, *PURE)),
]


def _megatron(model: str, ranks: int, stages: int, batch: int, teraflops: float) -> Published:
    """A row of table 2: tensor 8, micro-batches of one. Its FLOPs count four passes of a block, three of the head."""
    shape, data = SHAPES[model], ranks // 8 // stages
    config = shape.config(2048)
    head = 6.0 * shape.vocabulary * shape.width
    counted = (costs.flops_per_token(config) - head) * 4 / 3 + head
    percent = 100 * teraflops * 1e12 / A100.bf16_flops * costs.flops_per_token(config) / counted
    layout = {"zero_stage": 0, "stages": stages, "tensor": 8, "recompute": True, "gradient_bytes": 2.0}
    return Published("Megatron-LM", model, A100, ranks, 2048, 1, batch // data, percent, tuple(layout.items()))


def _bigscience(
    model: str, tensor: int, stages: int, images: int, seconds: float, batch: int = 2048, bf16: bool = False
) -> Published:
    """A row of the chronicles, on 384 GPUs."""
    data = 384 // tensor // stages
    reached = mfu(SHAPES[model].config(2048), batch * 2048, seconds, 384, A100)
    layout = {"zero_stage": 1, "stages": stages, "tensor": tensor, "recompute": True}
    layout |= {"gradient_bytes": 4.0 if bf16 else 2.0}
    number = batch // data // images
    return Published(
        "BigScience", model, A100, 384, 2048, images, number, reached, tuple(layout.items()), network_gbit=50
    )


PUBLISHED += [
    *(_megatron("175B", ranks, 12, 1536, rate) for ranks, rate in ((384, 153), (768, 149), (1536, 141))),
    *(_megatron("530B", ranks, 35, 2240, rate) for ranks, rate in ((560, 171), (1120, 167), (2240, 159))),
    _bigscience("70 x 14336", 4, 12, 2, 104.50, bf16=True),  # BLOOM
    _bigscience("70 x 14336", 8, 12, 2, 121.63, bf16=True),
    _bigscience("106 x 12288", 4, 12, 2, 118.79, bf16=True),
    _bigscience("100 x 12288", 8, 6, 4, 120.96, bf16=True),
    _bigscience("82 x 13312", 4, 12, 2, 104.45, bf16=True),
    _bigscience("82 x 13312", 8, 12, 4, 111.79, bf16=True),
    _bigscience("72 x 14336", 8, 2, 1, 145.45, batch=2016),
    _bigscience("72 x 14336", 8, 4, 4, 114.81, batch=2016),
    _bigscience("72 x 14336", 8, 6, 4, 114.11),
    _bigscience("72 x 14336", 8, 12, 4, 117.07),
    _bigscience("72 x 14336", 8, 12, 2, 128.82),
    _bigscience("72 x 14336", 4, 6, 2, 111.71),
    _bigscience("72 x 14336", 4, 12, 2, 110.48),
    _bigscience("72 x 14336", 4, 24, 1, 130.60),
    _bigscience("72 x 14336", 2, 12, 2, 112.50),
    _bigscience("72 x 14336", 2, 24, 1, 119.53),
    _bigscience("78 x 13824", 4, 12, 2, 35.77, batch=512),
    _bigscience("78 x 13824", 4, 12, 2, 59.65, batch=1024),
    _bigscience("78 x 13824", 4, 12, 2, 107.12),
]
