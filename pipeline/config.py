"""The configuration of a training run: dataclasses filled from a YAML file and dotted overrides."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Either a published size, or layers, width and heads one by one."""

    size: Literal["s", "m", "l", "xl"] | None = None
    """A size of the paper: s 76M, m 455M, l 1.4B, xl 6.8B parameters."""
    layers: int | None = None
    """Number of blocks."""
    width: int | None = None
    """Width of the residual stream."""
    heads: int | None = None
    """Attention heads a block; they share the width."""
    resolution: int = 32
    """Pixels a side; a sequence has resolution * resolution tokens."""
    block: Literal["igpt", "gpt2"] = "igpt"
    """igpt: the paper's block; gpt2: transformers' stock block."""

    def __post_init__(self) -> None:
        own = (self.layers, self.width, self.heads)
        if self.size is None and None in own:
            raise ValueError("model.size is not set; set it to s, m, l or xl, or set model.layers, model.width and model.heads.")
        if self.size is not None and own != (None, None, None):
            raise ValueError("model.size and model.layers/width/heads exclude each other; leave one of them out.")
        for name in ("layers", "width", "heads", "resolution"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name} is {value}; it must be at least 1.")
        if self.width is not None and self.heads is not None and self.width % self.heads:
            raise ValueError(f"model.width is {self.width}; it must be a multiple of model.heads, {self.heads}.")
