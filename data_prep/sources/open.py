"""Opens the source that a configuration names."""

from importlib import import_module

from data_prep.config import SourceConfig
from data_prep.sources.base import Source
from data_prep.sources.registry import SOURCES


def open_source(config: SourceConfig) -> Source:
    """Lists the images and reads the labels; decodes nothing yet.

    Raises ValueError naming the folder, archive or column that is missing or invalid, or an invalid label.
    """
    source: Source = import_module(SOURCES[config.kind].module).open_source(config)
    for split, images in source.splits.items():
        source.check_labels(split, images.labels)
    return source
