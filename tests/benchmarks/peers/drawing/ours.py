"""Completions by `pipeline.model.sampling.complete`, as `pipeline complete` calls it."""

from pipeline.config import ModelConfig
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import gpt2_config
from pipeline.model.sampling import complete
from tests.benchmarks.peers.drawing.work import from_command_line, serve_drawing


def main() -> None:
    """Takes turns."""
    drawing = from_command_line()
    resolution = int(drawing.positions**0.5)
    shape = {"layers": drawing.layers, "width": drawing.width, "heads": drawing.heads}
    model = build_model(gpt2_config(ModelConfig(**shape, resolution=resolution)))
    initialize(model, 0)
    serve_drawing(drawing, lambda halves: complete(model, halves[:, 1:], drawing.positions, seed=0)[:, drawing.given :])


if __name__ == "__main__":
    main()
