"""Pictures and labels with their official splits, one module a layout; `open_source` finds the one."""

from collections.abc import Callable
from importlib import import_module
from typing import cast

from data_prep.config import SourceConfig
from data_prep.sources.base import Source

_MODULES = {
    "photographs": "photographs",
    "image_folder": "image_folder",
    "cifar10": "cifar",
    "cifar100": "cifar",
    "stl10": "stl10",
    "imagenet": "imagenet",
    "coco": "coco",
    "places205": "places205",
    "webdataset": "webdataset_tars",
    "hf_dataset": "hf_datasets",
}


def open_source(config: SourceConfig) -> Source:
    """Lists the pictures and reads the labels; decodes nothing yet.

    Raises ValueError naming the folder, archive or column that is missing or isn't what it should be.
    """
    module = import_module(f"data_prep.sources.{_MODULES[config.kind]}")
    return cast(Callable[[SourceConfig], Source], module.open_source)(config)
