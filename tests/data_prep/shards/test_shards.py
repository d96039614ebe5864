import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.palette.codec import palette_sha256
from data_prep.shards import reader
from data_prep.shards.format import VERSION, manifest_digest
from data_prep.shards.reader import open_shard_set
from tests.data_prep.small_data import write_shard

Record = tuple[np.ndarray, np.ndarray]


def records(*counts: int) -> list[Record]:
    random = np.random.default_rng(0)
    return [
        (random.integers(0, 16, (n, 64)).astype(np.uint16), random.integers(-1, 3, n).astype(np.int32)) for n in counts
    ]


@pytest.fixture
def handmade(tmp_path: Path) -> tuple[Path, list[list[Record]]]:
    """A shard set of two shards, 8x8, 16 colors, and the records in it."""
    content = [records(256, 256, 7), records(256, 1)]
    shards = [write_shard(tmp_path / f"train-{n:06d}.tar", part) for n, part in enumerate(content)]
    palette = np.linspace(-1, 1, 48, dtype=np.float32).reshape(16, 3)
    np.save(tmp_path / "palette.npy", palette)
    manifest = {
        "format": "image-gpt-shards",
        "version": VERSION,
        "source": {"name": "handmade", "kind": "none"},
        "resolution": 8,
        "classes": ["a", "b", "c"],
        "palette": {"file": "palette.npy", "colors": 16, "sha256": palette_sha256(palette)},
        "splits": {"train": {"images": 776, "shards": shards}},
    }
    (tmp_path / "shards.json").write_text(json.dumps(manifest))
    return tmp_path, content


def flat(content: list[list[Record]]) -> Record:
    every = [record for part in content for record in part]
    return np.concatenate([p for p, _ in every]), np.concatenate([n for _, n in every])


def test_webdataset_reads_the_same_in_one_line(handmade: tuple[Path, list[list[Record]]]) -> None:
    import webdataset as wds

    folder, content = handmade
    urls = sorted(str(file) for file in folder.glob("*.tar"))
    read = wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("pixels.npy", "labels.npy").unbatched()
    pixels, labels = zip(*read, strict=True)
    want_pixels, want_labels = flat(content)
    assert (np.stack(pixels) == want_pixels).all()
    assert (np.array(labels) == want_labels).all()
    assert pixels[0].dtype == np.uint16
    assert labels[0].dtype == np.int32


def test_records_and_gather(handmade: tuple[Path, list[list[Record]]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, content = handmade
    split = open_shard_set(folder).split("train")
    want_pixels, want_labels = flat(content)
    assert split.images == 776
    assert split.record_images.tolist() == [256, 256, 7, 256, 1]
    for index, (pixels, labels) in enumerate(record for part in content for record in part):
        assert (split.record(index)[0] == pixels).all()
        assert (split.record(index)[1] == labels).all()
    assert split.record(2)[0].dtype == np.uint16
    indices = np.array([775, 0, 255, 256, 519, 518, 0])
    pixels, labels = split.gather(indices)
    assert (pixels == want_pixels[indices]).all()
    assert (labels == want_labels[indices]).all()
    assert pixels.dtype == np.uint16
    assert labels.dtype == np.int32
    assert pixels.flags.writeable and labels.flags.writeable
    assert (split.gather_tokens(indices) == want_pixels[indices]).all()
    shuffled = np.random.default_rng(0).permutation(776)
    pixels, labels = split.gather(shuffled)
    assert (pixels == want_pixels[shuffled]).all() and (labels == want_labels[shuffled]).all()
    for at_once, of_a_record in ((100, 1), (100, 10**6), (10**6, 10**6)):  # slices; by record, and not
        monkeypatch.setattr(reader, "GATHERED_AT_ONCE", at_once)
        monkeypatch.setattr(reader, "IMAGES_OF_A_RECORD", of_a_record)
        pixels, labels = split.gather(shuffled)
        assert (pixels == want_pixels[shuffled]).all() and (labels == want_labels[shuffled]).all()
    pixels, labels = split.gather(np.array([], np.int64))
    assert pixels.shape == (0, split.positions) and labels.shape == (0,)


@pytest.mark.parametrize("index", [-1, 776])
def test_an_index_out_of_range(index: int, handmade: tuple[Path, list[list[Record]]]) -> None:
    with pytest.raises(IndexError):
        open_shard_set(handmade[0]).split("train").gather(np.array([index]))


def test_a_split_can_be_pickled(handmade: tuple[Path, list[list[Record]]]) -> None:
    import pickle

    split = open_shard_set(handmade[0]).split("train")
    split.record(0)
    again = pickle.loads(pickle.dumps(split))
    assert (again.gather(np.array([3]))[0] == split.gather(np.array([3]))[0]).all()


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    entries = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        entries.append(write_shard(tmp_path / name / "train-000000.tar", records(256, 3)))
    assert entries[0] == entries[1]
    assert (tmp_path / "a/train-000000.tar").read_bytes() == (tmp_path / "b/train-000000.tar").read_bytes()


def test_tars_are_plain(handmade: tuple[Path, list[list[Record]]]) -> None:
    """Nothing depends on machine or time. There are no extended headers; a float mtime would add one per member."""
    with tarfile.open(handmade[0] / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members][:2] == ["train-000000-000.pixels.npy", "train-000000-000.labels.npy"]
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        assert member.pax_headers == {}
        assert member.offset_data - member.offset == 512


def test_the_digest_depends_on_the_contents(handmade: tuple[Path, list[list[Record]]]) -> None:
    shard_set = open_shard_set(handmade[0])
    reordered = dict(reversed(list(shard_set.manifest.items())))
    assert manifest_digest(reordered) == shard_set.digest
    assert manifest_digest(reordered | {"resolution": 9}) != shard_set.digest


def test_an_intact_set_verifies(handmade: tuple[Path, list[list[Record]]]) -> None:
    seen: list[int] = []
    open_shard_set(handmade[0]).verify(advance=seen.append)
    assert seen == [519, 257]


def change_manifest(folder: Path, change: Callable[[Any], object]) -> None:
    manifest = json.loads((folder / "shards.json").read_text())
    change(manifest)
    (folder / "shards.json").write_text(json.dumps(manifest))


def flip_byte(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def adopt(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the first shard's entry, and updates its digest, as if the manifest had been written so."""

    def apply(manifest: Any) -> None:
        train = manifest["splits"]["train"]
        shard = train["shards"][0]
        content = (folder / shard["file"]).read_bytes()
        shard |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        change(shard)
        train["images"] = sum(one["images"] for one in train["shards"])

    change_manifest(folder, apply)


def drop_last_record(shard: dict[str, Any]) -> None:
    for key in ("record_images", "pixels_offsets", "labels_offsets", "record_crc32"):
        shard[key].pop()
    shard["images"] = sum(shard["record_images"])


def test_opening_checks_presence_and_sizes(handmade: tuple[Path, list[list[Record]]]) -> None:
    folder, _ = handmade
    shard = folder / "train-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    with pytest.raises(ValueError, match=r"train-000001\.tar has .* bytes"):
        open_shard_set(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-000001\.tar is missing"):
        open_shard_set(folder)
    shard.write_bytes(content)
    np.save(folder / "palette.npy", np.zeros((16, 3), np.float32))
    with pytest.raises(ValueError, match=r"palette\.npy has sha256 .*, but shards.json has"):
        open_shard_set(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("splits"),
        lambda manifest: manifest.pop("classes"),
        lambda manifest: manifest["splits"]["train"]["shards"][0].pop("sha256"),
        lambda manifest: manifest["splits"]["train"].update(images=5),
        lambda manifest: manifest.update(version=99),
        lambda manifest: manifest.update(format="else"),
        lambda manifest: manifest.update(palette=None),
    ],
)
def test_a_manifest_that_was_changed(
    handmade: tuple[Path, list[list[Record]]], change: Callable[[Any], object]
) -> None:
    folder, _ = handmade
    change_manifest(folder, change)
    with pytest.raises(ValueError, match=r"shards\.json"):
        open_shard_set(folder).verify()


def test_a_missing_split(handmade: tuple[Path, list[list[Record]]]) -> None:
    with pytest.raises(ValueError, match="no split 'valid'; it has train"):
        open_shard_set(handmade[0]).split("valid")


@pytest.mark.parametrize("position", [0, 600, 5000, 70_000])
def test_verify_finds_a_flipped_byte(handmade: tuple[Path, list[list[Record]]], position: int) -> None:
    folder, _ = handmade
    flip_byte(folder / "train-000001.tar", position % (folder / "train-000001.tar").stat().st_size)
    shard_set = open_shard_set(folder)
    with pytest.raises(ValueError, match=r"train-000001\.tar does not have the sha256"):
        shard_set.verify(["train"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shard: shard["pixels_offsets"].__setitem__(1, 5), "record 1 is not at the offset"),
        (lambda shard: shard["labels_offsets"].__setitem__(0, 5), "record 0 is not at the offset"),
        (lambda shard: shard.update(record_images=[255, 257, 7]), r"record 0 contains uint16 \(256, 64\)"),
        (lambda shard: drop_last_record(shard), "more records"),
    ],
)
def test_verify_compares_the_manifest_with_the_tar(
    handmade: tuple[Path, list[list[Record]]], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder, _ = handmade
    adopt(folder, change)
    with pytest.raises(ValueError, match=message):
        open_shard_set(folder).verify()


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (np.full((256, 64), 16), np.zeros(256), "token 16, but the palette has 16 colors"),
        (np.zeros((256, 64)), np.full(256, 3), "label outside -1 to 2"),
        (np.zeros((256, 64)), np.full(256, -2), "label outside -1 to 2"),
    ],
)
def test_verify_checks_ranges(
    handmade: tuple[Path, list[list[Record]]], pixels: np.ndarray, labels: np.ndarray, message: str
) -> None:
    folder, content = handmade
    changed = [(pixels.astype(np.uint16), labels.astype(np.int32)), *content[0][1:]]
    write_shard(folder / "train-000000.tar", changed)
    adopt(folder, lambda shard: None)
    with pytest.raises(ValueError, match=message):
        open_shard_set(folder).verify()
