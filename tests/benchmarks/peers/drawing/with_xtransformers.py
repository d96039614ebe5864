"""Completions by generate() of x-transformers' AutoregressiveWrapper, with its cache of keys and values."""

import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from tests.benchmarks.peers.drawing.work import SOS, from_command_line, serve_drawing


def main() -> None:
    """Takes turns."""
    drawing = from_command_line()
    width = drawing.width // drawing.heads
    layers = Decoder(dim=drawing.width, depth=drawing.layers, heads=drawing.heads, attn_dim_head=width, attn_flash=True)
    positions = drawing.positions + 1
    net = TransformerWrapper(num_tokens=SOS + 1, max_seq_len=positions, attn_layers=layers)
    model = AutoregressiveWrapper(net).eval()

    def draw(halves: torch.Tensor) -> torch.Tensor:
        rest = drawing.positions - drawing.given
        return model.generate(halves, rest, temperature=1.0, filter_logits_fn=lambda logits: logits, cache_kv=True)

    serve_drawing(drawing, draw)


if __name__ == "__main__":
    main()
