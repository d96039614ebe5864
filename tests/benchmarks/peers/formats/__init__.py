"""How each peer stores and reads token sequences, and how we do: one file each, with the same functions.

    write(tokens, folder)                       stores uint16 (N, T) in the peer's own format
    loader(folder, size, workers, state)        iterates over an epoch of shuffled batches, (size, T), on each pass
    state_of(loader, read)                      what a checkpoint keeps after `read` batches
    mixture(folders, weights, size, images, workers)
                                                iterates over about `images` of a mixture of stored sets on each pass

workers: 0 reads in the process that trains, 1 in one more process or thread. The rank and the number of ranks are in
the environment, as torchrun sets them. A module imports its peer at the top, so an import error is the peer's error.
"""

from importlib import import_module
from types import ModuleType


def format_of(name: str) -> ModuleType:
    """The module of a peer, by its name."""
    return import_module(f"{__name__}.{name}")
