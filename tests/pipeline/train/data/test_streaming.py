"""Streaming: each rank has its batches, each image is read once an epoch, nothing hangs, damage is found."""

import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from data_prep.palette.codec import palette_sha256
from data_prep.shards import remote
from data_prep.shards.format import VERSION
from data_prep.shards.reader import Split, open_shard_set
from pipeline.model.augmentation import Augmentation
from pipeline.train.data import batches, stream_order, streaming
from pipeline.train.data.batches import ImageOrder
from pipeline.train.data.stream_order import StreamOrder
from pipeline.train.data.streaming import StreamedBatches
from tests.data_prep.small_data import write_shard
from tests.http_server import Server, serve

RESOLUTION = 4
FLIP_AND_CROP = Augmentation(flip=True, reflect_crop=2)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of three records, and no long pauses between attempts."""
    for module in (batches, stream_order, streaming):
        monkeypatch.setattr(module, "WINDOW_RECORDS", 3)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)


def write_set(folder: Path, shards: int) -> Path:
    """A set whose image i starts with the token i; shards of up to five records of up to 14 images."""
    folder.mkdir()
    random = np.random.default_rng(shards)
    entries, images = [], 0
    for number in range(shards):
        records = []
        for count in random.integers(1, 15, random.integers(2, 6)).tolist():
            tokens = random.integers(0, 512, (count, RESOLUTION**2)).astype(np.uint16)
            tokens[:, 0] = np.arange(images, images + count)
            records.append((tokens, np.zeros(count, np.int32)))
            images += count
        entries.append(write_shard(folder / f"train-{number:06d}.tar", records))
    palette = np.zeros((512, 3), np.float32)
    np.save(folder / "palette.npy", palette)
    manifest = {
        "format": "image-gpt-shards",
        "version": VERSION,
        "source": {"name": "numbered"},
        "resolution": RESOLUTION,
        "classes": ["a"],
        "palette": {"colors": 512, "sha256": palette_sha256(palette)},
        "splits": {"train": {"images": images, "shards": entries}},
    }
    (folder / "shards.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets named 1 to 7 by their number of shards."""
    folder = tmp_path_factory.mktemp("sets")
    for shards in range(1, 8):
        write_set(folder / str(shards), shards)
    return folder


@pytest.fixture(scope="module")
def server(sets: Path) -> Iterator[Server]:
    with serve(sets) as server:
        yield server


def order_of(split: Split, ranks: int, augmentation: Augmentation | None = None, seed: int = 0) -> StreamOrder:
    return StreamOrder([shard["record_images"] for shard in split.shards], seed, ranks, augmentation)


@contextmanager
def reader(
    split: Split, rank: int, ranks: int, augmentation: Augmentation | None = None
) -> Iterator[Callable[[int, int], np.ndarray]]:
    """The tokens of one rank's StreamedBatches.at; they must match its order."""
    order = order_of(split, ranks, augmentation)
    streamed = StreamedBatches(split, RESOLUTION, order, rank)
    yield lambda position, global_size: streamed.at(position, global_size).tokens
    streamed.close()


def expected(split: Split, order: StreamOrder, rank: int, position: int, global_size: int) -> np.ndarray:
    """What a rank must read, by the index of the same set on disk."""
    ranks = order.ranks
    indices, changes = order.at(rank, position // ranks, global_size // ranks)
    return order.augmentation.apply(split.gather(indices)[0], changes, RESOLUTION)


def check_epochs(address: str, local: Path, ranks: int, epochs: int = 2) -> None:
    """Every rank reads through some epochs in batches of two: each image once an epoch, in the given order."""
    split, on_disk = open_shard_set(address).split("train"), open_shard_set(local).split("train")
    share = -(-split.images // ranks)
    steps = -(-share * epochs // 2)
    by_rank = []
    for rank in range(ranks):
        order = order_of(split, ranks)
        with reader(split, rank, ranks) as at:
            read = [at(2 * ranks * step, 2 * ranks) for step in range(steps)]
        assert {len(batch) for batch in read} == {2}
        tokens = np.concatenate(read)
        assert np.array_equal(
            tokens,
            np.concatenate([expected(on_disk, order, rank, 2 * ranks * step, 2 * ranks) for step in range(steps)]),
        )
        by_rank.append(tokens[:, 0])
    sizes = [(rank + 1) * split.images // ranks - rank * split.images // ranks for rank in range(ranks)]
    for epoch in range(epochs):
        seen = [read[size * epoch : size * (epoch + 1)] for read, size in zip(by_rank, sizes, strict=True)]
        assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(split.images))


@pytest.mark.parametrize("shards", range(1, 8))
def test_each_picture_once_an_epoch_over_http(shards: int, sets: Path, server: Server) -> None:
    for ranks in range(1, 9):
        check_epochs(f"{server.url}/{shards}", sets / str(shards), ranks)


@pytest.mark.parametrize(("shards", "ranks"), [(1, 8), (2, 3), (3, 1), (5, 7), (7, 4)])
def test_each_picture_once_an_epoch_over_a_pipe(shards: int, ranks: int, sets: Path) -> None:
    check_epochs(f"pipe:cat {sets / str(shards)}/{{}}", sets / str(shards), ranks)


def read_as_rank(address: str, rank: int, ranks: int, steps: int, results: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    with reader(open_shard_set(address).split("train"), rank, ranks, FLIP_AND_CROP) as at:
        results.put((rank, [at(4 * ranks * step, 4 * ranks) for step in range(steps)]))


@pytest.mark.parametrize(("shards", "ranks"), [(3, 8), (7, 5)])
def test_ranks_in_processes_survive_a_server_that_drops_connections(shards: int, ranks: int, sets: Path) -> None:
    import webdataset  # noqa: F401  (once, before the processes part)

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    on_disk = open_shard_set(sets / str(shards)).split("train")
    steps = 3 * on_disk.images // (4 * ranks)
    with serve(sets / str(shards), drop=0.3, busy=0.1, short=0.1) as server:
        for rank in range(ranks):
            context.Process(target=read_as_rank, args=(server.url, rank, ranks, steps, results), daemon=True).start()
        read = dict(results.get(timeout=60) for _ in range(ranks))
        assert server.dropped > 5
    order = order_of(on_disk, ranks, FLIP_AND_CROP)
    for rank, found in read.items():
        for step, tokens in enumerate(found):
            assert np.array_equal(tokens, expected(on_disk, order, rank, 4 * ranks * step, 4 * ranks))


def test_every_position_can_be_resumed(sets: Path, server: Server) -> None:
    split = open_shard_set(f"{server.url}/5").split("train")
    with reader(split, 1, 3, FLIP_AND_CROP) as at:
        unbroken = [at(6 * step, 6) for step in range(split.images // 3)]
    for step in range(0, len(unbroken), 5):
        with reader(split, 1, 3, FLIP_AND_CROP) as at:
            for later in range(step, min(step + 3, len(unbroken))):
                assert np.array_equal(at(6 * later, 6), unbroken[later])


def test_jumps_and_other_batch_sizes_give_the_same_images(server: Server) -> None:
    split = open_shard_set(f"{server.url}/4").split("train")
    with reader(split, 0, 2, FLIP_AND_CROP) as at:
        complete = at(0, 2 * split.images)
        for position, size in [(4, 8), (2, 4), (2 * split.images - 20, 16), (0, 2), (6, 60)]:
            assert np.array_equal(at(position, size), complete[position // 2 : (position + size) // 2])


def test_the_order_is_new_in_each_epoch_and_of_its_seed(server: Server) -> None:
    split = open_shard_set(f"{server.url}/7").split("train")
    first, again = order_of(split, 1).at(0, 0, split.images)[0], order_of(split, 1).at(0, split.images, split.images)[0]
    other = order_of(split, 1, seed=1).at(0, 0, split.images)[0]
    for one, two in ((first, again), (first, other)):
        assert np.array_equal(np.sort(one), np.sort(two))
        assert (one == two).mean() < 0.2
    assert not np.array_equal(first, np.sort(first))


def test_a_rank_asks_for_no_more_than_its_part(sets: Path) -> None:
    """A rank that starts in mid-shard begins there; it opens each of its shards once an epoch."""
    with serve(sets / "7") as server:
        split = open_shard_set(server.url).split("train")
        order = order_of(split, 3)
        own = order.part(1, 0).records
        shards = np.searchsorted(split.shard_starts, own, side="right") - 1
        first = int(own[0] - split.shard_starts[shards[0]])
        assert first > 0
        server.requests.clear()
        with reader(split, 1, 3) as at:
            at(0, 3)
            at(3 * (order.part(1, 0).images - 1), 3)
            wait_for(lambda: len({path for path, _ in server.requests}) >= len(np.unique(shards)))
    header = split.shards[shards[0]]["pixels_offsets"][first] - 512 - 128
    path = f"/{split.shards[shards[0]]['file']}"
    assert server.requests[0] == (path, f"bytes={header}-")


def wait_for(reached: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_the_next_window_is_read_while_the_current_one_is_used_and_no_further(sets: Path) -> None:
    with serve(sets / "7") as server:
        split = open_shard_set(server.url).split("train")
        with reader(split, 0, 1) as at:
            at(0, 1)
            order = order_of(split, 1)
            windows = [set(order.part(0, 0).window(number).records) for number in range(3)]
            files = [
                {f"/{split.shards[np.searchsorted(split.shard_starts, r, side='right') - 1]['file']}" for r in window}
                for window in windows
            ]
            wait_for(lambda: files[0] | files[1] <= {path for path, _ in server.requests})
            time.sleep(0.1)
            asked = {path for path, _ in server.requests if path.endswith(".tar")}
        assert asked <= files[0] | files[1]


def corrupt(folder: Path, shard: int, record: int, within: str = "pixels_offsets") -> None:
    manifest = json.loads((folder / "shards.json").read_text())
    entry = manifest["splits"]["train"]["shards"][shard]
    tar = folder / entry["file"]
    content = bytearray(tar.read_bytes())
    content[entry[within][record] + 1] ^= 4
    tar.write_bytes(content)


@pytest.mark.parametrize("within", ["pixels_offsets", "labels_offsets", "header"])
def test_damage_is_named_by_shard_and_record(within: str, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 3)
    if within == "header":
        manifest = json.loads((folder / "shards.json").read_text())
        entry = manifest["splits"]["train"]["shards"][1]
        tar = folder / entry["file"]
        content = bytearray(tar.read_bytes())
        content[entry["pixels_offsets"][1] - 128 - 512 + 5] ^= 4
        tar.write_bytes(content)
    else:
        corrupt(folder, 1, 1, within)
    with serve(folder) as server:
        split = open_shard_set(server.url).split("train")
        with (
            reader(split, 0, 1) as at,
            pytest.raises(ValueError, match=rf"{server.url}/train-000001\.tar, record 1, is damaged"),
        ):
            for step in range(split.images):
                at(step, 1)
        assert sum(path.endswith("train-000001.tar") for path, _ in server.requests) >= 2


def test_damage_on_the_way_is_mended_by_fetching_again(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record arrives damaged the first time."""
    seen: set[int] = set()
    check = streaming.record_crc32

    def damaged_once(tokens: np.ndarray, labels: np.ndarray) -> int:
        first = int(tokens[0])
        if first in seen:
            return check(tokens, labels)
        seen.add(first)
        return -1

    monkeypatch.setattr(streaming, "record_crc32", damaged_once)
    check_epochs(f"pipe:cat {sets / '2'}/{{}}", sets / "2", ranks=2, epochs=1)


def test_a_file_that_is_gone_is_named_where_the_batch_is_asked_for(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 2)
    with serve(folder) as server:
        split = open_shard_set(server.url).split("train")
        (folder / "train-000001.tar").unlink()
        with reader(split, 0, 1) as at, pytest.raises(ValueError, match=r"train-000001\.tar can't be read") as caught:
            for step in range(split.images):
                at(step, 1)
        assert "BufferedReader" not in str(caught.value)


def test_a_server_that_stays_away_is_an_error_of_the_batch(sets: Path) -> None:
    on_disk = open_shard_set(sets / "7").split("train")
    with serve(sets / "7", busy=1.0) as server:
        split = Split("train", sets, on_disk.shards, on_disk.positions, server.url)
        with (
            reader(split, 0, 1) as at,
            pytest.raises(OSError, match=rf"{server.url}/.* broke off at byte \d+") as caught,
        ):
            at(0, split.images)
        assert "BufferedReader" not in str(caught.value)


def fails(streamed: StreamedBatches) -> None:
    with pytest.raises((ValueError, OSError)):
        streamed.at(0, 4)


def test_closing_does_not_wait_for_a_connection_that_hangs(sets: Path) -> None:
    with serve(sets / "7") as good, serve(sets / "7", stall=1.0) as server:
        split = open_shard_set(good.url).split("train")
        stalled = Split("train", sets, split.shards, RESOLUTION**2, server.url)
        streamed = StreamedBatches(stalled, RESOLUTION, order_of(split, 1), 0)
        asking = threading.Thread(target=fails, args=(streamed,), daemon=True)
        asking.start()
        wait_for(lambda: server.stalled > 0)
        start = time.monotonic()
        streamed.close()
        assert time.monotonic() - start < 1
    asking.join(20)
    assert not asking.is_alive()


def test_fingerprints_know_the_ranks_and_what_can_go_on(sets: Path) -> None:
    split = open_shard_set(sets / "6").split("train")
    order = order_of(split, 2)
    assert order.fingerprint(40) == order_of(split, 2).fingerprint(40)
    others = [order_of(split, 4), order_of(split, 2, seed=1), order_of(split, 2, FLIP_AND_CROP)]
    assert len({one.fingerprint(40) for one in [order, *others]}) == 4
    assert "2 data-parallel ranks before and to 4 now" in (others[0].resume_warning(order.fingerprint(40), 40) or "")
    assert others[1].resume_warning(order.fingerprint(40), 40) is None
    assert order_of(split, 4, seed=1).resume_warning(order.fingerprint(40), 40) is None
    by_index = ImageOrder(split.record_images, 0)
    assert "is read by index now" in (by_index.resume_warning(order.fingerprint(40), 40) or "")
    assert "is streamed now" in (order.resume_warning(by_index.fingerprint(40), 40) or "")
    assert by_index.resume_warning(ImageOrder(split.record_images, 1).fingerprint(40), 40) is None
