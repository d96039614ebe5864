"""Invalid input ends in one sentence, leaves no manifest, and shows no traceback."""

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data_prep.small_data import archive_of

Run = Callable[..., Any]


def assert_one_sentence(result: Any, *words: str) -> None:
    assert result.code == 2, result
    errors = [line for line in result.err.splitlines() if "error" in line]
    assert len(errors) == 1, result.err
    assert errors[0].startswith("error: ")
    assert "Traceback" not in result.err
    for word in words:
        assert word in errors[0], errors[0]


@pytest.fixture
def fails(tmp_path: Path, run: Run) -> Run:
    """Runs `shards` and asserts that it ends in one sentence with these words, and without a shard set."""

    def check(options: list[Any], *words: str, out: Path = tmp_path / "out") -> None:
        assert_one_sentence(run("shards", *options, "--out", out), *words)
        assert not (out / "shards.json").exists()

    return check


@pytest.mark.parametrize(
    ("added", "words"),
    [
        (["--resolutoin", "8"], ["resolutoin"]),
        (["--resolution", "big"], ["resolution", "big", "integer"]),
        (["--resolution", "0"], ["resolution is 0", "between 1 and"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--valid_fraction", "1.5"], ["valid_fraction is 1.5", "below 1"]),
        (["--valid_fraction", "0.999"], ["valid_fraction is 0.999", "no training image of 48"]),
        (["--palette.colors", "1"], ["palette.colors is 1"]),
        (["--palette.file", "nothing.npy"], ["palette.file nothing.npy does not exist"]),
        (["--views.train", "0"], ["views.train is 0"]),
        (["--views.random_crop", "perhaps"], ["views.random_crop", "perhaps"]),
        (["--workers", "-2"], ["workers is -2"]),
        (["--source.kind", "pictures"], ["source.kind", "pictures", "image_folder"]),
        (["--source.kind", "photographs"], ["source.path", "remove"]),
        (["--source.streaming", "true"], ["source.streaming", "hf_dataset"]),
        (["--source.train_per_class", "0"], ["source.train_per_class is 0"]),
        (["--source.path", "nowhere"], ["source.path nowhere", "train/<class>"]),
        (["--config", "nothing.yaml"], ["nothing.yaml"]),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_invalid_options(added: list[str], words: list[str], options: list[str], fails: Run) -> None:
    fails([*options, *added], *words)


@pytest.mark.parametrize("group", ["{colors: 3}", "{}", "palette.yaml"])
def test_a_valid_group_is_not_reported_for_another_invalid_option(
    group: str, tmp_path: Path, fails: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("palette.yaml").write_text("colors: 3\n")
    fails(["--palette", group, "--seed", "x"], "seed is 'x'; it must be an integer")
    fails(["--palette", group, "--sed", "3"], "sed is not a known key; did you mean seed?")


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ("{colours: 3}", "palette.colours is not a known key; did you mean palette.colors?"),
        ("{colors: many}", "palette.colors is 'many'; it must be an integer"),
        ("many", "palette is 'many'; it must be keys and values"),
        ("{colors: 3", "palette is '{colors: 3'; it must be keys and values"),
    ],
)
def test_an_invalid_group_on_the_command_line(group: str, words: str, fails: Run) -> None:
    fails(["--palette", group], words)


def test_every_configuration_file_is_examined(tmp_path: Path, fails: Run) -> None:
    (tmp_path / "first.yaml").write_text("seed: 1\n")
    (tmp_path / "second.yaml").write_text("palete: {colors: 3}\n")
    files = ["--config", tmp_path / "first.yaml", f"--config={tmp_path / 'second.yaml'}"]
    fails(files, "palete is not a known key; did you mean palette?")
    fails(["--config", tmp_path / "first.yaml", "--config", "nothing.yaml"], "--config is 'nothing.yaml'")


def test_the_source_is_required(fails: Run) -> None:
    fails([], "source.kind")
    fails(["--source.kind", "cifar10"], "source.path is not set", "cifar10")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("source: {kind: photographs}\npalete: {colors: 3}\n", ["palete"]),
        ("source: {kind: photographs, colour: red}\n", ["colour"]),
        ("source: {kind: photographs}\nseed: many\n", ["seed is 'many'; it must be an integer"]),
        ("source: {kind: photographs, path: 3}\n", ["source.path is 3; it must be text"]),
        ("source: {kind: photographs}\nviews: {train: null}\n", ["views.train is null; it must be an integer"]),
        ("source: {kind: photographs}\nviews: null\n", ["views is null; it must be keys and values"]),
        ("source: photographs\n", ["source is 'photographs'; it must be keys and values"]),
        ("source: [1, 2\n", ["config"]),
        ("just words\n", ["config"]),
    ],
)
def test_invalid_configuration_file(text: str, words: list[str], tmp_path: Path, fails: Run) -> None:
    (tmp_path / "config.yaml").write_text(text)
    fails(["--config", tmp_path / "config.yaml"], *words)


def test_no_images(tmp_path: Path, options: list[str], fails: Run) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    fails([*options, "--source.path", empty], f"{empty} has no folder train/")
    (empty / "train").mkdir()
    fails([*options, "--source.path", empty], f"{empty}/train has no class folders")
    (empty / "train/cat").mkdir()
    fails([*options, "--source.path", empty], f"{empty}/train has no images")


def test_a_class_that_is_not_in_train(folder: Path, options: list[str], fails: Run) -> None:
    (folder / "test/dog").mkdir()
    fails(options, "test/dog", "not in train/")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("content", "reason"), [(b"", "empty"), (b"text", "not a picture"), (None, "truncated")])
def test_more_unreadable_images_than_allowed(
    content: bytes | None, reason: str, workers: int, folder: Path, options: list[str], fails: Run
) -> None:
    victim = next((folder / "train/cat").glob("*.png"))
    victim.write_bytes(victim.read_bytes()[:300] if content is None else content)
    fails([*options, "--workers", workers], "1 of 60 images", "max_skipped 0.01", f"{victim}: {reason}")


def test_why_no_image_can_be_used(folder: Path, options: list[str], tmp_path: Path, fails: Run, shards: Path) -> None:
    files = sorted(folder.glob("train/*/*.png"))
    for file in files:
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    for file in files[10:13]:
        file.write_bytes(b"")
    reason = "not a picture (it is a pointer of Git LFS, not the file itself (run `git lfs pull`)); by reason: "
    options = [*options, "--valid_fraction", "0"]
    fails(options, f"{folder} has no usable training image; the first is", reason, "45 not a picture, 3 empty.")
    with_palette = [*options, "--palette.file", shards / "palette.npy"]
    fails(
        with_palette, "48 of 60 images can't be used", reason, "45 not a picture, 3 empty; repair", out=tmp_path / "b"
    )
    message = "no training image can be used, so the shard set would be empty; the first is"
    fails([*with_palette, "--max_skipped", "1"], message, "45 not a picture, 3 empty.", out=tmp_path / "c")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("shards.json", b"<!DOCTYPE html><title>Log in</title>", "shards.json is an HTML page"),
        (
            "palette.npy",
            b"version https://git-lfs.github.com/spec/v1\n",
            "palette.npy is not a valid .npy file (it is a",
        ),
        (
            "train-000000.tar",
            b"version https://git-lfs.github.com/spec/v1\n",
            "train-000000.tar is a pointer of Git LFS",
        ),
    ],
)
def test_other_files_in_place_of_a_shard_sets(file: str, content: bytes, words: str, shards: Path, run: Run) -> None:
    (shards / file).write_bytes(content)
    assert_one_sentence(run("verify", shards), words)


def test_an_image_that_is_deleted(
    folder: Path, options: list[str], fails: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_prep.sources import image_folder as folders

    listed = folders._list_split

    def list_then_delete(*arguments: Any) -> Any:
        found = listed(*arguments)
        Path(found.folder, found.names[0]).unlink()
        return found

    monkeypatch.setattr(folders, "_list_split", list_then_delete)
    fails(options, "000.png: unreadable (No such file")


@pytest.mark.parametrize(
    "palette", [np.zeros((16, 4), np.float32), np.zeros((16, 3), np.uint8), np.full((16, 3), 2, np.float32)]
)
def test_invalid_palette(palette: np.ndarray, tmp_path: Path, options: list[str], fails: Run) -> None:
    np.save(tmp_path / "palette.npy", palette)
    fails([*options, "--palette.file", tmp_path / "palette.npy"], "palette.file", "palette.npy", "must contain")


def test_palette_of_another_size(shards: Path, options: list[str], fails: Run) -> None:
    fails([*options, "--palette.colors", "32", "--palette.file", shards / "palette.npy"], "(16, 3)", "(32, 3)")


def test_truncated_palette(shards: Path, tmp_path: Path, options: list[str], fails: Run) -> None:
    (tmp_path / "half.npy").write_bytes((shards / "palette.npy").read_bytes()[:150])
    fails([*options, "--palette.file", tmp_path / "half.npy"], "half.npy", "not a valid .npy")


def test_not_an_archive(tmp_path: Path, fails: Run, write_cifar: Callable[[str, str], Path]) -> None:
    (tmp_path / "page.tar.gz").write_text("<html><body>Sign in</body></html>")
    fails(["--source.kind", "cifar10", "--source.path", tmp_path / "page.tar.gz"], "(it is an HTML page, such as that")
    (tmp_path / "text.tar.gz").write_text("this is no archive")
    fails(["--source.kind", "cifar10", "--source.path", tmp_path / "text.tar.gz"], "text.tar.gz", "not a readable tar")
    archive = archive_of(write_cifar("cifar10", "python"))
    archive.write_bytes(archive.read_bytes()[:-1000])
    fails(["--source.kind", "cifar10", "--source.path", archive], str(archive), "not a readable tar")
    other = archive_of(write_cifar("cifar100", "python"))
    fails(["--source.kind", "cifar10", "--source.path", other], str(other), "has no data_batch_1")


def test_not_a_dataset(tmp_path: Path, fails: Run) -> None:
    (tmp_path / "empty").mkdir()
    fails(["--source.kind", "hf_dataset", "--source.path", tmp_path / "empty"], "source.path", "Hugging Face")


def test_a_folder_that_can_not_be_written(tmp_path: Path, options: list[str], fails: Run) -> None:
    (tmp_path / "file").write_text("")
    fails(options, str(tmp_path / "file"), out=tmp_path / "file/out")
    fails(options, str(tmp_path / "file"), out=tmp_path / "file")


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A small file system of its own; the test is skipped where mounting is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not permitted here")
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", ["4k", "8k", "24k", "72k"])
@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk(size: str, workers: int, tmp_path: Path, options: list[str], fails: Run) -> None:
    """Full at the plan, the palette, the first shard, or a later one (60 images of 32x32 take 130 kB)."""
    with mounted(tmp_path / "disk", size) as disk:
        fails([*options, "--resolution", 32, "--workers", workers], "No space left on device", out=disk / "out")
        assert not list(disk.rglob("*.partial"))


def test_read_only_disk(tmp_path: Path, options: list[str], fails: Run) -> None:
    with mounted(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        fails(options, "Read-only file system", out=disk / "out")


def test_a_folder_with_other_files(tmp_path: Path, options: list[str], fails: Run) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    fails(options, "mine contains other files", out=tmp_path / "mine")
    assert (tmp_path / "mine/notes.txt").read_text() == "keep me"


def test_another_set_is_not_overwritten(shards: Path, options: list[str], run: Run) -> None:
    before = (shards / "shards.json").read_bytes()
    result = run("shards", *options, "--resolution", 4, "--out", shards)
    assert_one_sentence(result, str(shards), "resolution 8, but it is now 4")
    assert (shards / "shards.json").read_bytes() == before


def test_an_unfinished_set_of_another_configuration(folder: Path, options: list[str], fails: Run) -> None:
    victim = next((folder / "train/cat").glob("*.png"))
    whole = victim.read_bytes()
    victim.write_bytes(b"")
    fails(options, ": empty (0 bytes)")
    victim.write_bytes(whole)
    fails([*options, "--seed", 5], "seed 0, but it is now 5")
    (folder / "train/cat/one_more.png").write_bytes(whole)
    fails(options, "started with other images")


@pytest.mark.parametrize("command", ["verify", "show"])
def test_not_a_shard_set(command: str, tmp_path: Path, run: Run) -> None:
    added = [] if command == "verify" else ["--out", tmp_path / "grid.png"]
    assert_one_sentence(run(command, tmp_path / "nothing", *added), "nothing does not exist")
    assert_one_sentence(run(command, tmp_path, *added), "has no shards.json")
    (tmp_path / "shards.json").write_text("{")
    assert_one_sentence(run(command, tmp_path, *added), "shards.json is not readable as JSON")
    (tmp_path / "shards.json").write_text("[]")
    assert_one_sentence(run(command, tmp_path, *added), "shards.json is not a manifest")


def test_a_damaged_set(shards: Path, run: Run) -> None:
    tar = shards / "valid-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:2000])
    assert_one_sentence(run("verify", shards), str(tar), "truncated")
    tar.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    assert_one_sentence(run("verify", shards), str(tar), "sha256")
    tar.write_bytes(whole)
    palette = np.load(shards / "palette.npy")
    np.save(shards / "palette.npy", -palette)
    assert_one_sentence(run("verify", shards), "palette.npy", "another set's palette")
    np.save(shards / "palette.npy", palette)
    manifest = json.loads((shards / "shards.json").read_text())
    del manifest["splits"]["test"]["shards"][0]["labels_offsets"]
    (shards / "shards.json").write_text(json.dumps(manifest))
    assert_one_sentence(run("verify", shards), "shards.json", "labels_offsets")


def test_show_options(shards: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "grid.png"
    assert_one_sentence(run("show", shards, "--split", "best", "--out", out), "no split 'best'", "train, valid, test")
    assert_one_sentence(run("show", shards, "--images", 0, "--out", out), "--images is 0")
    assert_one_sentence(run("show", shards), "out")
    assert not out.exists()


def test_palette_options(tmp_path: Path, shards: Path, options: list[str], run: Run) -> None:
    given = ["--palette.file", shards / "palette.npy"]
    assert_one_sentence(run("palette", *options, *given, "--out", tmp_path / "p.npy"), "palette.file", "remove")
    (tmp_path / "file").write_text("")
    assert_one_sentence(run("palette", *options, "--out", tmp_path / "file/p.npy"), str(tmp_path / "file"))


def test_no_such_command(run: Run) -> None:
    assert_one_sentence(run("shard"), "'shard' is not a command", "shards")
    assert_one_sentence(run("shards"), "required")
    assert_one_sentence(run("verify"), "required")
