"""What the scripts of completions share: the size of the model, the given halves, and the turn.

It runs in the peers' environments too: beside torch it imports nothing of ours.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from tests.benchmarks.peers.turn import serve

COLORS = 512
SOS = COLORS


@dataclass(frozen=True)
class Drawing:
    """The second half of the positions is sampled at temperature 1 from all colors; the model is fp32."""

    images: int
    """Drawn together."""
    layers: int
    width: int
    heads: int
    positions: int

    def to_argument(self) -> str:
        """As the scripts take it from the command line."""
        return json.dumps(asdict(self))

    @property
    def given(self) -> int:
        """Positions of the given half."""
        return self.positions // 2

    def halves(self) -> torch.Tensor:
        """SOS and the given colors, int64 (B, 1 + T / 2)."""
        colors = torch.randint(0, COLORS, (self.images, self.given), generator=torch.Generator().manual_seed(0))
        return torch.cat([torch.full((self.images, 1), SOS), colors], dim=1)


def from_command_line() -> Drawing:
    """The drawing that the first argument describes."""
    return Drawing(**json.loads(sys.argv[1]))


def serve_drawing(drawing: Drawing, draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """draw: maps halves() to the ids drawn, (B, T / 2), all below COLORS + 1."""
    halves = drawing.halves()

    def turn() -> float:
        drawn = draw(halves)
        assert drawn.shape == (drawing.images, drawing.positions - drawing.given), drawn.shape
        return float(drawing.images)

    serve(turn)
