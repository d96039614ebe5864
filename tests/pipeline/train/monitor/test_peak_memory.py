"""The allocator's default setting, and the memory that is logged."""

import os

import pytest
import torch

from pipeline.train.monitor import peak_memory as memory
from pipeline.train.monitor.peak_memory import PeakMemory


@pytest.mark.parametrize("variable", [None, *memory.ALLOCATOR_VARIABLES])
def test_a_users_setting_of_the_allocator_wins(variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in memory.ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")  # recorded, so that it is restored
        monkeypatch.delenv(name)
    if variable is not None:
        monkeypatch.setenv(variable, "max_split_size_mb:64")
    memory.use_expandable_segments()
    found = {name: os.environ[name] for name in memory.ALLOCATOR_VARIABLES if name in os.environ}
    wanted = "expandable_segments:True" if variable is None else "max_split_size_mb:64"
    assert found == {variable or "PYTORCH_ALLOC_CONF": wanted}


def test_reserved_memory_is_beside_used_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated_bytes.all.peak": 3_000_000, "reserved_bytes.all.peak": 5_000_000}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    device = torch.device("cuda")
    assert memory.peak_memory(device) == PeakMemory(3_000_000, 5_000_000)
    table = memory.peak_memory_table(device, [memory.peak_memory(device), PeakMemory(10**9, 2 * 10**9)])
    assert table == "peak memory, MB, by rank: 3, 1,000; reserved by the allocator: 5, 2,000"
