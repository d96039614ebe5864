"""Takes turns at reading a mixture: python -m tests.benchmarks.peers.mixing FORMAT TOKENS_A TOKENS_B SHARE WORKERS

A turn reads the images of a set, rounded down to whole thousands; litdata reads on until a set ends. Its figures: the
difference of the images of A from SHARE, over those that all readers read (`off_total`), and the largest in any 1,000
images one after the other (`off_thousand`).
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tests.benchmarks.peers.formats import format_of
from tests.benchmarks.peers.reading import BATCH
from tests.benchmarks.peers.token_images import load, numbers_of
from tests.benchmarks.peers.turn import serve

STRETCH = 1000


def main(name: str, first: str, second: str, share: str, workers: str) -> None:
    """Writes both sets, then reads the mixture; images of the second are numbered after those of the first."""
    form, own = format_of(name), float(share)
    sets = [load(file) for file in (first, second)]
    with TemporaryDirectory(dir=Path(first).parent) as temporary:
        folders = [Path(temporary) / which for which in ("a", "b")]
        for tokens, folder in zip(sets, folders, strict=True):
            form.write(tokens, folder)
        count, positions = len(sets[0]), sets[0].shape[1]
        del sets
        images = count // STRETCH * STRETCH
        read_by = form.mixture(folders, [own, 1 - own], BATCH, images, int(workers))

        def turn() -> dict[str, float]:
            of_first = [numbers_of(batch) < count for batch in read_by]
            joined = np.concatenate(of_first)
            return {"work": len(joined) * positions / 1e6, **differences(joined, own, images)}

        serve(turn)


def differences(of_first: np.ndarray, share: float, images: int) -> dict[str, float]:
    """In images: of the first `images`, and the largest of any stretch. of_first: bool (n,)."""
    counts = np.concatenate([[0], np.cumsum(of_first)])
    stretches = counts[STRETCH:] - counts[:-STRETCH]
    return {
        "images": len(of_first),
        "off_total": abs(float(counts[images]) - share * images),
        "off_thousand": float(np.abs(stretches - share * STRETCH).max()),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
