"""DeepSpeed's settings of every layout are those of the table in pipeline/train/README.md."""

import json
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import BatchConfig, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from pipeline.distributed import Ranks
from pipeline.train.engine import offload
from pipeline.train.engine.deepspeed_config import deepspeed_config
from tests.launch import ROOT

LAYOUTS: dict[str, dict[str, Any]] = {
    "ZeRO-0": {"zero_stage": 0},
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2 in bf16": {"zero_stage": 2, "communication": "bf16"},
    "ZeRO-3": {"zero_stage": 3},
    "pipeline": {"pipeline_stages": 2},
    "tensor parallelism": {"tensor_parallel": 2},
    "pipeline with tensor parallelism": {"pipeline_stages": 2, "tensor_parallel": 2},
    "optimizer in host memory": {"offload": "optimizer"},
    "parameters in host memory": {"zero_stage": 3, "offload": "parameters"},
    "optimizer on NVMe": {"zero_stage": 3, "offload": "optimizer", "nvme_path": "disk"},
    "parameters on NVMe": {"zero_stage": 3, "offload": "parameters", "nvme_path": "disk"},
}
APPLIES: dict[str, Callable[[TrainConfig, Ranks], bool]] = {
    "all": lambda c, r: True,
    "pipeline with tensor parallelism": lambda c, r: c.parallel.tensor_parallel > 1 and c.parallel.pipeline_stages > 1,
    "bf16 with ZeRO-0": lambda c, r: c.precision == "bf16" and c.parallel.zero_stage == 0,
    "bf16 with ZeRO-1 to 3, and fp8": lambda c, r: (
        c.precision == "fp8" or (c.precision == "bf16" and c.parallel.zero_stage > 0)
    ),
    "ZeRO-0 (the engine clips), and ZeRO-1 and 2 without offload (fused AdamW clips)": lambda c, r: (
        c.parallel.zero_stage < 3 and c.parallel.offload == "none"
    ),
    "ZeRO-3, and offload": lambda c, r: c.parallel.zero_stage == 3 or c.parallel.offload != "none",
    "on CUDA: several data-parallel ranks, no pipeline": lambda c, r: overlaps(c, r),
    "on a CPU, or with one data-parallel rank, or with a pipeline": lambda c, r: not overlaps(c, r),
    "without offload": lambda c, r: c.parallel.offload == "none",
    "offload": lambda c, r: c.parallel.offload != "none",
    "offload to host memory": lambda c, r: c.parallel.offload != "none" and c.parallel.nvme_path is None,
    "offload of parameters to host memory": lambda c, r: (
        c.parallel.offload == "parameters" and c.parallel.nvme_path is None
    ),
    "offload to NVMe": lambda c, r: c.parallel.nvme_path is not None,
    "offload of parameters to NVMe": lambda c, r: (
        c.parallel.offload == "parameters" and c.parallel.nvme_path is not None
    ),
}
"""To which layouts a row of the table applies."""


def overlaps(config: TrainConfig, ranks: Ranks) -> bool:
    parallel = config.parallel
    several = ranks.count > parallel.pipeline_stages * parallel.tensor_parallel
    return ranks.device.type == "cuda" and several and parallel.pipeline_stages == 1


def table() -> dict[str, dict[str, str]]:
    """The settings of each row, as they are written."""
    page = (ROOT / "pipeline/train/README.md").read_text()
    section = page.partition("### DeepSpeed's settings\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \| (`.+) \|$", section, re.M)
    return {name: dict(re.findall(r"`([\w.]+): ([^`]+)`", settings)) for name, settings in rows}


def value_of(written: str, config: TrainConfig, ranks: Ranks) -> Any:
    """A value of the table: JSON, an option, or one of four words."""
    words: dict[str, Any] = {
        "computed": config.batch.global_size // config.batch.micro_size // config.parallel.data_ranks(ranks.count),
        "on CUDA": ranks.device.type == "cuda",
        "a new folder": "a new folder",
    }
    if written in words:
        return words[written]
    if match := re.fullmatch(r"(batch|parallel|optimizer)\.(\w+)", written):
        return getattr(getattr(config, match[1]), match[2])
    try:
        return json.loads(written)
    except ValueError:
        return written


def flattened(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, "a new folder" if key == "nvme_path" else value


@pytest.mark.parametrize("layout", LAYOUTS)
def test_settings_are_those_of_the_page(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.chdir(tmp_path)
    parallel, rows = ParallelConfig(**LAYOUTS[layout]), table()
    assert set(rows) == set(APPLIES)
    has_fp8 = parallel.zero_stage in (1, 2) and parallel.tensor_parallel == 1
    counts, devices = (parallel.model_ranks, 2 * parallel.model_ranks), ("cpu", "cuda:0")
    for precision, count, device in product(("fp32", "bf16", "fp8") if has_fp8 else ("fp32", "bf16"), counts, devices):
        config = new_config(parallel, precision)
        ranks = Ranks(0, count, 0, torch.device(device))
        expected: dict[str, Any] = {}
        for name, settings in rows.items():
            if APPLIES[name](config, ranks):
                assert not expected.keys() & settings.keys()
                expected |= {key: value_of(written, config, ranks) for key, written in settings.items()}
        assert dict(flattened(deepspeed_config(config, ranks))) == expected, (precision, count, device)
    offload.clear_own_folder()


def new_config(parallel: ParallelConfig, precision: Any) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(size="s"),
        data=DataConfig(shards="shards"),
        parallel=parallel,
        precision=precision,
        batch=BatchConfig(global_size=48, micro_size=2),
        optimizer=OptimizerConfig(clip_norm=0.7),
    )
