"""x-transformers: a decoder of the same size in its AutoregressiveWrapper, in the loop of its README, compiled."""

from pathlib import Path

import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from tests.benchmarks.peers.training.work import SOS, Work, from_command_line, serve_plain_loop


def model_of(work: Work) -> AutoregressiveWrapper:
    """Of the given size, with PyTorch's attention, as its README says to enable."""
    return AutoregressiveWrapper(
        TransformerWrapper(
            num_tokens=SOS + 1,
            max_seq_len=work.positions + 1,
            attn_layers=Decoder(
                dim=work.width,
                depth=work.layers,
                heads=work.heads,
                attn_dim_head=work.width // work.heads,
                attn_flash=True,
            ),
        )
    )


def main() -> None:
    """Takes turns."""
    work = from_command_line()
    model = model_of(work).to(work.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if work.compiled else model

    def step(tokens: torch.Tensor) -> float:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=work.precision == "bf16"):
            loss = forward(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def save() -> None:
        file = Path(work.folder) / "x-transformers.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)

    serve_plain_loop(work, step, save)


if __name__ == "__main__":
    main()
