"""Mixtures: exact proportions, each set's own order, none lost or repeated at any change, and invalid input."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_prep.shards import remote
from data_prep.shards.reader import open_shard_set
from pipeline.config import DataConfig, MixtureEntry, ModelConfig, TrainConfig
from pipeline.distributed import Ranks
from pipeline.layout import BatchConfig
from pipeline.model.augmentation import Augmentation
from pipeline.schedule import ScheduleConfig
from pipeline.train.data import batches, mixture_stream, stream_order, streaming
from pipeline.train.data.batches import ImageOrder
from pipeline.train.data.mixture import MixtureBatches, MixtureOrder
from pipeline.train.data.mixture_history import (
    History,
    Segment,
    continued,
    describe_change,
    history_of,
    to_record,
)
from pipeline.train.data.mixture_pattern import Pattern, weight_parts
from pipeline.train.data.stream_order import StreamOrder
from pipeline.train.setup import check_inputs
from pipeline.training_set import TrainingSets, open_training_sets, unique_names
from tests.http_server import Server
from tests.pipeline.train.data.mixture_sets import RESOLUTION, write_numbered_set

IMAGES = {"a": 97, "b": 61, "c": 44}
SEED = 3


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of three records."""
    for module in (batches, stream_order, streaming, mixture_stream):
        monkeypatch.setattr(module, "WINDOW_RECORDS", 3)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)


def configured(entries: list[tuple[str, float]], **data: object) -> TrainConfig:
    mixture = [MixtureEntry(shards=path, weight=weight) for path, weight in entries]
    return TrainConfig(
        model=ModelConfig(layers=1, width=32, heads=2, resolution=RESOLUTION),
        data=DataConfig(mixture=mixture, **data),  # type: ignore[arg-type]
        schedule=ScheduleConfig(steps=10, warmup_steps=0),
        batch=BatchConfig(global_size=8, micro_size=1),
    )


@pytest.mark.parametrize(
    ("weights", "exact"),
    [([0.7, 0.3], True), ([0.001, 0.25, 0.749], True), ([1, 1, 1], False), ([5, 1.2345, 7], False)],
)
def test_every_thousand_images_have_the_proportions(weights: list[float], exact: bool) -> None:
    shares = np.array(weights) / sum(weights)
    pattern = Pattern(SEED, weight_parts(list(shares)))
    drawn = pattern.at(0, 1_000_000)
    counts = np.stack([(drawn.reshape(1000, 1000) == number).sum(1) for number in range(len(weights))], axis=1)
    assert np.abs(counts - 1000 * shares).max() < (1e-6 if exact else 1)
    assert np.abs(counts.sum(0) - 1e6 * shares).max() < 1
    assert np.abs(counts.cumsum(0) - 1000 * shares * np.arange(1, 1001)[:, None]).max() < 4
    if exact:  # also of a thousand images that begin anywhere
        windows = np.stack([pattern.at(first, 1000) == 0 for first in range(0, 2000, 7)]).sum(1)
        assert (windows == 1000 * shares[0]).all()
    for offset in (0, 1, 999, 1000, 123_456, 1_234_567):
        assert pattern.count(0, offset) == (pattern.at(0, offset) == 0).sum()
    places = np.flatnonzero(np.tile(drawn, 3) == 1)
    for lanes in (1, 3, 4, 127):
        for first, stop in ((0, 5), (100, 700), (900, 2_500), (1, len(places))):
            expected = np.bincount(places[first:stop] % lanes, minlength=lanes)
            assert (pattern.by_lane(1, first, stop, lanes) == expected).all()
            for lane in {0, lanes - 1}:
                in_lane = [pattern.in_lane(1, images, lane, lanes) for images in (first, stop)]
                assert in_lane[1] - in_lane[0] == expected[lane]


def test_lanes_are_counted_in_one_pass() -> None:
    """For weights that are no thousandths and many ranks, over many cycles: once 50 s and 500 MB."""
    pattern, lanes = Pattern(SEED, weight_parts([1.28 / 101.28, 100 / 101.28])), 127
    began = time.process_time()
    by_lane = pattern.by_lane(1, 7, 10**9, lanes)
    assert time.process_time() - began < 2
    cycle = int((pattern.at(0, pattern.period) == 1).sum()) * lanes
    assert pattern.by_lane(1, 0, cycle, lanes).tolist() == [cycle // lanes] * lanes
    assert by_lane.sum() == 10**9 - 7
    for lane in (0, 5, 126):
        assert by_lane[lane] == pattern.in_lane(1, 10**9, lane, lanes) - pattern.in_lane(1, 7, lane, lanes)


def test_a_small_share_may_miss_some_ranks(root: Path, server: Server) -> None:
    """One slot of a thousand is on the same one of eight ranks in each block."""
    sets, reading = opener(root, server, "a")({"a": 0.001, "b": 0.999}), Reading(SEED)
    order = reading.go_on(sets, ranks=8, steps=500, per_rank=1)
    stream = order.orders[0]
    assert isinstance(stream, mixture_stream.MixtureStream)
    [own] = [rank for rank in range(8) if stream.meets(rank)]
    assert len(reading.check_epochs(sets.digests[0], IMAGES["a"])) == 4
    epoch, window = stream.following(own, 0, 99)
    assert (epoch, window) == (1, 0)
    with pytest.raises(AssertionError):
        stream.following((own + 1) % 8, 0, 99)


def test_seven_to_three_over_ten_thousand_images() -> None:
    drawn = Pattern(0, weight_parts([0.7, 0.3])).at(0, 10_000)
    assert np.bincount(drawn).tolist() == [7000, 3000]
    assert {tuple(np.bincount(block)) for block in drawn.reshape(10, 1000)} == {(700, 300)}
    assert not (drawn == Pattern(1, weight_parts([0.7, 0.3])).at(0, 10_000)).all()


class Reading:
    """Reads mixtures one after the other, as a run does that is resumed with other sets, weights and ranks."""

    def __init__(self, seed: int, augmentation: Augmentation | None = None) -> None:
        self.seed, self.augmentation = seed, augmentation
        self.history: History = ()
        self.position, self.fingerprint = 0, ""
        self.read: list[tuple[str, int]] = []
        """Digest and number of each image, in order."""
        self.warnings: list[str] = []

    def go_on(self, sets: TrainingSets, ranks: int, steps: int, per_rank: int, files: bool = False) -> MixtureOrder:
        """files: read the images from the sets too, and compare them."""
        before = self.history
        self.history = continued(before, sets, ranks, self.position, self.seed)
        order = MixtureOrder(self.history, sets, self.seed, self.augmentation, before or None)
        if before and order.fingerprint(self.position) != self.fingerprint:
            warning = order.resume_warning(self.fingerprint, self.position)
            assert warning is not None
            self.warnings += [warning] * bool(warning)
        plain = json.loads(json.dumps(to_record(self.history)))
        assert tuple(map(Segment.from_dict, plain)) == self.history
        readers = [MixtureBatches(order, RESOLUTION, rank, ranks) for rank in range(ranks)] if files else []
        starts = np.cumsum([0, *(split.images for split in order.splits)])
        for _ in range(steps):
            size = per_rank * ranks
            of_set, numbers = order.sets_at(self.position, size), order.image_numbers(self.position, size)
            found = [(int(one), number - int(starts[one])) for one, number in zip(of_set, numbers, strict=True)]
            if files:
                marks = [int(one.shards.name.split()[1]) for one in sets.sets]
                share = [reader.at(self.position, size).tokens for reader in readers]
                tokens = np.stack(share, axis=1).reshape(size, -1)
                assert tokens[:, :2].tolist() == [[marks[one], number] for one, number in found]
            self.read += [(sets.digests[one], number) for one, number in found]
            self.position += size
        for reader in readers:
            reader.close()
        self.fingerprint = order.fingerprint(self.position)
        return order

    def check_epochs(self, digest: str, images: int) -> list[int]:
        """None of the set is lost or repeated within its epoch. Returns its images in order."""
        numbers = [number for one, number in self.read if one == digest]
        for first in range(0, len(numbers), images):
            epoch = numbers[first : first + images]
            assert len(set(epoch)) == len(epoch)
        assert self.history[-1].consumed_at(self.position, self.seed).get(digest, 0) == len(numbers)
        return numbers


Opener = Callable[[dict[str, float]], TrainingSets]


def opener(root: Path, server: Server, streamed: str) -> Opener:
    """Opens sets by name with their weights; those in `streamed` from the server."""
    return lambda weights: open_training_sets(
        configured([(f"{server.url}/{n}" if n in streamed else str(root / n), w) for n, w in weights.items()])
    )


@pytest.mark.parametrize("streamed", ["", "a", "ab"])
def test_nothing_is_lost_or_repeated_when_sets_weights_and_ranks_change(
    streamed: str, root: Path, server: Server
) -> None:
    sets, reading = opener(root, server, streamed), Reading(SEED)
    reading.go_on(sets({"a": 0.7, "b": 0.3}), ranks=2, steps=9, per_rank=2, files=True)
    before = list(reading.read)
    changes = [
        ({"a": 0.3, "b": 0.7}, 2),
        ({"a": 0.3, "b": 0.5, "c": 0.2}, 2),
        ({"b": 1.0, "c": 3.0}, 4),
        ({"a": 1, "b": 2}, 3),
    ]
    for weights, ranks in changes:
        reading.go_on(sets(weights), ranks, steps=9, per_rank=2, files=True)
    assert reading.read[: len(before)] == before
    assert not reading.warnings
    for name, images in IMAGES.items():
        shards = open_shard_set(root / name)
        numbers = reading.check_epochs(shards.digest, images)
        if name not in streamed:
            alone = ImageOrder(shards.split("train").record_images, SEED)
            assert numbers == alone.image_numbers(0, len(numbers))
    assert len(reading.history) == 5


def test_the_set_of_an_image_does_not_depend_on_the_ranks_before(root: Path, server: Server) -> None:
    sets, reading = opener(root, server, "a")({"a": 0.7, "b": 0.3}), Reading(SEED)
    for ranks in (4, 2, 4, 2, 1, 8, 2, 4, 8, 2):
        reading.go_on(sets, ranks, steps=200 // ranks, per_rank=1)
    unbroken = Reading(SEED)
    unbroken.go_on(sets, ranks=1, steps=2000, per_rank=1)
    of_set, expected = ([sets.digests.index(digest) for digest, _ in one.read] for one in (reading, unbroken))
    assert of_set == expected
    assert np.bincount(of_set[:1000]).tolist() == np.bincount(of_set[1000:]).tolist() == [700, 300]
    assert len(reading.history) == 10
    assert not reading.warnings


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 200))])
def test_random_histories_are_exact(seed: int, root: Path, server: Server) -> None:
    random = np.random.default_rng(seed)
    streamed = "".join(name for name in IMAGES if random.random() < 0.6)
    sets, reading = opener(root, server, streamed), Reading(seed, Augmentation(flip=True, reflect_crop=1))
    for _ in range(random.integers(2, 6)):
        names = ["a", *(name for name in "bc" if random.random() < 0.6)]
        weights = {name: float(random.choice([0.7, 0.3, 1 / 3, 0.05])) for name in names}
        ranks, per_rank = int(random.choice([1, 2, 3, 4, 8])), int(random.choice([1, 2, 5]))
        reading.go_on(sets(weights), ranks, int(random.integers(1, 40)), per_rank)
    assert not reading.warnings
    for name, images in IMAGES.items():
        reading.check_epochs(open_shard_set(root / name).digest, images)


def test_ranks_read_the_same_images_of_local_sets_and_augment_them_alike(root: Path, server: Server) -> None:
    sets = opener(root, server, "")({"a": 0.7, "b": 0.3})
    augmentation = Augmentation(flip=True, reflect_crop=1)
    order = MixtureOrder(continued((), sets, 1, 0, SEED), sets, SEED, augmentation)
    tokens = {}
    for ranks in (1, 2, 4):
        readers = [MixtureBatches(order, RESOLUTION, rank, ranks) for rank in range(ranks)]
        steps = [np.stack([r.at(8 * step, 8).tokens for r in readers], axis=1).reshape(8, -1) for step in range(30)]
        tokens[ranks] = np.concatenate(steps)
        for reader in readers:
            reader.close()
    assert np.array_equal(tokens[1], tokens[2])
    assert np.array_equal(tokens[1], tokens[4])
    of_set = order.sets_at(0, 240)
    for number, split in enumerate(order.splits):
        count = int((of_set == number).sum())
        alone = ImageOrder(split.record_images, SEED, augmentation)
        images, changes = alone.at(0, count)
        expected = augmentation.apply(split.gather(images)[0], changes, RESOLUTION)
        assert np.array_equal(tokens[1][of_set == number], expected)


@pytest.mark.parametrize("streamed", ["", "a"])
def test_a_run_of_one_set_continues_as_a_mixture(streamed: str, root: Path, server: Server) -> None:
    sets, digest = opener(root, server, streamed), open_shard_set(root / "a").digest
    split = sets({"a": 1}).first.split("train")
    records = [shard["record_images"] for shard in split.shards]
    alone = StreamOrder(records, SEED, 2) if streamed else ImageOrder(split.record_images, SEED)
    reading = Reading(SEED)
    reading.position, reading.fingerprint = 40, alone.fingerprint(40)
    reading.read = [(digest, number) for number in alone.image_numbers(0, 40)]
    reading.history = history_of([], digest, reading.fingerprint)
    order = reading.go_on(sets({"b": 0.5, "a": 0.5}), 2, 40, 2)
    assert not reading.warnings
    reading.check_epochs(digest, IMAGES["a"])
    reading.check_epochs(open_shard_set(root / "b").digest, IMAGES["b"])
    assert order.epochs(2040) == {"b": 1000 / 61, "a": 1040 / 97}
    line = describe_change(history_of([], digest, alone.fingerprint(40))[-1], reading.history[-1])
    assert "from image 40 on: a 1 -> 0.5, b 0.5 added; images read so far: a 40" in line
    reading.go_on(sets({"a": 1}), 2, 10, 2)
    reading.check_epochs(digest, IMAGES["a"])


def test_another_order_is_refused_and_weaker_guarantees_are_logged(root: Path, server: Server) -> None:
    local, streamed = (opener(root, server, which)({"a": 0.5, "b": 0.5}) for which in ("", "a"))
    history = continued((), local, 2, 0, SEED)
    recorded = MixtureOrder(history, local, SEED).fingerprint(40)
    for order in (MixtureOrder(history, local, SEED + 1), MixtureOrder(history, local, SEED, Augmentation(flip=True))):
        assert order.fingerprint(40) != recorded
        assert order.resume_warning(recorded, 40) is None
    now = MixtureOrder(continued(history, streamed, 2, 40, SEED), streamed, SEED, recorded=history)
    assert "a was read in another kind of order before" in (now.resume_warning(recorded, 40) or "")
    back = MixtureOrder(continued(now.history, local, 2, 80, SEED), local, SEED, recorded=now.history)
    assert "a was read in another kind of order before" in (back.resume_warning(now.fingerprint(80), 80) or "")
    order = MixtureOrder(continued((), streamed, 2, 0, SEED), streamed, SEED)
    assert continued(order.history, streamed, 2, 40, SEED) is order.history


def test_names_do_not_depend_on_the_order_of_the_sets(root: Path, server: Server, tmp_path: Path) -> None:
    other = write_numbered_set(tmp_path / "other/a", 9, 20)
    entries = [(str(root / "a"), 1.0), (f"{server.url}/b", 2.0), (str(other), 1.0)]
    sets = open_training_sets(configured(entries))
    assert [one.name for one in sets.sets] == [f"{root.name}/a", "b", "other/a"]
    assert [one.name for one in open_training_sets(configured(entries[::-1])).sets] == [
        "other/a",
        "b",
        f"{root.name}/a",
    ]
    assert [one.weight for one in sets.sets] == [0.25, 0.5, 0.25]
    assert sets.locations([0, 97, 97 + 61])[::2] == [
        f"{root.name}/a: train-000000.tar record 0 image 0",
        "other/a: train-000000.tar record 0 image 0",
    ]
    recorded = {sets.digests[0]: "a", "0" * 64: "b"}
    assert [one.name for one in sets.named(recorded).sets] == ["a", f"{server.url.partition('//')[2]}/b", "other/a"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["https://user:TOKEN@host", "https://user:TOKEN@host/"], ["source 00000", "source 11111"]),
        (["https://user:TOKEN@host/x/64", "https://user:TOKEN@other/x/64"], ["host/x/64", "other/x/64"]),
        (["s3://b/set#x", "https://host/web?sig=1"], ["set", "web"]),
        (["pipe:cat {}", "/data/64"], ["source", "64"]),
        (["/x/64", "/x/y/64"], ["x/64", "y/64"]),
    ],
)
def test_names_have_no_secrets(paths: list[str], names: list[str]) -> None:
    sets = [SimpleNamespace(path=path, name="source", digest=str(n) * 64) for n, path in enumerate(paths)]
    found = unique_names(sets, {})  # type: ignore[arg-type]
    assert [name[: len(expected)] for name, expected in zip(found, names, strict=True)] == names
    assert unique_names(sets[::-1], {}) == found[::-1]  # type: ignore[arg-type]


def test_another_order_of_the_sets_changes_nothing(root: Path, server: Server) -> None:
    names = {"a": 0.5, "b": 0.3, "c": 0.2}
    readings = [Reading(SEED), Reading(SEED)]
    for order in (list(names), ["c", "a", "b"], ["b", "c", "a"]):
        for reading, chosen in zip(readings, (order, list(names)), strict=True):
            reading.go_on(opener(root, server, "a")({name: names[name] for name in chosen}), 2, 20, 2, files=True)
    assert readings[0].read == readings[1].read
    assert len(readings[0].history) == 1
    before = readings[0].history[-1]
    after = continued(readings[0].history, opener(root, server, "a")({"b": 0.6, "c": 0.4}), 2, 240, SEED)[-1]
    line = describe_change(before, after)
    assert all(change in line for change in ("a 0.5 removed", "b 0.3 -> 0.6", "c 0.2 -> 0.4"))


@pytest.mark.parametrize("weight", [0.0, -0.1, float("nan"), float("inf")])
def test_weights_must_be_positive_and_finite(weight: float) -> None:
    with pytest.raises(ValueError, match=r"^data\.mixture\[1\]\.weight is .*; it must be above 0, and finite\.$"):
        configured([("a", 0.5), ("b", weight)])


def test_mixtures_that_are_refused(root: Path, tmp_path: Path, server: Server) -> None:
    a = str(root / "a")
    write_numbered_set(tmp_path / "palette", 5, 20, red=0.5)
    write_numbered_set(tmp_path / "size", 5, 20, resolution=8)
    write_numbered_set(tmp_path / "valid", 5, 20, valid=0)
    write_numbered_set(root / "few", 5, 7)
    refused = {
        "palette": r"data\.mixture\[1\]\.shards is .*palette, of the palette \w{12}; it must have that of",
        "size": r"data\.mixture\[1\]\.shards is .*size, of resolution 8; it must be model\.resolution, 4\.",
        "valid": r"data\.mixture\[1\]\.shards: .*valid has no images in its split 'valid'",
        "none": r"data\.mixture\[1\]\.shards: .*none does not exist; it must be a folder",
    }
    for name, message in refused.items():
        with pytest.raises(ValueError, match=message):
            open_training_sets(configured([(a, 0.5), (str(tmp_path / name), 0.5)]))
    with pytest.raises(ValueError, match=r"the same shard set as data\.mixture\[0\]; name it once, with the sum"):
        open_training_sets(configured([(a, 0.5), (f"{server.url}/a", 0.5)]))
    with pytest.raises(ValueError, match=r"data\.shards is x and data\.mixture is set too; set one of the two\."):
        configured([(a, 1.0)], shards="x")
    with pytest.raises(ValueError, match=r"data\.mixture is an empty list; it must name at least one shard set"):
        configured([])
    with pytest.raises(ValueError, match=r"data\.mixture\[1\]\.weight is 1e-09; it must be at least"):
        configured([(a, 1.0), ("b", 1e-9)])
    ranks = Ranks(0, 8, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"data\.mixture\[1\]\.shards: .*few has 7 images .*; streamed to 8 ranks"):
        check_inputs(configured([(a, 0.5), (f"{server.url}/few", 0.5)]), ranks)
