"""The compiler that torch.compile needs."""

import os
import shutil


def missing_compiler(device_type: str) -> str | None:
    """What torch.compile lacks for a device of this type, "cpu" or "cuda"; None if it lacks nothing.

    It takes CXX or g++ on a CPU; CC, gcc or clang on CUDA, for Triton.
    """
    kind, variable, usual = ("C", "CC", ["gcc", "clang"]) if device_type == "cuda" else ("C++", "CXX", ["g++"])
    named = os.environ.get(variable)
    candidates = usual if named is None else [named]  # if the variable is set, torch and Triton try nothing else
    if any(shutil.which(name) for name in candidates):
        return None
    return (
        f"torch.compile needs a {kind} compiler on this device, and {' or '.join(candidates)} is not on PATH; install "
        f"it, name another in {variable}, or set compile to false"
    )
