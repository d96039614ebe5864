"""A remote shard set equals the local one: opened, checked, read, verified and shown through a local cache."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.shards.reader import ShardSet, cache_folder, open_shard_set
from tests.http_server import Server, serve


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(shards: Path, cache: Path) -> Iterator[Server]:
    with serve(shards.parent) as server:
        yield server


@pytest.fixture(params=["http", "pipe"])
def address(request: pytest.FixtureRequest, server: Server, shards: Path) -> str:
    return f"{server.url}/shards" if request.param == "http" else f"pipe:cat {shards}/{{}}"


def everything(shard_set: ShardSet) -> dict[str, tuple[list[list[int]], list[int]]]:
    """Tokens and labels of all splits."""
    found = {}
    for name in shard_set.splits:
        split = shard_set.split(name)
        tokens, labels = split.gather(np.arange(split.images))
        found[name] = tokens.tolist(), labels.tolist()
    return found


def test_a_remote_set_equals_its_folder(address: str, shards: Path) -> None:
    remote, local = open_shard_set(address), open_shard_set(shards)
    assert (remote.digest, remote.path, remote.classes) == (local.digest, address, local.classes)
    assert np.array_equal(remote.palette, local.palette)
    assert everything(remote) == everything(local)
    assert remote.split("train").record(0)[0].tolist() == local.split("train").record(0)[0].tolist()


def test_only_shards_that_are_read_are_copied_and_only_once(server: Server, cache: Path) -> None:
    address = f"{server.url}/shards"
    for _ in range(2):
        shard_set = open_shard_set(address)
        shard_set.split("valid").gather(np.arange(5))
    tars = [path for path, _ in server.requests if path.endswith(".tar")]
    assert tars == ["/shards/valid-000000.tar"]
    assert [file.name for file in (cache / shard_set.digest).iterdir()] == ["valid-000000.tar"]


def test_without_the_variable_the_cache_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("IGPT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("abc") == tmp_path / ".cache/image-gpt/abc"


def first_token(address: str) -> int:
    return int(open_shard_set(address).split("train").record(0)[0][0, 0])


def test_several_processes_may_download_the_same_file(server: Server, shards: Path, cache: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        found = set(pool.map(first_token, [f"{server.url}/shards"] * 8))
    assert found == {first_token(str(shards))}
    assert not list(cache.rglob("*.partial"))


def test_verify_reads_all_of_a_remote_set(address: str, shards: Path, cache: Path, run: Callable[..., Any]) -> None:
    result = run("verify", address)
    assert result.code == 0
    assert f"{address}: matches its manifest" in result.err
    assert not list(cache.rglob("*.tar")), "what it copied is not kept"
    open_shard_set(address).split("train").gather(np.arange(1))
    copy = next(cache.rglob("train-000000.tar"))
    content = bytearray(copy.read_bytes())
    content[700] ^= 1
    copy.write_bytes(content)
    assert "train-000000.tar does not have the sha256" in run("verify", address).err


def test_show_draws_a_remote_set(address: str, shards: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    for place, out in ((address, "remote.png"), (shards, "local.png")):
        assert run("show", place, "--split", "valid", "--out", tmp_path / out).code == 0
    assert (tmp_path / "remote.png").read_bytes() == (tmp_path / "local.png").read_bytes()


def test_a_remote_file_that_changed_is_an_error(server: Server, shards: Path, cache: Path) -> None:
    tar = shards / "valid-000000.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    shard_set = open_shard_set(f"{server.url}/shards")
    with pytest.raises(ValueError, match=r"/shards/valid-000000\.tar has sha256 .*, but must have"):
        shard_set.split("valid").gather(np.arange(2))
    assert not list(cache.rglob("*.tar"))


def change_manifest(shards: Path, change: Callable[[Any], object]) -> None:
    manifest = json.loads((shards / "shards.json").read_text())
    change(manifest)
    (shards / "shards.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda shards: (shards / "shards.json").unlink(), r"/shards/shards\.json"),
        (lambda shards: (shards / "shards.json").write_text("{"), r"/shards/shards\.json is not readable as JSON"),
        (lambda shards: (shards / "shards.json").write_text("[]"), r"/shards/shards\.json is not a manifest"),
        (lambda shards: change_manifest(shards, lambda all: all.pop("splits")), r"shards\.json is incomplete"),
        (lambda shards: (shards / "palette.npy").unlink(), r"/shards/palette\.npy"),
        (lambda shards: (shards / "palette.npy").write_bytes(b"x"), r"/shards/palette\.npy is not a valid"),
        (lambda shards: np.save(shards / "palette.npy", np.zeros((16, 3), np.float32)), r"palette\.npy has sha256"),
    ],
)
def test_errors_of_remote_sets_name_the_url(
    harm: Callable[[Path], object], message: str, server: Server, shards: Path
) -> None:
    harm(shards)
    with pytest.raises(ValueError, match=f"{server.url}.*{message}|{message}"):
        open_shard_set(f"{server.url}/shards")


@pytest.mark.parametrize("file", ["../train-000000.tar", "/etc/passwd", "a/b.tar"])
def test_a_manifest_does_not_write_outside_the_cache(file: str, server: Server, shards: Path, cache: Path) -> None:
    change_manifest(shards, lambda all: all["splits"]["train"]["shards"][0].update(file=file))
    for place in (f"{server.url}/shards", shards):
        with pytest.raises(ValueError, match=f"lists the file {file!r}"):
            open_shard_set(place)


def test_the_checksum_of_a_record_is_verified(shards: Path) -> None:
    change_manifest(shards, lambda all: all["splits"]["train"]["shards"][0]["record_crc32"].__setitem__(0, 5))
    with pytest.raises(ValueError, match=r"train-000000\.tar, record 0 does not have the checksum"):
        open_shard_set(shards).verify()


def test_a_server_that_drops_connections(shards: Path, cache: Path) -> None:
    local = everything(open_shard_set(shards))
    for seed in range(3):
        shutil.rmtree(cache, ignore_errors=True)
        with serve(shards, drop=0.6, seed=seed) as server:
            assert everything(open_shard_set(server.url)) == local
            assert server.dropped
