"""Contract 3: the order of the pictures is a function of (seed, position) and of nothing else."""

import numpy as np
import pytest

from pipeline.train.batches import ImageOrder, TrainingBatches, mirror

RECORDS = np.array([256] * 150 + [77])
IMAGES = int(RECORDS.sum())


def test_every_epoch_has_every_picture_once_in_its_own_order() -> None:
    order = ImageOrder(RECORDS, seed=1)
    epochs = [order.at(epoch * IMAGES, IMAGES)[0] for epoch in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(IMAGES))
    assert (epochs[0] == epochs[1]).mean() < 0.01
    assert (epochs[1] == epochs[2]).mean() < 0.01


def test_pictures_are_mixed_across_records() -> None:
    first_thousand, _ = ImageOrder(RECORDS, seed=1).at(0, 1000)
    assert len(np.unique(first_thousand // 256)) > 50


def test_a_position_does_not_depend_on_how_it_is_reached() -> None:
    whole, flips = ImageOrder(RECORDS, seed=3, flip=True).at(0, 2 * IMAGES)
    for position, count in [(0, 1), (IMAGES - 5, 10), (IMAGES + 16_383, 3), (2 * IMAGES - 7, 7)]:
        indices, mirrored = ImageOrder(RECORDS, seed=3, flip=True).at(position, count)
        assert np.array_equal(indices, whole[position : position + count])
        assert np.array_equal(mirrored, flips[position : position + count])


def test_seeds_and_epochs_draw_differently() -> None:
    first, _ = ImageOrder(RECORDS, seed=0).at(0, 500)
    second, _ = ImageOrder(RECORDS, seed=1).at(0, 500)
    assert (first == second).mean() < 0.05


def test_half_of_the_pictures_are_mirrored_anew_each_epoch() -> None:
    order = ImageOrder(RECORDS, seed=0, flip=True)
    indices, first = order.at(0, IMAGES)
    again, second = order.at(IMAGES, IMAGES)
    assert abs(first.mean() - 0.5) < 0.02
    by_picture = first[np.argsort(indices)], second[np.argsort(again)]
    assert abs((by_picture[0] == by_picture[1]).mean() - 0.5) < 0.02


class NumberedSplit:
    """Picture i is i in every token."""

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return indices.astype(np.uint16)[:, None].repeat(4, axis=1), np.zeros(len(indices))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_ranks_slices_make_up_the_global_batch(ranks: int) -> None:
    whole, _ = ImageOrder(RECORDS, seed=5).at(IMAGES - 20, 96)
    pieces = []
    for rank in range(ranks):
        batches = TrainingBatches(NumberedSplit(), 2, ImageOrder(RECORDS, seed=5), rank, ranks)  # type: ignore[arg-type]
        pieces.append([batches.at(IMAGES - 20 + 32 * step, 32)[:, 0] for step in range(3)])
        batches.close()
    steps = [np.concatenate([piece[step] for piece in pieces]) for step in range(3)]
    assert np.array_equal(np.concatenate(steps), whole)


def test_reading_ahead_changes_nothing_when_the_loop_jumps() -> None:
    batches = TrainingBatches(NumberedSplit(), 2, ImageOrder(RECORDS, seed=5), 0, 1)  # type: ignore[arg-type]
    first = batches.at(0, 16)
    batches.at(160, 16)
    assert np.array_equal(batches.at(0, 16), first)
    assert np.array_equal(batches.at(0, 8), first[:8])
    batches.close()


def test_mirror_turns_the_chosen_pictures_on_the_grid() -> None:
    tokens = np.arange(2 * 16, dtype=np.uint16).reshape(2, 16)
    turned = mirror(tokens, np.array([False, True]), 4)
    assert np.array_equal(turned[0], tokens[0])
    assert np.array_equal(turned[1].reshape(4, 4), np.fliplr(tokens[1].reshape(4, 4)))
