"""Takes turns at reading an epoch: python -m tests.benchmarks.peers.reading FORMAT TOKENS WORKERS

A turn reads the images of TOKENS once, in shuffled batches of 128. The turn to warm up checks that each image comes
once, but for those of a last batch that is not complete.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tests.benchmarks.peers.formats import format_of
from tests.benchmarks.peers.token_images import load, numbers_of
from tests.benchmarks.peers.turn import serve

BATCH = 128


def main(name: str, file: str, workers: str) -> None:
    """Writes the set in the peer's format, then reads it."""
    form, tokens = format_of(name), load(file)
    with TemporaryDirectory(dir=Path(file).parent) as temporary:
        folder = Path(temporary) / "set"
        form.write(tokens, folder)
        read_by = form.loader(folder, BATCH, int(workers))
        count, megatokens = len(tokens), tokens.shape[1] / 1e6
        del tokens
        turns = 0

        def turn() -> float:
            nonlocal turns
            turns += 1
            if turns == 1:
                check_epoch([numbers_of(batch) for batch in read_by], count)
                return 1.0
            return sum(len(batch) for batch in read_by) * megatokens

        serve(turn)


def check_epoch(batches: list[np.ndarray], count: int) -> None:
    """Raises ValueError if the batches of an epoch are not full, not shuffled, or lack an image or repeat one."""
    numbers = np.concatenate(batches)
    distinct = len(np.unique(numbers))
    if {len(batch) for batch in batches} != {BATCH} or len(batches) < count // BATCH - 1:
        raise ValueError(f"an epoch of {count} images has {len(batches)} batches of {len(batches[0])}")
    if distinct != len(numbers) or numbers.max() >= count:
        raise ValueError(f"an epoch has {len(numbers)} images, of which {distinct} are different")
    if (np.diff(numbers) == 1).mean() > 0.5:
        raise ValueError("the images are not shuffled")


if __name__ == "__main__":
    main(*sys.argv[1:])
