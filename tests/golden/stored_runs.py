"""The stored runs: how one was made, how it is resumed and exported, and the format of its checkpoint."""

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open
from transformers import ImageGPTForCausalImageModeling

from data_prep.shards.reader import open_shard_set
from pipeline.model_folder.export import Kind, export, find_checkpoint
from tests.golden.curves import FOLDER, SHARDS, train_recorded
from tests.launch import ROOT
from tests.pipeline.conftest import Runner

RUNS, EXPECTED = FOLDER / "runs", "expected.json"
WEIGHTS: tuple[Kind, ...] = ("raw", "ema")
"""The weights that are exported."""
SAVED, LAST = 8, 20
"""The step of the stored checkpoint, and the last of the run."""
LOGITS_TOLERANCE = 1e-5
"""Absolute; the logits of such a model are below 1."""
LAYOUTS: dict[str, tuple[int, list[str]]] = {  # ranks, options
    "1-rank": (1, ["--parallel.zero_stage=1"]),
    "zero-1": (2, ["--parallel.zero_stage=1"]),
    "zero-3": (2, ["--parallel.zero_stage=3"]),
    "stages-2": (2, ["--parallel.pipeline_stages=2"]),
    "tensor-2": (2, ["--parallel.tensor_parallel=2"]),
}
SETTINGS = {
    "model__width": 8,
    "optimizer__learning_rate": 0.003,
    "ema__decay": 0.9,
    "schedule__steps": LAST,
    "batch__micro_size": 2,
    "checkpoint__every_steps": SAVED,
    "checkpoint__keep_last": 3,
    "validation__images": 13,
}


def names() -> list[str]:
    """The names of the stored runs, which are numbers, oldest first."""
    return sorted((folder.name for folder in RUNS.glob("*")), key=int)


def resume(stored: Path, layout: str, folder: Path) -> Runner:
    """Continues a copy of a stored run, "run", to its last step, with a copy of the shard set and its own config.yaml
    as recipe."""
    shards, ranks = folder / "set", LAYOUTS[layout][0]
    shutil.copytree(SHARDS, shards)
    shutil.copytree(stored / "run", folder / "run")
    options = [f"--config={stored / 'run/config.yaml'}", f"--run={folder / 'run'}", f"--data.shards={shards}"]
    train_recorded(ranks, [[*options, *LAYOUTS[layout][1]]], folder)
    return Runner(shards, folder)


def store_run(folder: Path, out: Path) -> None:
    """Trains a run on two ranks and writes to `out` what a kill after its first checkpoint would have left."""
    runner = Runner(SHARDS.relative_to(ROOT), folder)
    train_recorded(2, [runner.arguments("run", **SETTINGS)[3:]], folder)
    run, steps = folder / "run", out / "checkpoints"
    name = f"step-{SAVED:08d}"
    shutil.copytree(run / "checkpoints" / name, steps / name)
    for file in ("config.yaml", "palette.npy"):
        shutil.copyfile(run / file, out / file)
    rows = [line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= SAVED]
    (out / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    record = json.loads((run / "run.json").read_text())
    record |= {"status": "running", "checkpoint": SAVED}
    record["shards"]["path"] = str(SHARDS.relative_to(ROOT))  # nothing of the machine that made it
    for start in record["starts"]:
        start["command"] = start["command"][:4]
        start["hardware"]["system"] = platform.system()
    record = {key: value for key, value in record.items() if key not in ("step", "images", "verified_shards")}
    (out / "run.json").write_text(json.dumps(record, indent=2) + "\n")


def logits_of(stored: Path, kind: Kind, out: Path) -> torch.Tensor:
    """Some logits (4, 16) of the first held-out image, by transformers from the exported checkpoint."""
    export(find_checkpoint(stored / "run"), out, kind=kind)
    tokens = open_shard_set(SHARDS).split("valid").gather(np.zeros(1, np.int64))[0].astype(np.int64)  # (1, T)
    model = ImageGPTForCausalImageModeling.from_pretrained(out)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(np.concatenate([[[512]], tokens[:, :-1]], axis=1))).logits
    return logits[0, ::16, ::32]


def format_of(checkpoint: Path) -> dict[str, Any]:
    """What a reader of a checkpoint relies on, whatever its values and layout: keys, types, names of tensors."""
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    tensors, entries = set(), []
    for name in manifest["files"]:
        with safe_open(str(checkpoint / name), framework="np") as file:
            metadata = file.metadata()
            entries += [entry | {"part": None} for entry in json.loads(metadata.pop("index"))]  # a part only if split
            assert not metadata
            for key in file.keys():  # noqa: SIM118 (no mapping)
                name, at, rest = key.partition("@")
                tensors.add(f"{name} {rest.partition('.')[2] if at else ''} {file.get_slice(key).get_dtype()}".strip())
    return {
        "checkpoint.json": _types(manifest),
        "topology": _types(manifest["topology"]),
        "files": sorted({json.dumps(_types(one)) for one in manifest["files"].values()}),
        "fingerprints": _types(manifest["fingerprints"]),
        "index": sorted({json.dumps(_types(entry)) for entry in entries}),
        "tensors": sorted(tensors),
    }


def _types(content: dict[str, Any]) -> dict[str, str]:
    return {key: type(value).__name__ for key, value in sorted(content.items())}


def keys_of(run: Path, resumed: Path | None = None) -> dict[str, set[str]]:
    """The keys of a run's config.yaml, run.json and metrics.jsonl.

    resumed: the stored run that `run` continues. Only the keys that the resume wrote are returned: `run` keeps the
    stored rows, and the values of run.json that the resume does not write.
    """
    config = yaml.safe_load((run / "config.yaml").read_text())  # each start writes it anew
    record = json.loads((run / "run.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if resumed is not None:
        stored = json.loads((resumed / "run.json").read_text())
        record = {key: value for key, value in record.items() if value != stored.get(key)}
        rows = [row for row in rows if row["step"] > SAVED]
    groups = {key: value for key, value in config.items() if isinstance(value, dict)}
    last_start, shards = record.get("starts", [{}])[-1], record.get("shards", {})
    return {
        "config.yaml": {*config, *(f"{group}.{key}" for group in groups for key in groups[group])},
        "run.json": {*record, *(f"starts.{key}" for key in last_start), *(f"shards.{key}" for key in shards)},
        "metrics.jsonl": {key for row in rows for key in row},
    }
