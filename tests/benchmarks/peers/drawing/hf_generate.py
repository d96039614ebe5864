"""Completions by generate() of transformers, with its ImageGPT or its GPT-2, and one of its caches."""

import sys

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    PreTrainedModel,
)

from tests.benchmarks.peers.drawing.work import COLORS, SOS, Drawing, from_command_line, serve_drawing


def model_of(kind: str, drawing: Drawing) -> PreTrainedModel:
    """imagegpt or gpt2."""
    shape = {"n_layer": drawing.layers, "n_embd": drawing.width, "n_head": drawing.heads}
    positions = drawing.positions + 1
    if kind == "imagegpt":
        config = ImageGPTConfig(vocab_size=COLORS + 1, n_positions=positions, **shape)
        return ImageGPTForCausalImageModeling(config).eval()
    ids = {"bos_token_id": SOS, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=COLORS + 1, n_positions=positions, **shape, **ids)).eval()


def main() -> None:
    """Takes turns; the second argument is the model, the third `dynamic` or `static`."""
    kind, cache, drawing = sys.argv[2], sys.argv[3], from_command_line()
    model = model_of(kind, drawing)

    def draw(halves: torch.Tensor) -> torch.Tensor:
        drawn = model.generate(
            halves,
            attention_mask=torch.ones_like(halves),
            max_new_tokens=drawing.positions - drawing.given,
            do_sample=True,
            top_k=0,
            use_cache=True,
            cache_implementation=cache,
            pad_token_id=0,
        )
        return drawn[:, halves.shape[1] :]

    serve_drawing(drawing, draw)


if __name__ == "__main__":
    main()
