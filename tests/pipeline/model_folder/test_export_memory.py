"""The export of the paper's 1.4-billion-parameter model, from random weights, in less than 8 GB."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

from data_prep.palette.codec import palette_sha256
from pipeline.checkpoint import format as checkpoints
from pipeline.checkpoint.format import CheckpointRecord
from pipeline.config import ModelConfig
from pipeline.model.gpt import build_model
from pipeline.model.gpt_config import gpt2_config
from tests.launch import ROOT

LIMIT = 8e9
RANKS = 8
PROGRAM = """
import resource, runpy
try:
    runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_run(run: Path, size: str) -> int:
    """A run with one checkpoint of random weights, and none of Adam's moments. Its parameters."""
    config = gpt2_config(ModelConfig(size=size, resolution=32))
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in build_model(config).named_parameters()}
    palette = np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32)
    digests = {"digest": "0" * 64, "palette_sha256": palette_sha256(palette)}
    folder = run / "checkpoints"
    checkpoints.begin(folder, 1)
    np.save(run / "palette.npy", palette)
    objective = {"kind": "next_color", "mask_probability": 0.15}
    (run / "config.yaml").write_text(yaml.safe_dump({"seed": 0, "objective": objective}))
    record = {"shards": digests | {"path": "/nowhere", "source": "noise"}, "starts": []}
    (run / "run.json").write_text(json.dumps(record))
    (run / "metrics.jsonl").touch()
    temporary = checkpoints.temporary_folder(folder, 1)
    files = {checkpoints.rank_file(rank): write_rank(temporary, rank, shapes) for rank in range(RANKS)}
    manifest = CheckpointRecord(
        step=1,
        images=128,
        topology={},
        model=config.to_dict(),
        palette_sha256=digests["palette_sha256"],
        shards_digest=digests["digest"],
        order_fingerprint="",
        probe_loss=0.0,
        precision="fp32",
        files=files,
    )
    checkpoints.commit(temporary, manifest)
    return sum(shape.numel() for shape in shapes.values())


def write_rank(temporary: Path, rank: int, shapes: dict[str, torch.Size]) -> dict[str, object]:
    generator = torch.Generator().manual_seed(rank)
    tensors, index = {}, []
    for name, shape in shapes.items():
        first, last = shape.numel() * rank // RANKS, shape.numel() * (rank + 1) // RANKS
        tensors[f"{name}@{first}.weight"] = 0.02 * torch.randn(last - first, generator=generator) + (".ln_" in name)
        entry = {"name": name, "shape": list(shape), "start": first, "length": last - first, "step": 1.0}
        index.append(entry | {"part": None})
    return checkpoints.write_rank(temporary, rank, tensors, index)


@pytest.mark.slow  # 11 GB on disk, minutes
def test_a_large_model_is_exported_in_little_memory(tmp_path: Path) -> None:
    parameters = write_run(tmp_path / "run", "l")
    command = [sys.executable, "-c", PROGRAM, "export", str(tmp_path / "run"), "--out", str(tmp_path / "model")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    print(f"\n{parameters:,} parameters exported within {peak / 1e9:.2f} GB")
    assert peak < LIMIT
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) == 2, "more than 5 GB goes into several files"
    assert all(file.stat().st_size < 5e9 for file in files)
    stored = 0
    for file in files:
        with safe_open(str(file), framework="np") as weights:
            names = [name for name in weights.keys() if not name.endswith(".bias")]  # noqa: SIM118 (no mapping)
            stored += sum(int(np.prod(weights.get_slice(name).get_shape())) for name in names)
    assert stored == parameters
