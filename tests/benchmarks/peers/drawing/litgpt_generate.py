"""Completions by litgpt's generate, of one image: it takes one prompt."""

import litgpt
import torch
from litgpt.config import Config
from litgpt.generate.base import generate

from tests.benchmarks.peers.drawing.work import from_command_line, serve_drawing


def main() -> None:
    """Takes turns."""
    drawing = from_command_line()
    if drawing.images != 1:
        raise ValueError("litgpt's generate takes one prompt")
    config = Config(
        name="image-gpt",
        block_size=drawing.positions + 1,
        n_layer=drawing.layers,
        n_embd=drawing.width,
        n_head=drawing.heads,
        padded_vocab_size=520,
    )
    model = litgpt.GPT(config).eval()
    model.set_kv_cache(batch_size=1)

    def draw(halves: torch.Tensor) -> torch.Tensor:
        drawn = generate(
            model, halves[0], max_returned_tokens=drawing.positions + 1, temperature=1.0, include_prompt=False
        )
        return drawn[None]

    serve_drawing(drawing, draw)


if __name__ == "__main__":
    main()
