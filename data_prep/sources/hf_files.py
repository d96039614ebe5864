"""The parquet and arrow files of a Hugging Face dataset on this machine, one by one.

`datasets` takes the types of the first file for all of them, and its errors do not name the damaged file.
"""

import gc
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from traceback import clear_frames
from typing import Any

SUFFIXES = (".parquet", ".arrow")
ARROW_FILE = b"ARROW1"
"""The first bytes of an arrow file; a stream has none."""
LISTED = 10
"""Classes that an error message about a file lists."""


def local_tables(files: Iterable[str]) -> list[str]:
    """Those of the files that are read here."""
    return [file for file in files if file.endswith(SUFFIXES) and Path(file).is_file()]


def class_names(files: list[str], column: str) -> list[str] | None:
    """The names of the classes in a column, as the files of one split declare them; None if they do not.

    Raises ValueError if a file lacks the column, or if two files number the classes differently.
    """
    import datasets

    first = ""
    names: list[str] | None = None
    for file in files:
        features = datasets.Features.from_arrow_schema(_checked(file, _schema))
        if column not in features:
            raise ValueError(f"{file} has no column {column!r}; all files of the dataset must have the same columns.")
        here = getattr(features[column], "names", None)
        if here is None:
            continue
        if names is not None and here != names:
            raise ValueError(
                f"{file} has other classes in the column {column!r} than {first} ({_listed(here)}; not "
                f"{_listed(names)}); the files of a split must have the same classes in the same order."
            )
        first, names = file, here
    return names


def distinct_values(files: list[str], column: str) -> set[Any]:
    """The values in a column of all files. Raises ValueError naming a file that is damaged."""
    return {value for file in files for value in _checked(file, partial(_distinct, column=column))}


def _distinct(file: str, column: str) -> list[Any]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if file.endswith(".parquet"):
        return pc.unique(pq.read_table(file, columns=[column], memory_map=True, use_threads=False)[column]).to_pylist()
    with pa.memory_map(file) as source:
        return pc.unique(_open_arrow(source).read_all()[column]).to_pylist()


def refuse_damaged(files: list[str], completely: bool = False) -> None:
    """Raises ValueError naming the first file whose types, or whose complete contents, can't be read."""
    for file in files:
        _checked(file, _read if completely else _schema)


def refuse_other_columns(files: list[str]) -> None:
    """Raises ValueError naming the first file whose columns differ from those of the first."""
    columns = {file: sorted(_checked(file, _schema).names) for file in files}
    for file in files:
        if columns[file] != columns[files[0]]:
            raise ValueError(
                f"{file} has the columns {', '.join(columns[file])}, but {files[0]} has "
                f"{', '.join(columns[files[0]])}; all files of a dataset must have the same columns."
            )


def _checked(file: str, read: Callable[[str], Any]) -> Any:
    import pyarrow as pa

    try:
        return read(file)
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise ValueError(f"{file} can't be read ({os.strerror(error.errno)}).") from error
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"{file} is damaged ({cause}); download or write it again.") from error


def end_reading(error: BaseException) -> None:
    """Frees what the frames of an error of `datasets` hold.

    pyarrow's threads may still be reading a Python file there; if the process ends meanwhile, they abort it.
    """
    outer: BaseException | None = error
    while outer is not None:
        clear_frames(outer.__traceback__)
        outer = outer.__cause__ or outer.__context__
    gc.collect()


def _schema(file: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.endswith(".parquet"):
        return pq.read_schema(file, memory_map=True)
    with pa.memory_map(file) as source:
        return _open_arrow(source).schema


def _read(file: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.endswith(".parquet"):
        with pq.ParquetFile(file, memory_map=True) as table:
            for batch in table.iter_batches(use_threads=False):
                batch.validate(full=True)
        return
    with pa.memory_map(file) as source:
        table = _open_arrow(source)
        stored = map(table.get_batch, range(table.num_record_batches)) if hasattr(table, "get_batch") else table
        for batch in stored:
            batch.validate(full=True)


def _open_arrow(source: Any) -> Any:
    """The batches of a stream, as `datasets` writes it, or of an arrow file, which `datasets` reads too."""
    import pyarrow as pa

    is_file = source.read(len(ARROW_FILE)) == ARROW_FILE
    source.seek(0)
    return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (" ..." if len(names) > LISTED else "")
