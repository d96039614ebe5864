"""Errors of allocation as one sentence. Imports no torch."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from data_prep.common.exit_codes import Failed

MESSAGES = ("out of memory", "can't allocate memory", "status_alloc_failed")
"""Parts of the messages of RuntimeErrors for failed allocations: CUDA, NCCL, cuBLAS, cuDNN and host memory."""
WANTED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)


class OutOfMemory(Failed):
    """A rank ran out of memory; the message advises what to change. Other ranks may still wait for this one."""

    def __init__(self, error: BaseException, where: str, advice: str) -> None:
        found = WANTED.search(str(error))
        wanted = f" ({found[1]} could not be allocated)" if found else ""
        super().__init__(f"out of memory{where}{wanted}: {advice}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be allocated, on the accelerator or the host."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in MESSAGES)


@contextmanager
def with_batch_size_advice(task: str, batch_size: int) -> Iterator[None]:
    """Converts an allocation error of an evaluation task to OutOfMemory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = (
            f"each rank computes {batch_size} images at once; set --batch_size lower, or --train_images if its "
            "features do not fit."
        )
        raise OutOfMemory(error, f" in {task}", advice) from error
