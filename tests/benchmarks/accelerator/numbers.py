"""Versions, and numbers on this device against float64's: objectives, attention kernels, decoding."""

import platform
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from pipeline.config import ModelConfig
from pipeline.model import attention, objectives
from pipeline.model.decoding import Decoder
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import gpt2_config
from pipeline.train.engine.build import check_torch_compiles
from tests.benchmarks.accelerator.common import CUDA, DEVICE, TOY
from tests.benchmarks.accelerator.report import Row, at_most, equal, known
from tests.benchmarks.models import Case, attention_seconds

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "torchao", "numpy", "safetensors", "nvidia-nccl-cu13")
SMALL = ModelConfig(layers=2 if TOY else 4, width=32 if TOY else 128, heads=2, resolution=8)
LOGITS = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest error of a loss in nats, and of a gradient's norm, by precision."""
ATTENTION = 3e-2
"""Largest relative error of attention in bf16, and of its gradient."""
KERNELS = (("cudnn", "CUDNN_ATTENTION"), ("fmha_cutlass", "EFFICIENT_ATTENTION"), ("flash", "FLASH_ATTENTION"))
"""Parts of the names of attention kernels on CUDA; cuDNN's contain "flash" too, so it comes first."""
OF_CPU = re.compile(r"aten::_?scaled_dot_product_\w+(?<!backward)")
"""Operators of attention on a CPU."""


def machine() -> Iterator[Row]:
    """Versions, and what torch would choose by itself."""
    yield equal("machine: torch sees CUDA", torch.cuda.is_available(), CUDA if TOY else True)
    yield known("machine: device", torch.cuda.get_device_name() if CUDA else platform.machine())
    yield known("machine: Python", platform.python_version())
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            yield known(f"machine: {name}", version(name))
    if CUDA:
        yield known("machine: CUDA", torch.version.cuda)
        yield known("machine: cuDNN", torch.backends.cudnn.version())
        yield known("machine: NCCL", ".".join(map(str, torch.cuda.nccl.version())))
        yield known("machine: memory, GB", torch.cuda.mem_get_info()[1] / 1e9)
    yield known("machine: SDPA order", ",".join(SDPBackend(number).name for number in sdpa_order()))
    check_torch_compiles(DEVICE)
    yield equal("machine: compiler for torch.compile", "found", "found")


def check_objectives() -> Iterator[Row]:
    """Loss and gradient of both objectives in fp32 and bf16 against float64, from the same weights."""
    draw = torch.Generator("cpu").manual_seed(1)
    tokens = torch.randint(0, 512, (4, 64), generator=draw)
    masked = torch.rand(tokens.shape, generator=draw) < 0.3
    for objective in ("next_color", "masked_color"):
        mask = masked if objective == "masked_color" else None
        inputs, targets = (t.to(DEVICE) for t in objectives.inputs_and_targets(tokens, mask, 512))
        found = {}
        for name, dtype in (("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
            model = random_model(SMALL, objective).to(dtype)
            # image_loss computes in fp32, float64's logits included: 1e-7 is lost, far below the limits.
            loss = objectives.image_loss(model(inputs).logits, targets, 512).mean()
            loss.backward()
            found[name] = loss.item(), _gradient(model)
        loss64, gradient64 = found["fp64"]
        for name in ("fp32", "bf16"):
            loss, gradient = found[name]
            apart = float((gradient - gradient64).norm() / gradient64.norm())
            yield at_most(f"objectives: {objective} {name}, loss from fp64's", abs(loss - loss64), LOGITS[name])
            yield at_most(f"objectives: {objective} {name}, gradient from fp64's", apart, LOGITS[name])


def random_model(config: ModelConfig, objective: str = "next_color") -> nn.Module:
    """A model whose weights are far from the initial ones, and exact in bf16."""
    with torch.device(DEVICE):
        model = build_model(gpt2_config(config, objective=objective)).eval()
    initialize(model, 0)
    draw = torch.Generator("cpu").manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(DEVICE) * 0.05)
            parameter.copy_(parameter.bfloat16())
    return model


def _gradient(model: nn.Module) -> torch.Tensor:
    """All gradients in one float64 vector."""
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def check_attention() -> Iterator[Row]:
    """Which kernel runs after each choice, and its numbers at lengths that 128 divides and does not divide."""
    restore = sdpa_settings()
    images, heads, resolution, odd = (2, 2, 8, 50) if TOY else (4, 8, 32, 200)
    try:
        for head_width in (64, 96, 128):
            config = ModelConfig(layers=1, width=heads * head_width, heads=heads, resolution=resolution)
            module = random_model(config).transformer.h[0].attn.bfloat16()
            seconds = attention_seconds(Case(config, images, "bf16", DEVICE))
            yield known(f"attention: {head_width} wide, ms", _milliseconds(seconds))
            for name in seconds:
                attention.use_fastest({other: 1.0 if other == name else 2.0 for other in seconds})
                for length in (resolution**2, odd):
                    states = torch.randn(images, length, config.shape.width, device=DEVICE, dtype=torch.bfloat16)
                    label = f"attention: {head_width} wide, {length} long, {name}"
                    used = used_kernels(lambda states=states, module=module: _passes(module, states))
                    yield equal(f"{label}: kernel", used, name) if CUDA else known(f"{label}: kernel", used)
                    yield at_most(f"{label}, from fp64's", _error(module, states), ATTENTION)
    finally:
        attention.use_fastest({})
        restore()


def sdpa_settings() -> Callable[[], None]:
    """A function that restores torch's choice of attention kernels as it is now."""
    flash, cudnn = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    order = sdpa_order()

    def restore() -> None:
        torch.backends.cuda.enable_flash_sdp(flash)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        if order:
            torch._C._set_sdp_priority_order(order)

    return restore


def sdpa_order() -> list[int]:
    """The order in which torch tries attention kernels, as numbers of SDPBackend; empty if this torch has none."""
    return list(getattr(torch._C, "_get_sdp_priority_order", list)())


def _milliseconds(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {1000 * value:.3f}" for name, value in seconds.items()) or "not measured"


def _passes(module: nn.Module, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of a block's attention, projections included, and the gradient of its input."""
    states = states.detach().requires_grad_()
    output = module(states)[0]
    [gradient] = torch.autograd.grad(output.float().square().sum(), states)
    return output, gradient


def _error(module: nn.Module, states: torch.Tensor) -> float:
    """The larger relative error of output and gradient against float64."""
    found = _passes(module, states)
    exact = _passes(module.double(), states.double())
    module.bfloat16()
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def used_kernels(run: Callable[[], object]) -> str:
    """The attention kernels that `run` uses, by the names of SDPBackend; on a CPU the operators' names."""
    run()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profile(activities=kinds) as window:
        run()
        if CUDA:
            torch.cuda.synchronize()
    events = window.key_averages()
    if not CUDA:
        return "+".join(sorted(event.key[6:] for event in events if OF_CPU.fullmatch(event.key))) or "none"
    kernels = {event.key for event in events if event.device_type != DeviceType.CPU}
    return "+".join(sorted({kind for kind in map(kernel_kind, kernels) if kind})) or "none"


def kernel_kind(name: str) -> str | None:
    """The kind of an attention kernel of CUDA by its name; None for other kernels."""
    if name.startswith("triton"):
        return None  # named after the operators that it fuses
    if not any(word in name for word in ("flash", "fmha", "sdpa")):
        return None
    return next((kind for part, kind in KERNELS if part in name), None)


def check_decoding() -> Iterator[Row]:
    """The captured graph against the plain pass, while another thread allocates pinned memory and copies."""
    model, total, given = random_model(SMALL), 64, 32
    sequences = torch.randint(0, 512, (4, total + 1), generator=torch.Generator("cpu").manual_seed(3)).to(DEVICE)
    for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        model.to(dtype)
        plain = _scores(Decoder(model, total, use_graph=False), sequences, given)
        with copying() as copies:
            graphs = [_scores(Decoder(model, total), sequences, given) for _ in range(1 if TOY else 3)]
        largest = max(float((graph - plain).abs().max()) for graph in graphs)
        name = str(dtype).removeprefix("torch.")
        yield at_most(f"decoding: {name}, graph from plain pass, of {plain.abs().max():.1f}", largest, limit)
        yield Row(copies[0] > 0, f"decoding: {name}, copies meanwhile", str(copies[0]), "> 0")


@torch.no_grad()
def _scores(decoder: Decoder, sequences: torch.Tensor, given: int) -> torch.Tensor:
    """Scores of each position after the given ones, fp32 (positions, B, V)."""
    ends = range(given, sequences.shape[1])
    return torch.stack([decoder(sequences[:, :end]).float().clone() for end in ends])


@contextmanager
def copying() -> Iterator[list[int]]:
    """Copies from the device into new pinned memory, over and over; yields their number so far."""
    source, ended, copies = torch.ones(1 << 20, device=DEVICE), threading.Event(), [0]

    def copy() -> None:
        while True:
            torch.empty(source.shape, pin_memory=CUDA).copy_(source)
            copies[0] += 1
            if ended.wait(0.001):
                return

    thread = threading.Thread(target=copy, name="copies")
    thread.start()
    try:
        yield copies
    finally:
        ended.set()
        thread.join()
