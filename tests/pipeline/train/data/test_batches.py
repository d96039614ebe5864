"""The order of the images is a function of (seed, position) and of nothing else."""

import numpy as np
import pytest

from pipeline.model.augmentation import Augmentation
from pipeline.train.data.batches import ImageOrder, TrainingBatches

RECORDS = np.array([256] * 150 + [77])
IMAGES = int(RECORDS.sum())


def test_every_epoch_has_every_picture_once_in_its_own_order() -> None:
    order = ImageOrder(RECORDS, seed=1)
    epochs = [order.at(epoch * IMAGES, IMAGES)[0] for epoch in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(IMAGES))
    assert (epochs[0] == epochs[1]).mean() < 0.01
    assert (epochs[1] == epochs[2]).mean() < 0.01


def test_images_are_mixed_across_records() -> None:
    first_thousand, _ = ImageOrder(RECORDS, seed=1).at(0, 1000)
    assert len(np.unique(first_thousand // 256)) > 50


@pytest.mark.parametrize("augmentation", [Augmentation(flip=True), Augmentation(flip=True, reflect_crop=4)])
def test_a_position_does_not_depend_on_how_it_is_reached(augmentation: Augmentation) -> None:
    complete, all_changes = ImageOrder(RECORDS, 3, augmentation).at(0, 2 * IMAGES)
    for position, count in [(0, 1), (IMAGES - 5, 10), (IMAGES + 16_383, 3), (2 * IMAGES - 7, 7)]:
        indices, changes = ImageOrder(RECORDS, 3, augmentation).at(position, count)
        assert np.array_equal(indices, complete[position : position + count])
        assert np.array_equal(changes.mirrored, all_changes.mirrored[position : position + count])
        assert np.array_equal(changes.corners, all_changes.corners[position : position + count])


def test_crops_leave_the_order_and_the_flips_as_they_were() -> None:
    indices, changes = ImageOrder(RECORDS, 0, Augmentation(flip=True)).at(0, IMAGES)
    again, with_crops = ImageOrder(RECORDS, 0, Augmentation(flip=True, reflect_crop=4)).at(0, IMAGES)
    assert np.array_equal(indices, again)
    assert np.array_equal(changes.mirrored, with_crops.mirrored)
    counts = np.bincount(with_crops.corners.astype(int).ravel())
    assert len(counts) == 9
    assert abs(counts / counts.sum() * 9 - 1).max() < 0.05


def test_the_order_and_its_fingerprint_are_those_of_earlier_versions() -> None:
    """Recorded before crops existed: a run that was started then must resume."""
    assert ImageOrder(RECORDS, 7).fingerprint(1000) == "d30d39c5aad99560"
    assert ImageOrder(RECORDS, 7, Augmentation(flip=True)).fingerprint(1000) == "f37c9178bf2efc52"


def test_the_fingerprint_covers_the_augmentations() -> None:
    kinds = [
        Augmentation(),
        *(Augmentation(flip, crop) for flip, crop in [(True, 0), (False, 2), (True, 2), (True, 3)]),
    ]
    assert len({ImageOrder(RECORDS, 7, kind).fingerprint(1000) for kind in kinds}) == len(kinds)


def test_seeds_and_epochs_draw_differently() -> None:
    first, _ = ImageOrder(RECORDS, seed=0).at(0, 500)
    second, _ = ImageOrder(RECORDS, seed=1).at(0, 500)
    assert (first == second).mean() < 0.05


def test_half_of_the_images_are_mirrored_and_others_each_epoch() -> None:
    order = ImageOrder(RECORDS, 0, Augmentation(flip=True))
    indices, changes = order.at(0, IMAGES)
    again, later = order.at(IMAGES, IMAGES)
    first, second = changes.mirrored, later.mirrored
    assert abs(first.mean() - 0.5) < 0.02
    by_picture = first[np.argsort(indices)], second[np.argsort(again)]
    assert abs((by_picture[0] == by_picture[1]).mean() - 0.5) < 0.02


class NumberedSplit:
    """Picture i is i in every token."""

    def gather_tokens(self, indices: np.ndarray) -> np.ndarray:
        return indices.astype(np.uint16)[:, None].repeat(4, axis=1)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_ranks_slices_make_up_the_global_batch(ranks: int) -> None:
    complete, _ = ImageOrder(RECORDS, seed=5).at(IMAGES - 20, 96)
    shares = []
    for rank in range(ranks):
        batches = TrainingBatches(NumberedSplit(), 2, ImageOrder(RECORDS, seed=5), rank, ranks)  # type: ignore[arg-type]
        shares.append([batches.at(IMAGES - 20 + 32 * step, 32).tokens[:, 0] for step in range(3)])
        batches.close()
    steps = [np.concatenate([share[step] for share in shares]) for step in range(3)]
    assert np.array_equal(np.concatenate(steps), complete)


def test_reading_ahead_changes_nothing_when_the_loop_jumps() -> None:
    batches = TrainingBatches(NumberedSplit(), 2, ImageOrder(RECORDS, seed=5), 0, 1)  # type: ignore[arg-type]
    first = batches.at(0, 16).tokens
    batches.at(160, 16)
    assert np.array_equal(batches.at(0, 16).tokens, first)
    assert np.array_equal(batches.at(0, 8).tokens, first[:8])
    batches.close()


class PhotographSplit:
    """Random tokens at 8 x 8."""

    tokens = np.random.default_rng(0).integers(0, 512, (IMAGES, 64)).astype(np.uint16)

    def gather_tokens(self, indices: np.ndarray) -> np.ndarray:
        return self.tokens[indices]


@pytest.mark.parametrize(("flip", "crop"), [(False, 0), (True, 0), (False, 3), (True, 3)])
def test_batches_have_the_images_with_their_augmentations(flip: bool, crop: int) -> None:
    order = ImageOrder(RECORDS, 0, Augmentation(flip, crop))
    batches = TrainingBatches(PhotographSplit(), 8, order, 1, 2)  # type: ignore[arg-type]
    tokens = batches.at(64, 32).tokens
    batches.close()
    indices, changes = order.at(64 + 16, 16)
    for image, index, mirrored, (top, left) in zip(tokens, indices, changes.mirrored, changes.corners, strict=True):
        padded = np.pad(PhotographSplit.tokens[index].reshape(8, 8), crop, mode="reflect")
        want = padded[top : top + 8, left : left + 8]
        assert np.array_equal(image.reshape(8, 8), want[:, ::-1] if mirrored else want)
