"""Lets torchvision of PyPI be imported beside torch for CPUs: peers import it, and nothing that is measured uses it.

PyPI's torchvision is built for CUDA. Beside torch for CPUs its library can't be loaded, and then its import fails
because two operators have no declaration. `declare_operators` declares them, without an implementation.
"""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import torch

_declared: list[torch.library.Library] = []
"""A declaration ends with its library."""


def declare_operators() -> None:
    """Only if torchvision's own library can't be loaded. Call it before the first import of torchvision."""
    found = find_spec("torchvision")
    if found is None or found.origin is None or _declared:
        return
    try:
        ctypes.CDLL(str(Path(found.origin).with_name("_C.so")))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
