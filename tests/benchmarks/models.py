"""What is done with a model, by us and by peers: training steps, completions, features; on CPU and accelerators."""

from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, ImageGPTConfig, ImageGPTForCausalImageModeling

from pipeline.checkpoint.fragments import Fragment, FragmentReader
from pipeline.config import BatchConfig, ModelConfig, ParallelConfig, ScheduleConfig, TrainConfig
from pipeline.distributed import Ranks
from pipeline.model import attention, objectives
from pipeline.model.gpt import build_model
from pipeline.model.gpt_config import gpt2_config
from pipeline.model.masks import Batch
from pipeline.model.trunk import Trunk
from pipeline.train.engine.build import build_engine
from pipeline.train.engine.compilation import compiled
from pipeline.train.engine.deepspeed_config import new_optimizer
from tests.benchmarks.turns import best

Step = Callable[[], object]
COLORS = 512
EAGER_BYTES = 12
"""Of each element of the attention matrices that eager attention keeps: scores, softmax in fp32, and its bf16 copy."""
LINEAR_BYTES = 60
"""Of each element of a block's states that plain training keeps."""
STATE_BYTES = 18
"""Of each parameter: fp32 weight, gradient and moments, and autocast's bf16 copy."""
USED_SHARE = 0.85
"""Of the memory, what may be filled."""


@dataclass(frozen=True)
class Case:
    """A model and how it is run."""

    model: ModelConfig
    images: int
    """Of the micro-batch, which is the batch."""
    precision: str
    device: torch.device
    compiled: bool = False
    """Every block, by torch.compile, of ours and of the peers alike."""
    recompute: bool = False

    @property
    def config(self) -> GPT2Config:
        """The model's."""
        return gpt2_config(self.model)

    def training(self) -> TrainConfig:
        """As a run of ours: one rank, ZeRO-1."""
        return TrainConfig(
            model=self.model,
            batch=BatchConfig(global_size=self.images, micro_size=self.images),
            schedule=ScheduleConfig(steps=1000, warmup_steps=1),
            precision=self.precision,  # type: ignore[arg-type]
            compile=self.compiled,
            parallel=ParallelConfig(recompute=self.recompute),
        )

    def tokens(self) -> np.ndarray:
        """A batch of images: uint16 (B, T)."""
        shape = (self.images, self.config.n_positions)
        return np.random.default_rng(0).integers(0, COLORS, shape).astype(np.uint16)

    def autocast(self) -> torch.autocast:
        """What the peers compute under."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision != "fp32")


def attention_seconds(case: Case) -> dict[str, float]:
    """Seconds of the attention kernels that a run of this case would choose from; empty if there is no choice."""
    config = case.config
    width = config.n_embd // config.n_head
    shape = attention.AttentionShape(case.images, config.n_head, config.n_positions, width, causal=True)
    names: tuple[str, ...] = ()
    if case.precision != "fp32":
        names = attention.candidates(shape, case.device.type, torch.backends.cudnn.version())
    return attention.measure_named(shape, names, case.device) if names else {}


class DrawnWeights(FragmentReader):
    """Weights of about the initial size, drawn on the device: on the CPU the draw of size L takes many seconds.

    It stands for a checkpoint, which an engine of any kind restores.
    """

    optimizer_step = 0.0  # type: ignore[assignment]

    def __init__(self, config: GPT2Config) -> None:
        with torch.device("meta"):
            self.shapes = {name: tuple(value.shape) for name, value in build_model(config).named_parameters()}

    def fill(self, target: torch.Tensor, wanted: Fragment, state: str) -> None:
        if state != "weight" or wanted.name.endswith(".bias"):
            target.zero_()
        elif len(wanted.shape) == 1:  # of a norm
            target.fill_(1.0)
        else:
            target.normal_(0.0, 0.02)


def drawn_model(case: Case, config: GPT2Config | None = None) -> torch.nn.Module:
    """The same weights in a model without an engine; config: another one than the case's."""
    config = config or case.config
    with torch.device(case.device):
        model = build_model(config)
    drawn = DrawnWeights(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            drawn.fill(value, Fragment(name, tuple(value.shape), 0, value.numel(), 0), "weight")
    return model


class OurStep:
    """A step through the engine, the update included; needs the process group."""

    def __init__(self, case: Case, ranks: Ranks, learning_rate: float = 1e-4) -> None:
        self._engine: Any = build_engine(case.training(), case.config, ranks, initial=False)
        self._engine.restore(DrawnWeights(case.config), 0)
        self._batch, self._learning_rate = Batch(case.tokens()), learning_rate

    def __call__(self) -> float:
        """The loss before the update."""
        return self._engine.step(self._batch, self._learning_rate).loss

    def close(self) -> None:
        """Removes DeepSpeed's hooks on gradients, which keep its engine's memory even when nothing else does."""
        with redirect_stdout(StringIO()):
            self._engine._engine.destroy()
        self._engine.close()


def plain_step(case: Case) -> Step:
    """The same model and optimizer in a loop of plain torch: what DeepSpeed costs shows against it."""
    model = drawn_model(case)
    optimizer = new_optimizer(case.training(), model.named_parameters())

    forward = Trunk(model, compiled if case.compiled else None)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        inputs, targets = objectives.next_color(tokens, COLORS)
        return objectives.image_loss(forward(inputs), targets, COLORS).mean()

    return _plain(replace(case, compiled=False), model, optimizer, loss)


def gpt_step(case: Case) -> Step:
    """Stock GPT-2 of the same size, as one would train it: LayerNorm, biases, tied head, 512 colors and SOS."""
    config = case.config
    plain = GPT2Config(
        n_layer=config.n_layer, n_embd=config.n_embd, n_head=config.n_head, n_positions=config.n_positions,
        vocab_size=COLORS + 1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device(case.device):
        model = GPT2LMHeadModel(plain)
    return _plain(case, model, _adam(model), _next_token(model))


def image_gpt_step(case: Case) -> Step:
    """Hugging Face's ImageGPT, dropout off, as a Trainer's loop trains it."""
    model = image_gpt(case).train()
    return _plain(case, model, _adam(model), _next_token(model))


def image_gpt(case: Case) -> ImageGPTForCausalImageModeling:
    """Of the same size, with one position more for SOS."""
    config = case.config
    model = ImageGPTForCausalImageModeling(
        ImageGPTConfig(
            n_layer=config.n_layer, n_embd=config.n_embd, n_head=config.n_head, n_positions=config.n_positions + 1,
            vocab_size=COLORS + 1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    return model.to(case.device)  # its norms are made on the CPU also under torch.device


def images_that_fit(case: Case, memory_bytes: float) -> int:
    """The images that HF ImageGPT's eager attention has room for: the case's, halved until they fit."""
    config, images = case.config, case.images
    parameters = 12 * config.n_layer * config.n_embd**2
    matrices = EAGER_BYTES * config.n_layer * config.n_head * config.n_positions**2
    others = LINEAR_BYTES * config.n_layer * config.n_positions * config.n_embd
    while images > 1 and images * (matrices + others) + STATE_BYTES * parameters > USED_SHARE * memory_bytes:
        images //= 2
    return images


def _adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)


def _next_token(model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def loss(tokens: torch.Tensor) -> torch.Tensor:
        inputs, targets = objectives.next_color(tokens, COLORS)
        logits = model(input_ids=inputs, use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return loss


def _plain(
    case: Case, model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[torch.Tensor], torch.Tensor]
) -> Step:
    tokens = torch.from_numpy(case.tokens().astype(np.int64)).to(case.device)
    if case.compiled:
        for block in model.transformer.h:
            block.compile()

    def step() -> None:
        with case.autocast():
            value = loss(tokens)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def completions(case: Case) -> tuple[Step, Step]:
    """Lower halves of a batch drawn: by us, and by generate() of Hugging Face's ImageGPT."""
    from pipeline.model.sampling import complete

    dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16
    model = drawn_model(case).to(dtype)
    peer = image_gpt(case).to(dtype).eval()
    total = case.config.n_positions
    given = torch.randint(0, COLORS, (case.images, total // 2), device=case.device)
    start = torch.cat([torch.full_like(given[:, :1], COLORS), given], dim=1)

    def generate() -> None:
        peer.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=total - total // 2,
            do_sample=True,
            top_k=0,
            use_cache=True,
            pad_token_id=0,
        )

    return (lambda: complete(model, given, total, seed=0)), generate


def read_seconds(case: Case) -> float:
    """The floor of drawing one position: weights, and keys and values of three quarters of the image, read once."""
    config, width = case.config, 4 if case.precision == "fp32" else 2
    weights = 12 * config.n_layer * config.n_embd**2 + config.n_embd * COLORS
    kept = 2 * config.n_layer * case.images * config.n_positions * 0.75 * config.n_embd
    return width * (weights + kept) / read_rate(case.device)


def read_rate(device: torch.device) -> float:
    """Bytes a second that a large sum reads."""
    numbers = torch.ones(1 << (30 if device.type == "cuda" else 26), device=device, dtype=torch.float32)
    [rate] = best(numbers.nbytes, numbers.sum)
    return rate


def features(case: Case) -> tuple[Step, Step]:
    """A batch's pooled features of all layers, and the forward pass alone."""
    from pipeline.evaluate.features.pooled import pooled_layers

    model = drawn_model(case).eval()
    inputs, _ = objectives.next_color(torch.from_numpy(case.tokens().astype(np.int64)).to(case.device), COLORS)

    def forward() -> None:
        with torch.inference_mode(), case.autocast():
            model.transformer(inputs)

    def pooled() -> None:
        with torch.inference_mode(), case.autocast(), pooled_layers(model) as layers:
            model.transformer(inputs)
            torch.stack(layers).cpu()

    return pooled, forward
