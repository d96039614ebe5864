"""The hash and the thumbnail against scipy and numpy; what is recognized, and what is not."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.fft import dctn

from data_prep.images.crops import area_resize
from data_prep.images.decode import Decoder
from data_prep.images.near_duplicates import NearDuplicates, look_of
from data_prep.sources.base import Names
from tests.data_prep.tar_files import encode_image

Small = tuple[np.ndarray, np.ndarray]


def reference_bits(image: np.ndarray) -> np.ndarray:
    """pHash: bool (64,), by floats."""
    low = dctn(image.astype(float) @ [0.299, 0.587, 0.114], type=2)[:8, :8].ravel()
    return low > np.median(low[1:])


def searched(images: np.ndarray, distance: int = 10) -> NearDuplicates:
    looks = [look_of(image) for image in images]
    thumbnails = np.stack([look.thumbnail.ravel() for look in looks])
    names = Names(f"image {index}" for index in range(len(images)))
    return NearDuplicates(np.array([look.code for look in looks], np.uint64), thumbnails, names, distance)


def enlarged(image: np.ndarray, times: int) -> np.ndarray:
    return image.repeat(times, axis=0).repeat(times, axis=1)


def test_the_hash_equals_scipys(small: Small) -> None:
    for image in small[0][::6]:
        look, flipped = look_of(image), look_of(image[:, ::-1])
        assert (np.unpackbits(look.code.reshape(1).view(np.uint8)) == reference_bits(image)).all()
        assert look.mirrored.code == flipped.code
        assert (look.mirrored.thumbnail == flipped.thumbnail).all()
        means = image.reshape(8, 4, 8, 4, 3).mean((1, 3))
        assert np.abs(look.thumbnail - means).max() <= 0.5


def test_copies_are_recognized(small: Small) -> None:
    """Encoded again, smaller, larger than what is sampled, mirrored, brighter, and with more on two sides."""
    near = searched(small[0])
    for index in (3, 25, 47):
        image = small[0][index]
        wide = np.concatenate([np.zeros((32, 6, 3), np.uint8), image, np.zeros((32, 6, 3), np.uint8)], axis=1)
        copies = {
            "JPEG": Decoder()(encode_image(image, "jpeg"), ""),
            "half": area_resize(image, 16),
            "large": enlarged(image, 10),
            "mirrored": image[:, ::-1],
            "brighter": np.clip(image.astype(int) + 12, 0, 255).astype(np.uint8),
            "central square": wide,
        }
        for name, copy in copies.items():
            found = near.match(copy)
            assert found is not None and found.startswith(f"of image {index}, "), (name, found)
    assert searched(small[0][:3], 0).match(small[0][1]) == "of image 1, 0 of 64 bits differ"


def test_an_equal_hash_is_not_enough(small: Small) -> None:
    """The thumbnails of another image, with the same hash, are compared too."""
    looks = searched(small[0][[3, 30]])
    swapped = replace(looks, thumbnails=looks.thumbnails[::-1])
    assert looks.match(small[0][3]) == "of image 0, 0 of 64 bits differ"
    assert swapped.match(small[0][3]) is None


@pytest.mark.parametrize("contrast", [0, 4])
def test_flat_images_match_nothing(contrast: int) -> None:
    ramp = np.linspace(0, contrast, 32)[None, :, None] + np.full((32, 32, 3), 200)
    flat = ramp.astype(np.uint8)
    assert look_of(flat).is_flat
    assert searched(np.stack([flat, flat]), 64).match(flat) is None
