"""Which columns of a Hugging Face dataset have the images and their labels."""

import logging
from typing import Any

from data_prep.config import SourceConfig
from data_prep.sources.folders import SPLIT_WORD

logger = logging.getLogger(__name__)

LABEL_NAMES = ("label", "labels", "cls", "class")
"""Names by which a column of strings, booleans or integers is taken for the labels."""

LABEL_TYPES = "ClassLabel, string, bool or integer"

Features = dict[str, Any]
"""The types of columns, by name."""


def image_column(features: Features, config: SourceConfig) -> str:
    fitting = [name for name, feature in features.items() if _is_image(feature)]
    return _choose("image_column", config.image_column, fitting, features, config)


def label_column(features: Features, config: SourceConfig) -> str | None:
    """The column of type ClassLabel, else one that is named like labels; None, with a warning, if there is neither."""
    fitting = [name for name, feature in features.items() if has_label_type(feature)]
    if config.label_column is not None:
        return _choose("label_column", config.label_column, fitting, features, config)
    usable = [name for name in fitting if not _names_splits(features[name])]
    classes = [name for name in usable if hasattr(features[name], "names")]
    named = [name for name in usable if name.lower() in LABEL_NAMES]
    found = classes or [name for name in named if name == "label"] or named
    if found:
        return _choose("label_column", None, found, features, config)
    logger.warning(
        f"no column of {config.path!r} was recognized as labels, so all images are unlabelled; it has the columns "
        f"{listed_columns(features)}; source.label_column may name one of type {LABEL_TYPES}"
    )
    return None


def has_label_type(feature: Any) -> bool:
    """Whether a column has classes, or strings, booleans or integers that can be numbered."""
    if hasattr(feature, "names"):
        return True
    return type_name(feature).startswith(("int", "uint", "bool", "string", "large_string"))


def _names_splits(feature: Any) -> bool:
    """Whether the classes are splits: `datasets` takes the folders train/ and test/ of images for classes."""
    names = getattr(feature, "names", [])
    return len(names) > 0 and all(SPLIT_WORD.search(name.lower()) for name in names)


def type_name(feature: Any) -> str:
    import datasets

    if isinstance(feature, dict):
        return "struct"
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def listed_columns(features: Features) -> str:
    return ", ".join(f"{name} ({type_name(feature)})" for name, feature in features.items())


def _is_image(feature: Any) -> bool:
    """Whether it is an Image, or the same in parquet files without type information."""
    import datasets

    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))


def _choose(option: str, wanted: str | None, fitting: list[str], features: Features, config: SourceConfig) -> str:
    if wanted is not None:
        if wanted not in fitting:
            types = LABEL_TYPES if option == "label_column" else "Image"
            choice = ", ".join(fitting) or f"of type {types}, and no column is: {listed_columns(features)}"
            raise ValueError(f"source.{option} is {wanted!r}; in {config.path!r} it must be {choice}.")
        return wanted
    if len(fitting) != 1:
        what = f"several columns: {', '.join(fitting)}" if fitting else f"none of the columns {', '.join(features)}"
        raise ValueError(f"source.{option} is not set, and the types in {config.path!r} fit {what}; name a column.")
    return fitting[0]
