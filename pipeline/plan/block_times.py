"""The computing time of a block: from a file of measurements, from a given MFU, or estimated.

The estimate adds three terms. Matrix products run at the fraction of the peak given in hardware.py. Attention, counted
in full, runs at half that rate. Norms, activation function and residuals move 345 bytes through memory for each channel
of each token, forward and backward together; this is why narrow models reach less of the peak. The constants were
fitted to published runs (tests/benchmarks/published_runs.py) with software of 2023. Well compiled blocks are faster:
pass a measurement or an MFU for them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import costs
from pipeline.config import TrainConfig
from pipeline.plan.hardware import Hardware
from pipeline.plan.memory import saved_bytes
from pipeline.plan.passes import ADAM, READ, SCALE

if TYPE_CHECKING:
    from transformers import GPT2Config

TRAFFIC_BYTES = 345.0
"""Bytes for one channel of one token in one block, forward and backward; fitted, see above."""
ATTENTION_RATE = 0.5
"""Attention's rate as a fraction of that of matrix products; fitted, see above."""
LAUNCH_SECONDS = 225e-6
"""Minimum time of a block, forward and backward: an allowance of 45 kernels at 5 us, not measured."""
FORWARD_SHARE = 1 / 3
"""The forward pass's fraction of the FLOPs of a forward and a backward pass."""
MEASURED_PRECISION = "bf16"
"""Precision of the measurements in every file."""
MEASURED_COLORS = 512
"""Colors of the head that is measured in every file."""
MEASURED_UPDATE_BYTES = READ + SCALE + ADAM
"""Memory traffic for one parameter of the update that is measured in every file: norm, clipping, fused AdamW."""


@dataclass(frozen=True)
class BlockTime:
    """One measurement: a block, head and update of a model of `width` on one accelerator, in the run's precision."""

    width: int
    heads: int
    positions: int
    images: int
    """Images of the micro-batch."""
    forward_seconds: float
    """Forward pass of one block over the micro-batch."""
    backward_seconds: float
    """Backward pass of one block, without recomputation."""
    head_forward_seconds: float
    """Forward pass of the last norm, a head of 512 colors and the loss."""
    head_backward_seconds: float
    update_seconds_per_parameter: float
    """Gradient norm, clipping and fused AdamW over one flat tensor, for one parameter."""

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{key} is {value!r}; it must be a number above 0")


@dataclass(frozen=True)
class BlockTimes:
    """The content of `--block_times FILE`: {"device": NAME, "rows": [{the fields of BlockTime}, ...]}."""

    device: str
    """The name of torch.cuda.get_device_name()."""
    rows: tuple[BlockTime, ...]

    def nearest(self, model: GPT2Config, images: int) -> BlockTime:
        """The row whose width, positions and micro-batch are closest on a logarithmic scale."""

        def distance(row: BlockTime) -> float:
            pairs = ((row.width, model.n_embd), (row.positions, model.n_positions), (row.images, images))
            return sum(abs(math.log(measured / wanted)) for measured, wanted in pairs)

        return min(self.rows, key=distance)


def read_block_times(path: str) -> BlockTimes:
    """Reads a file of measurements. Raises ValueError naming the file and the invalid entry."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--block_times is {path!r}, which is not a readable JSON file ({error}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("device"), str):
        raise ValueError(f"{path} has no `device`; it must be the name of torch.cuda.get_device_name().")
    rows = content.get("rows")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} has no `rows`; it must be a list of at least one measured block.")
    return BlockTimes(content["device"], tuple(_row(row, f"{path}: rows[{i}]") for i, row in enumerate(rows)))


def _row(content: object, place: str) -> BlockTime:
    known = {field.name for field in fields(BlockTime)}
    if not isinstance(content, dict) or content.keys() != known:
        found = ", ".join(sorted(content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{place} has {found or 'nothing'}; it must have {', '.join(sorted(known))}.")
    try:
        return BlockTime(**content)
    except ValueError as error:
        raise ValueError(f"{place}: {error}.") from error


@dataclass(frozen=True)
class Seconds:
    """Seconds of a rank: a block's passes over a micro-batch, head and loss, and a byte of the traffic of passes.py."""

    forward: float
    backward: float
    head_forward: float
    head_backward: float
    byte: float


def measured(times: BlockTimes, config: TrainConfig, model: GPT2Config) -> Seconds:
    """The seconds of the nearest row, scaled by FLOPs: the efficiency is assumed to be the same."""
    images = config.batch.micro_size
    row = times.nearest(model, images)
    tokens = images * model.n_positions / (row.images * row.positions)
    wanted, there = (
        _block_flops(model, width, positions)
        for width, positions in ((model.n_embd, model.n_positions), (row.width, row.positions))
    )
    block = tokens * wanted / there / config.parallel.tensor_parallel
    head = tokens * _head_flops(model) / (6.0 * row.width * MEASURED_COLORS)
    return Seconds(
        row.forward_seconds * block,
        row.backward_seconds * block,
        row.head_forward_seconds * head,
        row.head_backward_seconds * head,
        row.update_seconds_per_parameter / MEASURED_UPDATE_BYTES,
    )


def _block_flops(model: GPT2Config, width: int, positions: int) -> float:
    """FLOPs of a token in one block of this width, forward and backward, with attention counted in full."""
    own = costs.matmul_parameters(model) - _head_flops(model) / 6
    return 6 * own / model.n_layer * (width / model.n_embd) ** 2 + 12.0 * positions * width


def product_seconds(backward: float, model: GPT2Config) -> tuple[float, float]:
    """Seconds of one product in the backward pass with c_attn and with c_fc, at the mean rate of that pass.

    backward: seconds of a block's backward pass.
    """
    width, inner = model.n_embd, costs.mlp_width(model)
    flops = (1 - FORWARD_SHARE) * _block_flops(model, width, model.n_positions)
    return backward * 2 * width * 3 * width / flops, backward * 2 * width * inner / flops


def _head_flops(model: GPT2Config) -> float:
    return 6.0 * model.n_embd * costs.head_rows(model)


def estimated(
    config: TrainConfig, model: GPT2Config, peak: float, hardware: Hardware, mfu: float | None = None
) -> Seconds:
    """Estimated seconds, as described above; with `mfu`, computing runs at this fraction of the peak (FLOP/s)."""
    tokens, parts = config.batch.micro_size * model.n_positions, config.parallel.tensor_parallel
    rate = peak * (hardware.efficiency if mfu is None else mfu)
    block = tokens * _block_flops(model, model.n_embd, model.n_positions) / parts / rate
    head = tokens * _head_flops(model) / rate
    if mfu is None:
        block += tokens * 12.0 * model.n_positions * model.n_embd * (1 / ATTENTION_RATE - 1) / parts / rate
        traffic = TRAFFIC_BYTES * (2 if config.precision == "fp32" else 1) * _traffic_fraction(config, model)
        block = max(block + tokens * model.n_embd * traffic / hardware.memory_bytes, LAUNCH_SECONDS)
    backward, byte = 1 - FORWARD_SHARE, 1 / hardware.memory_bytes
    return Seconds(block * FORWARD_SHARE, block * backward, head * FORWARD_SHARE, head * backward, byte)


def _traffic_fraction(config: TrainConfig, model: GPT2Config) -> float:
    """The fraction of a block's memory traffic that remains under tensor parallelism.

    Norms and residuals are replicated unless positions are split. Approximated by the fraction of saved activations
    that remains.
    """
    alone = replace(config, parallel=replace(config.parallel, tensor_parallel=1))
    return saved_bytes(config, model, on_cpu=False) / saved_bytes(alone, model, on_cpu=False)
