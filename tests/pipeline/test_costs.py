"""Costs against counted parameters, torch's own FLOP counter and the published table."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline import costs
from pipeline.config import ModelConfig
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import BLOCKS, gpt2_config


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [{"size": "s"}, {"size": "xl"}, {"layers": 3, "width": 24, "heads": 2}])
def test_parameters_by_formula_are_those_counted(block, shape):
    config = gpt2_config(ModelConfig(**shape, resolution=16, block=block), colors=100)
    with torch.device("meta"):
        model = build_model(config)
    assert costs.parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("size", "resolution", "gigaflops"),
    [("s", 32, 0.606), ("m", 32, 3.17), ("l", 32, 9.06), ("l", 48, 10.2), ("xl", 64, 49.8)],
)
def test_flops_of_the_published_sizes(size, resolution, gigaflops):
    config = gpt2_config(ModelConfig(size=size, resolution=resolution))
    assert costs.flops_per_token(config) / 1e9 == pytest.approx(gigaflops, rel=0.004)


@pytest.mark.parametrize("block", BLOCKS)
def test_flops_are_those_that_torch_counts(block):
    """Eager attention multiplies in full, as the convention counts. The backward pass is counted too."""
    config = gpt2_config(ModelConfig(layers=2, width=32, heads=2, resolution=8, block=block), colors=16)
    model = build_model(config)
    initialize(model, 0)
    model.set_attn_implementation("eager")
    tokens = torch.zeros(3, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    assert costs.flops_per_token(config) * 3 * 64 == counter.get_total_flops()


@pytest.mark.parametrize(
    ("device_name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_accelerators_are_found_by_the_drivers_name(device_name, teraflops):
    accelerator = costs.find_accelerator(device_name)
    assert accelerator is not None
    assert accelerator.bf16_flops == teraflops * 1e12
    matching = [entry for entry in costs.ACCELERATORS.values() if re.search(entry.pattern, device_name)]
    assert matching == [accelerator], "by one entry alone"


@pytest.mark.parametrize(
    "device_name", ["NVIDIA GH200 480GB", "NVIDIA A10G", "NVIDIA L40", "NVIDIA H200 NVL", "Tesla T4"]
)
def test_products_with_other_peaks_are_not_taken_for_those_in_the_table(device_name):
    assert costs.find_accelerator(device_name) is None


def test_a_cpu_is_measured():
    state = torch.get_rng_state()
    peak = costs.device_peak(torch.device("cpu"), "fp32")
    assert 1e8 < peak.flops < 1e14
    assert "measured" in peak.source
    assert torch.equal(torch.get_rng_state(), state)


def test_fp8_is_measured_against_bf16(monkeypatch):
    assert costs.device_peak(torch.device("cpu"), "fp8").source == "bf16 matrix product measured on this cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    peak = costs.device_peak(torch.device("cuda", 0), "fp8")
    assert peak.flops == 989e12
    assert "dense bf16" in peak.source
