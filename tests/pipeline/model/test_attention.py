"""The choice of attention kernels: what is measured, which is used, and that each computes attention."""

import json
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.config import ModelConfig
from pipeline.model import attention
from pipeline.model.attention import AttentionShape, candidates, describe, fastest, measure, use_fastest
from pipeline.model.cpu_attention import ROWS, BlockedAttention, attend
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import gpt2_config
from pipeline.train.setup import attention_seconds

SHAPE = AttentionShape(images=1, heads=2, positions=64, head_width=16, causal=True)
CPU = torch.device("cpu")
FLASH, CUDNN, BLOCKED = "FLASH_ATTENTION", "CUDNN_ATTENTION", "BLOCKED_ATTENTION"


@pytest.fixture
def _settings() -> Iterator[None]:
    """Restores what use_fastest sets."""
    order = torch._C._get_sdp_priority_order()
    yield
    use_fastest({})
    torch._C._set_sdp_priority_order(order)
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(True)


def packed_views(
    shape: AttentionShape, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Packed (B, T, 3 * D), and its queries, keys and values (B, H, T, d)."""
    width = shape.heads * shape.head_width
    packed = torch.randn(shape.images, shape.positions, 3 * width, dtype=dtype, requires_grad=True)
    return packed, heads_of(packed, shape)


def heads_of(packed: torch.Tensor, shape: AttentionShape) -> tuple[torch.Tensor, ...]:
    parts = packed.split(shape.heads * shape.head_width, dim=2)
    return tuple(part.unflatten(2, (shape.heads, shape.head_width)).transpose(1, 2) for part in parts)


def test_measures_what_runs_and_leaves_out_what_does_not():
    kernels = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    found = measure(SHAPE, kernels, CPU)
    assert found.keys() == {FLASH, "MATH"}
    assert all(seconds > 0 for seconds in found.values())


def test_views_of_packed_tensors_are_measured_as_the_model_passes_them(monkeypatch):
    seen = []

    def attending(queries, keys, values, is_causal):
        seen.extend((each.shape, each.stride()) for each in (queries, keys, values))
        return scaled_dot_product_attention(queries, keys, values, is_causal=is_causal)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", attending)
    measure(SHAPE, [SDPBackend.FLASH_ATTENTION], CPU)
    assert set(seen) == {((1, 2, 64, 16), (64 * 3 * 32, 16, 3 * 32, 1))}


@pytest.mark.parametrize(
    ("positions", "device", "cudnn", "deterministic", "expected"),
    [
        (1024, "cuda", 91501, False, (FLASH, CUDNN)),
        (1024, "cuda", 91500, False, (FLASH,)),  # wrong at lengths that 128 does not divide
        (1024, "cuda", 91501, True, (FLASH,)),
        (1024, "cuda", None, False, (FLASH,)),
        (1024, "cpu", None, False, (FLASH, BLOCKED)),
        (1024, "cpu", None, True, ()),
        (255, "cpu", None, False, ()),
    ],
)
def test_candidates(positions, device, cudnn, deterministic, expected):
    assert candidates(replace(SHAPE, positions=positions), device, cudnn, deterministic) == expected


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize(
    ("seconds", "cudnn", "first"),
    [
        ({FLASH: 1.0, CUDNN: 2.0}, False, SDPBackend.FLASH_ATTENTION),
        ({FLASH: 2.0, CUDNN: 1.0}, True, SDPBackend.CUDNN_ATTENTION),
        ({CUDNN: 2.0}, True, SDPBackend.CUDNN_ATTENTION),
    ],
)
def test_the_fastest_is_tried_first_flash_is_the_second_and_what_takes_masks_stays(seconds, cudnn, first):
    cuda = torch.backends.cuda
    use_fastest(seconds)
    assert (cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled()) == (True, cudnn)
    assert cuda.mem_efficient_sdp_enabled() and cuda.math_sdp_enabled()
    order = [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]
    assert order[0] == first and SDPBackend.FLASH_ATTENTION in order[:2]
    assert sorted(map(int, order)) == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("_settings")
def test_blocks_are_used_only_if_they_are_clearly_faster():
    for seconds, blocked in (({FLASH: 1.0, BLOCKED: 0.7}, True), ({FLASH: 1.0, BLOCKED: 0.9}, False), ({}, False)):
        use_fastest(seconds)
        assert (ALL_ATTENTION_FUNCTIONS["sdpa"] is attend) == blocked
    assert fastest({FLASH: 1.0, BLOCKED: 0.9}) == FLASH


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("positions", [64, ROWS + 37])
def test_blocks_compute_attention(positions: int, causal: bool) -> None:
    """Forward and backward against float64: in bf16 as near as FlashAttention, in fp32 and float64 up to rounding."""
    torch.manual_seed(0)
    shape = AttentionShape(images=2, heads=2, positions=positions, head_width=24, causal=causal)
    module = SimpleNamespace(is_causal=causal)
    packed, views = packed_views(shape)
    weights = torch.randn(2, positions, 2, 24)

    def results(mixed: torch.Tensor, source: torch.Tensor) -> list[torch.Tensor]:
        [gradient] = torch.autograd.grad((mixed * weights.to(mixed.dtype)).sum(), source)
        return [mixed.detach().double(), gradient.double()]

    exact = packed.detach().double().requires_grad_()
    expected = results(scaled_dot_product_attention(*heads_of(exact, shape), is_causal=causal).transpose(1, 2), exact)
    blocked = BlockedAttention.apply(*heads_of(exact, shape), 24**-0.5, causal).transpose(1, 2)
    for ours, reference in zip(results(blocked, exact), expected, strict=True):
        torch.testing.assert_close(ours, reference)
    flash = results(scaled_dot_product_attention(*views, is_causal=causal).transpose(1, 2), packed)
    ours = results(attend(module, *views, None, scaling=24**-0.5)[0], packed)
    for number, reference in enumerate(expected):
        assert (ours[number] - reference).norm() < 2.5 * (flash[number] - reference).norm()


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize("objective", ["next_color", "masked_color"])
def test_a_model_computes_with_the_selected_kernel(objective: str) -> None:
    """Causal or not as its objective asks, in bf16 as near to fp32 as with FlashAttention."""
    config = gpt2_config(ModelConfig(layers=2, width=32, heads=2, resolution=16), 512, objective)
    model, tokens = build_model(config), torch.arange(512).view(2, 256)
    initialize(model, 0)
    with torch.no_grad():
        exact, errors = model.transformer(tokens)[0], []
        model.bfloat16()
        for seconds in ({}, {FLASH: 2.0, BLOCKED: 1.0}):
            use_fastest(seconds)
            errors.append((model.transformer(tokens)[0].float() - exact).norm() / exact.norm())
    assert errors[0] != errors[1] and max(errors) < 0.02


def test_what_the_blocks_do_not_compute_is_as_before(monkeypatch):
    """fp32, a mask, dropout, and one query with many keys: scaled_dot_product_attention's, bit for bit."""
    monkeypatch.setattr(BlockedAttention, "apply", None)
    _, views = packed_views(SHAPE)
    module, mask = SimpleNamespace(is_causal=True), torch.zeros(64, 64, dtype=torch.bfloat16)
    single = [each.float() for each in views]
    cases = [
        (single, {"attention_mask": None}, {"is_causal": True}),
        (views, {"attention_mask": mask}, {"attn_mask": mask}),
        ([views[0][:, :, :1], *views[1:]], {"attention_mask": None}, {}),
    ]
    for operands, ours, theirs in cases:
        found, _ = attend(module, *operands, **ours)
        assert torch.equal(found, scaled_dot_product_attention(*operands, **theirs).transpose(1, 2))
    attend(module, *views, attention_mask=None, dropout=0.5)


def test_the_kernel_in_use_is_described_first():
    assert describe({"A": 0.002, "B": 0.001}).startswith("B 1.00 ms, A 2.00 ms per block")
    assert describe({BLOCKED: 0.0009, FLASH: 0.001}).startswith("FLASH_ATTENTION 1.00 ms, BLOCKED_ATTENTION 0.90 ms")


class Folder:
    """Remembers in memory what a run folder writes to run.json."""

    record = "{}"

    def recall(self, key):
        return json.loads(self.record).get(key)

    def note(self, status, **facts):
        self.record = json.dumps(json.loads(self.record) | facts)


def test_a_run_measures_once_for_a_shape(monkeypatch):
    answers = iter([{FLASH: 1.0, CUDNN: 2.0}, {FLASH: 2.0, CUDNN: 1.0}])
    monkeypatch.setattr(attention, "measure_named", lambda *_: next(answers))
    folder, both = Folder(), (FLASH, CUDNN)
    first = attention_seconds(folder, SHAPE, both, CPU)
    assert attention_seconds(folder, SHAPE, both, CPU) == first == {FLASH: 1.0, CUDNN: 2.0}
    assert attention_seconds(folder, replace(SHAPE, images=2), both, CPU) == {FLASH: 2.0, CUDNN: 1.0}
    assert attention_seconds(folder, replace(SHAPE, images=2), (FLASH,), CPU) == {FLASH: 2.0}, "cuDNN is refused now"


def test_both_kernels_of_a_cpu_are_measured_and_recorded():
    folder, shape = Folder(), replace(SHAPE, images=8, positions=2 * ROWS)
    seconds = attention_seconds(folder, shape, candidates(shape, "cpu", None), CPU)
    assert seconds.keys() == {FLASH, BLOCKED}
    assert attention_seconds(folder, shape, candidates(shape, "cpu", None), CPU) == seconds


def test_a_run_that_an_earlier_version_started_on_a_cpu_keeps_its_kernel():
    """It recorded nothing, and used torch's."""
    folder = Folder()
    folder.note("running", starts=[{}, {}])
    assert attention_seconds(folder, SHAPE, (FLASH, BLOCKED), CPU) == {}
    folder.note("running", starts=[{}])
    assert attention_seconds(folder, SHAPE, (FLASH, BLOCKED), CPU).keys() == {FLASH, BLOCKED}


@pytest.mark.slow
def test_blocks_are_one_graph_when_compiled():
    """Forward and backward, without a break, and the same numbers."""
    shape = replace(SHAPE, positions=ROWS + 8)
    module = SimpleNamespace(is_causal=True)
    packed, views = packed_views(shape)
    compiled = torch.compile(lambda *operands: attend(module, *operands, None)[0], backend="aot_eager", fullgraph=True)
    gradients = [
        torch.autograd.grad(run(*views).sum(), packed)[0]
        for run in (compiled, lambda *each: attend(module, *each, None)[0])
    ]
    assert torch.equal(*gradients)
