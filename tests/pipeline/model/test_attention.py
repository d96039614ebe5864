"""The choice of attention kernels, on the CPU's own two."""

import json
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend

from pipeline.model import attention
from pipeline.model.attention import AttentionShape, describe, measure, use_fastest
from pipeline.train.setup import attention_seconds

SHAPE = AttentionShape(images=1, heads=2, positions=64, head_width=16, causal=True)


def test_measures_what_runs_and_leaves_out_what_does_not():
    kernels = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    found = measure(SHAPE, kernels, torch.device("cpu"))
    assert found.keys() == {"FLASH_ATTENTION", "MATH"}
    assert all(seconds > 0 for seconds in found.values())


def test_the_fastest_alone_stays_of_the_candidates_and_what_takes_masks_stays():
    cuda = torch.backends.cuda
    try:
        for seconds, flash in (
            ({"FLASH_ATTENTION": 1.0, "CUDNN_ATTENTION": 2.0}, True),
            ({"CUDNN_ATTENTION": 2.0}, False),
        ):
            use_fastest(seconds)
            assert (cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled()) == (flash, not flash)
            assert cuda.mem_efficient_sdp_enabled() and cuda.math_sdp_enabled()
    finally:
        cuda.enable_flash_sdp(True)
        cuda.enable_cudnn_sdp(True)


def test_the_fastest_kernel_is_described_first():
    assert describe({"A": 0.002, "B": 0.001}).startswith("B 1.00 ms, A 2.00 ms per block")


def test_a_run_measures_once_for_a_shape(monkeypatch):
    class Folder:
        record = "{}"

        def recall(self, key):
            return json.loads(self.record).get(key)

        def note(self, status, **facts):
            self.record = json.dumps(facts)

    answers = iter([{"A": 1.0, "B": 2.0}, {"A": 2.0, "B": 1.0}])
    monkeypatch.setattr(attention, "measure", lambda *_: next(answers))
    folder, cpu = Folder(), torch.device("cpu")
    first = attention_seconds(folder, SHAPE, cpu)
    assert attention_seconds(folder, SHAPE, cpu) == first == {"A": 1.0, "B": 2.0}
    assert attention_seconds(folder, replace(SHAPE, images=2), cpu) == {"A": 2.0, "B": 1.0}
