"""What must not be published: credentials, and where files lie."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.hub_server import TOKEN
from tests.pipeline.publish.conftest import publish

ROOTS = re.compile(r"""(?:^|[\s"'=>;])/(?:scratch|home|root|tmp|work|data|nfs|var|usr|Users)\b""", re.M)


def test_secrets_are_not_published(models: dict[int, Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(models[40], tmp_path / "model"))
    record = json.loads((model / "training/run.json").read_text())
    record["shards"]["path"] = "https://me:secret@host/set"
    (model / "training/run.json").write_text(json.dumps(record))
    publish(model, "--to", f"dir:{tmp_path / 'public'}")
    assert json.loads((tmp_path / "public/training/run.json").read_text())["shards"]["path"] == "https://host/set"
    record["shards"]["path"] = f"pipe:curl -H 'Authorization: Bearer {TOKEN}' https://host/set"
    (model / "training/run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"training/run\.json contains a token"):
        publish(model, "--to", f"dir:{tmp_path / 'other'}")
    assert not (tmp_path / "other").exists()


def test_no_absolute_path_is_published(models: dict[int, Path], results: Path, tmp_path: Path) -> None:
    """Those of shard sets, commands and reports tell names of people and of machines."""
    model = Path(shutil.copytree(models[40], tmp_path / "model"))
    record = json.loads((model / "training/run.json").read_text())
    command = ["python", "-m", "pipeline", "train", "--config=/home/ada/igpt.yaml", "--run", "/scratch/ada's runs/one/"]
    record["shards"]["path"] = "/nfs/my data/photo set"
    record["starts"][0]["command"] = command
    record["starts"][0]["changes"] = {"data.shards": ["/nfs/a", "https://host/a/set"]}
    (model / "training/run.json").write_text(json.dumps(record, indent=2))
    (model / "training/config.yaml").write_text("data:\n  shards: /nfs/photos\n  other: pipe:cat /nfs/x/*.tar\n")
    assert ROOTS.search((results / "results.json").read_text()), "the test's own folders, in commands"
    publish(model, "--results", results, "--to", f"dir:{tmp_path / 'public'}")

    texts = {
        path: path.read_text()
        for path in (tmp_path / "public").rglob("*")
        if path.suffix in (".json", ".jsonl", ".yaml", ".html", ".md")
    }
    assert {path.name: ROOTS.findall(text) for path, text in texts.items() if ROOTS.search(text)} == {}
    published = json.loads((tmp_path / "public/training/run.json").read_text())
    assert published["shards"]["path"] == "photo set"
    assert published["starts"][0]["command"][-3:] == ["--config=igpt.yaml", "--run", "one"]
    assert published["starts"][0]["changes"] == {"data.shards": ["a", "https://host/a/set"]}
    configured = (tmp_path / "public/training/config.yaml").read_text()
    assert configured == "data:\n  shards: photos\n  other: pipe:cat x/*.tar\n"
    density = json.loads((tmp_path / "public/results/density.json").read_text())
    assert density["command"].startswith("python -m pipeline evaluate step-40 --shards=shards --out=results")
    for name in ("report.html", "density.png"):
        before, after = (len((folder / name).read_bytes()) for folder in (results, tmp_path / "public/results"))
        assert 0.95 * before < after <= before
