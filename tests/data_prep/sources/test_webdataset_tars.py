"""Tars of images in the layouts of img2dataset and webdataset, against tarfile and webdataset themselves."""

import gzip
import json
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from data_prep.config import SourceConfig
from data_prep.images.decode import BadImage, Decoder
from data_prep.shards import remote
from data_prep.shards.reader import open_shard_set
from data_prep.sources.base import Encoded, Source
from data_prep.sources.open import open_source
from data_prep.sources.webdataset_tars import key_and_extension
from tests.data_prep.small_data import CLASSES
from tests.data_prep.tar_files import encode_image, tar_bytes
from tests.http_server import serve

Small = tuple[np.ndarray, np.ndarray]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def opened(path: object, **options: Any) -> Source:
    return open_source(SourceConfig(kind="webdataset", path=str(path), **options))


def items(source: Source, split: str = "train") -> list[Encoded | BadImage]:
    return [item for stream in source.streams[split] for item in stream]


def images(source: Source, split: str = "train") -> list[Encoded]:
    found = items(source, split)
    assert not [item for item in found if isinstance(item, BadImage)]
    return found  # type: ignore[return-value]


def contents(found: Iterable[Encoded]) -> list[tuple[bytes, int]]:
    return [(item.content, item.label) for item in found]


@pytest.fixture
def img2dataset(tmp_path: Path, small: Small) -> Path:
    """What img2dataset writes: 3 tars of 20 images, jpg, json and txt of each, and beside each tar its table and
    statistics."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "laion"
    folder.mkdir()
    for tar in range(3):
        rows = []
        with wds.TarWriter(str(folder / f"{tar:05d}.tar")) as writer:
            for index in range(20 * tar, 20 * (tar + 1)):
                row = {"url": f"https://host/{index}.jpg", "key": f"{tar:05d}{index % 20:04d}", "status": "success"}
                row |= {"caption": CLASSES[small[1][index]], "width": 32, "class": int(small[1][index])}
                image = encode_image(small[0][index], "jpeg")
                writer.write({"__key__": row["key"], "jpg": image, "json": row, "txt": row["caption"]})
                rows.append(row)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{tar:05d}.parquet")
        (folder / f"{tar:05d}_stats.json").write_text(json.dumps({"count": 20, "successes": 20}))
    return folder


def write_classes(path: Path, small: Small, part: slice, kind: str = "png") -> None:
    """A tar as in webdataset's own examples: an image and a .cls for each key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path)) as writer:
        for index in range(60)[part]:
            image = encode_image(small[0][index], {"jfif": "jpeg", "jp2": "jpeg2000"}.get(kind, kind))
            writer.write({"__key__": f"sample{index:06d}", kind: image, "cls": int(small[1][index])})


def by_tarfile(path: Path) -> list[tuple[str, bytes, int | None]]:
    """Name, bytes and class (from the .json) of each image of a complete tar, in order."""
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return [
        (name, content, json.loads(files[name.replace(".jpg", ".json")])["class"])
        for name, content in files.items()
        if name.endswith(".jpg")
    ]


def test_img2dataset_against_tarfile_and_webdataset(img2dataset: Path, small: Small) -> None:
    source = opened(img2dataset, label_column="class")
    found = images(source)
    paths = sorted(img2dataset.glob("*.tar"))
    expected = [(f"{name} in {path}", content, label) for path in paths for name, content, label in by_tarfile(path)]
    assert [(item.name, item.content, item.label) for item in found] == expected
    samples = list(wds.WebDataset([str(path) for path in paths], shardshuffle=False))
    assert contents(found) == [(sample["jpg"], json.loads(sample["json"])["class"]) for sample in samples]
    assert [item.label for item in found] == small[1].tolist()
    assert [stream.name for stream in source.streams["train"]] == [str(path) for path in paths]
    assert (source.name, source.classes, source.splits) == ("laion", [], {})
    assert source.facts == {"tars": {"train": 3}, "label": "'class' of the .json"}


def test_without_a_label_column_its_images_are_unlabelled(img2dataset: Path) -> None:
    assert [item.label for item in images(opened(img2dataset))] == [-1] * 60


@pytest.mark.parametrize("kind", ["png", "webp", "bmp", "ppm", "gif", "tiff", "avif", "jfif", "jp2"])
def test_classes_of_webdataset(tmp_path: Path, small: Small, kind: str) -> None:
    write_classes(tmp_path / "set/000000.tar", small, slice(0, 12), kind)
    found = images(opened(tmp_path / "set"))
    decoded = wds.WebDataset(str(tmp_path / "set/000000.tar"), shardshuffle=False).decode().to_tuple("cls")
    assert [item.label for item in found] == [label for (label,) in decoded] == small[1][:12].tolist()
    if kind in ("png", "bmp", "ppm", "tiff"):
        assert all((Decoder()(item.content, "") == small[0][n]).all() for n, item in enumerate(found))


def test_folders_of_splits(tmp_path: Path, small: Small) -> None:
    write_classes(tmp_path / "set/train/000000.tar", small, slice(0, 20))
    write_classes(tmp_path / "set/train/000001.tar", small, slice(20, 40))
    write_classes(tmp_path / "set/val/000000.tar", small, slice(40, 50))
    write_classes(tmp_path / "set/test/000000.tar", small, slice(50, 60))
    source = opened(tmp_path / "set")
    labels = {split: [item.label for item in images(source, split)] for split in source.streams}
    expected = {"train": slice(0, 40), "valid": slice(40, 50), "test": slice(50, 60)}
    assert labels == {split: small[1][part].tolist() for split, part in expected.items()}


def test_tars_of_a_shard_follow_each_other(img2dataset: Path) -> None:
    source = opened(img2dataset, tars_per_shard=2)
    a, b, c = sorted(map(str, img2dataset.glob("*.tar")))
    assert [stream.name for stream in source.streams["train"]] == [f"{a} to {b}", c]
    assert contents(images(source)) == contents(images(opened(img2dataset)))


def test_a_damaged_tar_does_not_hide_the_next_of_its_shard(img2dataset: Path) -> None:
    (img2dataset / "00000.tar").write_bytes((img2dataset / "00000.tar").read_bytes()[:5000])
    found = items(opened(img2dataset, tars_per_shard=3))
    assert [item.reason for item in found if isinstance(item, BadImage)] == ["damaged tar"]
    assert found[-40:] == images(opened(img2dataset / "{00001,00002}.tar"))


def test_every_kind_of_url_reads_the_same(img2dataset: Path) -> None:
    expected = contents(images(opened(img2dataset, label_column="class")))
    with serve(img2dataset) as server:
        for path in (
            f"{img2dataset}/{{00000..00002}}.tar",
            f"pipe:cat {img2dataset}/{{00000..00002}}.tar",
            f"{server.url}/{{00000..00002}}.tar",
            f"file://{img2dataset}/{{00000..00002}}.tar",
        ):
            source = opened(path, label_column="class")
            assert not server.requests  # opening a source asks nothing of a server
            assert contents(images(source)) == expected, path
            server.requests.clear()


def test_a_single_tar(img2dataset: Path) -> None:
    assert len(images(opened(img2dataset / "00001.tar"))) == 20


def test_names_of_remote_sources() -> None:
    for path in ("s3://b/laion/{0..9}.tar", "pipe:aws s3 cp s3://b/laion/{0..9}.tar -", "https://h/laion/0.tar"):
        assert opened(path).name == "laion"
    assert len(opened("s3://bucket/{00000..00099}.tar", tars_per_shard=8).streams["train"]) == 13


def test_dropped_connections_lose_no_image(img2dataset: Path) -> None:
    expected = contents(images(opened(img2dataset)))
    for seed in range(3):
        with serve(img2dataset, drop=0.7, seed=seed) as server:
            assert contents(images(opened(f"{server.url}/{{00000..00002}}.tar"))) == expected
        assert server.dropped


def test_a_compressed_tar_over_broken_connections(img2dataset: Path) -> None:
    expected = contents(images(opened(img2dataset / "00000.tar")))
    (img2dataset / "odd.tar").write_bytes(gzip.compress((img2dataset / "00000.tar").read_bytes()))
    with serve(img2dataset, drop=0.6, busy=0.2, seed=3) as server:
        assert contents(images(opened(f"{server.url}/odd.tar"))) == expected
        assert server.dropped


def test_a_network_failure_is_not_a_damaged_tar(img2dataset: Path) -> None:
    with serve(img2dataset, busy=1.0) as server, pytest.raises(OSError, match=r"00000\.tar can't be reached"):
        items(opened(f"{server.url}/00000.tar"))
    for end in ("; exit 3", " | gunzip"):  # a failing command, one that can't read its input
        with pytest.raises(OSError, match=r"6 attempts failed: .* exit code"):
            items(opened(f"pipe:head -c 20000 {img2dataset}/00000.tar{end}"))


@pytest.mark.parametrize("name", ["a/b.jpg", "./b.jpg", "../b.jpg", "/x/b.c.jpg", "a.b/c.jpg", "b", ".jpg"])
def test_keys_are_those_of_webdataset(name: str) -> None:
    from webdataset.tariterators import base_plus_ext

    key, extension = key_and_extension(tarfile.TarInfo(name))
    assert (key, extension or None) == base_plus_ext(name)


def items_of(folder: Path, *members: tuple[str, bytes], **options: Any) -> list[Encoded | BadImage]:
    path = folder / "one.tar"
    path.write_bytes(tar_bytes(members))
    return items(opened(path, **options))


def read_members(folder: Path, *members: tuple[str, bytes], **options: Any) -> list[tuple[str, Any]]:
    """(bytes, label) of each image and (reason, detail) of each skip."""
    return [
        (item.reason, item.detail) if isinstance(item, BadImage) else (item.content.decode(), item.label)
        for item in items_of(folder, *members, **options)
    ]


def test_the_order_within_a_key_does_not_matter(tmp_path: Path) -> None:
    assert read_members(
        tmp_path,
        *(("a.cls", b"1"), ("a.txt", b"x"), ("a.jpg", b"A")),
        *(("b.JPG", b"B"), ("b.cls", b"2\n"), ("b.txt", b"x")),
        *(("d/a.txt", b"x"), ("d/a.jpg", b"C"), ("d/a.CLS", b" 3 ")),
        *(("__meta__/a.jpg", b"no picture"), ("d/._a.jpg", b"of a Mac"), ("d/b.jpg", b"D")),
    ) == [("A", 1), ("B", 2), ("C", 3), ("D", -1)]


def test_of_several_images_with_one_key_the_photograph_is_used(tmp_path: Path) -> None:
    members = [("a.png", b"mask"), ("a.jpg", b"A"), ("b.jpg", b"B"), ("b.png", b"mask"), ("b.seg.jpg", b"mask")]
    assert read_members(tmp_path, *members) == [("A", -1), ("B", -1)]


def test_a_repeated_key_is_another_image(tmp_path: Path) -> None:
    members = [("a.jpg", b"A"), ("b.jpg", b"B"), ("a.jpg", b"C"), ("a.cls", b"1"), ("a.jpg", b"D"), ("a.cls", b"2")]
    assert read_members(tmp_path, *members) == [("A", -1), ("B", -1), ("C", 1), ("D", 2)]


def test_keys_without_an_image_are_counted(tmp_path: Path) -> None:
    members = [("a.json", b"{}"), ("a.txt", b""), ("b.jpg", b"B"), ("c.v2.jpg", b"C")]
    assert read_members(tmp_path, *members) == [
        ("not a picture", "it has .json, .txt, but no .jpg, .png or the like"),
        ("B", -1),
        ("not a picture", "its name has several dots, and the key ends at the first; rename it"),
    ]


def test_each_image_with_dots_in_its_name_is_counted(tmp_path: Path) -> None:
    """www.site_0.jpg and www.site_1.jpg have one key, www."""
    members = [(f"www.site_{n}.{end}", b"1") for n in range(5) for end in ("jpg", "cls")]
    found = items_of(tmp_path, *members, ("a.jpg", b"A"))
    assert [item.name.partition(" in ")[0] for item in found] == [*(f"www.site_{n}.jpg" for n in range(5)), "a.jpg"]
    assert {item.detail for item in found if isinstance(item, BadImage)} == {
        "its name has several dots, and the key ends at the first; rename it"
    }


def test_a_class_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert read_members(tmp_path, ("a.jpg", b"A"), ("a.cls", b"\xef\xbb\xbf3\r\n")) == [("A", 3)]


@pytest.mark.parametrize("text", ["cat", "-1", "1.0", "", "1 2", "\xff", "1" * 5000, "1000000", "1_0", "٣"])
def test_an_invalid_class(tmp_path: Path, text: str) -> None:
    found = read_members(tmp_path, ("a.jpg", b"A"), ("a.cls", text.encode("utf-8")), ("b.jpg", b"B"), ("b.cls", b"0"))
    assert (found[0][0], found[1]) == ("damaged", ("B", 0))
    assert "its label is" in found[0][1] and len(found[0][1]) < 120


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ('{"n": 1}', "has no field 'c'"),
        ('{"c": null}', "label is None"),
        ('{"c": true}', "label is True"),
        ('{"c": 1.5}', "label is 1.5"),
        ('{"c": [1]}', "label is [1]"),
        ('{"c": 1700000000}', "label is 1700000000 in the field 'c', not an integer from 0 to 999,999"),
        ("[1]", "has no field 'c'"),
        ('{"c": ', "can't be read"),
        ("[" * 100_000, "can't be read"),
        (None, "no .json"),
    ],
)
def test_a_json_without_its_class(tmp_path: Path, text: str | None, detail: str) -> None:
    members = [("a.jpg", b"A"), ("a.cls", b"1")] + ([("a.json", text.encode())] if text is not None else [])
    found = read_members(tmp_path, *members, ("b.json", b'{"c": "7"}'), ("b.jpg", b"B"), label_column="c")
    assert found[0][0] == "damaged" and detail in found[0][1]
    assert found[1:] == [("B", 7)]


def test_memory_holds_one_image(tmp_path: Path) -> None:
    """100 images of 100 kB, each with 1 MB of something else, and 20,000 small members."""
    random = np.random.default_rng(0).bytes(100_000)
    large = [(f"{n:04d}.{end}", random * size) for n in range(100) for end, size in (("jpg", 1), ("npy", 10))]
    (tmp_path / "a.tar").write_bytes(tar_bytes([*large, *((f"x{n}.jpg", b"x") for n in range(20_000))]))
    source = opened(tmp_path / "a.tar")
    tracemalloc.start()
    count = sum(1 for _ in source.streams["train"][0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_100
    assert peak < 2_000_000, peak


def test_the_fingerprint_depends_on_names_and_sizes(img2dataset: Path) -> None:
    before = opened(img2dataset).fingerprint
    assert opened(img2dataset / "{00000..00002}.tar").fingerprint == before
    (img2dataset / "00002.tar").write_bytes((img2dataset / "00002.tar").read_bytes() + bytes(512))
    larger = opened(img2dataset).fingerprint
    (img2dataset / "00002.tar").rename(img2dataset / "00003.tar")
    assert len({before, larger, opened(img2dataset).fingerprint}) == 3
    assert opened("s3://b/{0..2}.tar").fingerprint != opened("s3://b/{0..3}.tar").fingerprint


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{folder}/nope", r"source.path [^:]*/nope does not exist; it must be a folder of tars"),
        ("{folder}/{{00000..00003}}.tar", r"/00003\.tar does not exist"),
        ("{folder}/{{00000..00003.tar", r"has unbalanced braces"),
        ("{folder}/empty", r"empty has no tars"),
        ("s3://bucket/laion/", r"s3://bucket/laion/ is a folder; remote tars must be listed with braces"),
    ],
)
def test_a_wrong_path_is_named(img2dataset: Path, path: str, message: str) -> None:
    (img2dataset / "empty").mkdir()
    (img2dataset / "empty/.hidden.tar").touch()
    with pytest.raises(ValueError, match=message):
        opened(path.format(folder=img2dataset))


def test_tars_of_several_splits_in_one_folder_are_an_error(tmp_path: Path, small: Small) -> None:
    for name in ("imagenet-train-000000.tar", "imagenet-val-000000.tar"):
        write_classes(tmp_path / name, small, slice(0, 2))
    with pytest.raises(ValueError, match=r"has tars of train and val in one folder"):
        opened(tmp_path)
    assert len(images(opened(tmp_path / "imagenet-train-{000000..000000}.tar"))) == 2


def test_a_source_needs_a_training_split(tmp_path: Path, small: Small) -> None:
    write_classes(tmp_path / "val/000000.tar", small, slice(0, 2))
    with pytest.raises(ValueError, match=r"has a folder valid/ but no train/"):
        opened(tmp_path)


def test_a_missing_remote_tar_is_named(img2dataset: Path) -> None:
    with serve(img2dataset) as server, pytest.raises(ValueError, match=r"/00003\.tar can't be read: HTTP 404"):
        items(opened(f"{server.url}/{{00002..00003}}.tar"))


# --- through the command line


def test_a_shard_set_of_tars(img2dataset: Path, tmp_path: Path, small: Small, run: Callable[..., Any]) -> None:
    options = ["--source.kind", "webdataset", "--source.path", img2dataset, "--source.label_column", "class"]
    options += ["--resolution", "8", "--palette.colors", "16", "--valid_fraction", "0.25", "--workers", "2"]
    result = run("shards", *options, "--out", tmp_path / "shards")
    assert result.code == 0, result.err
    shards = open_shard_set(tmp_path / "shards")
    labels = {split: shards.split(split).gather(np.arange(shards.split(split).images))[1] for split in shards.splits}
    assert set(labels) == {"train", "valid"}
    assert Counter(np.concatenate(list(labels.values())).tolist()) == Counter(small[1].tolist())
    assert shards.classes == ["0", "1", "2"]


def test_skips_of_tars_are_counted(img2dataset: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    whole = (img2dataset / "00001.tar").read_bytes()
    (img2dataset / "00001.tar").write_bytes(whole[: len(whole) // 2])
    kept = sum(isinstance(item, Encoded) for item in items(opened(img2dataset)))
    options = ["--source.kind", "webdataset", "--source.path", img2dataset, "--valid_fraction", "0"]
    options += ["--resolution", "8", "--palette.colors", "16", "--workers", "1"]
    refused = run("shards", *options, "--out", tmp_path / "no")
    assert refused.code == 2 and "1 of 3 tars can't be used" in refused.err and "00001.tar at byte" in refused.err
    assert run("shards", *options, "--max_skipped", "0.5", "--out", tmp_path / "yes").code == 0
    assert open_shard_set(tmp_path / "yes").split("train").images == kept
    skips = [json.loads(line) for line in (tmp_path / "yes/skipped.jsonl").read_text().splitlines()]
    assert [skip["reason"] for skip in skips] == ["damaged tar"]


def test_an_unreachable_server_ends_the_command(tmp_path: Path, img2dataset: Path, run: Callable[..., Any]) -> None:
    options = ["--source.kind", "webdataset", "--resolution", "8", "--palette.colors", "16", "--workers", "1"]
    with serve(img2dataset, drop=0.5, seed=1) as server:
        good = [*options, "--source.path", f"{server.url}/{{00000..00002}}.tar", "--out", tmp_path / "shards"]
        assert run("shards", *good).code == 0
        assert server.dropped
    with serve(img2dataset, busy=1.0) as server:
        result = run("shards", *options, "--source.path", f"{server.url}/00000.tar", "--out", tmp_path / "other")
    assert result.code == 2
    assert "00000.tar can't be reached or read, 6 attempts failed" in result.err
    warning, error = result.err.splitlines()
    assert "WARNING" in warning and error.startswith("error: ")
