"""torch's global settings of exactness."""

import os
import platform
from pathlib import Path

import pytest
import torch
from torch.utils import deterministic

from pipeline.model import numerics


def test_tf32_is_off_within_and_as_before_after():
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    try:
        with numerics.without_tf32():
            assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
            assert not torch.backends.cudnn.conv.fp32_precision == before[0] == "tf32"
            raise RuntimeError
    except RuntimeError:
        assert [setting.fp32_precision for setting in settings] == before


def test_what_deterministic_kernels_set(monkeypatch):
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        numerics.use_deterministic_kernels()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert (
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        assert torch.backends.cudnn.deterministic and not torch.backends.cuda.cudnn_sdp_enabled()
        assert not deterministic.fill_uninitialized_memory
        with numerics.any_kernels():
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        torch.backends.cuda.enable_cudnn_sdp(True)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are x86's")
def test_bf16_is_slow_on_processors_without_avx512_or_its_successor():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert numerics.bf16_is_slow(torch.device("cpu")) == (not {"avx512bw", "avx_ne_convert"} & set(flags))
    assert not numerics.bf16_is_slow(torch.device("cuda"))
