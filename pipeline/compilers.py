"""The compiler that torch.compile needs."""

import os
import shutil
import sysconfig


def missing_compiler(device_type: str) -> str | None:
    """What torch.compile lacks for a device of this type, "cpu" or "cuda"; None if it lacks nothing.

    It takes CXX or g++ on a CPU; CC, gcc or clang on CUDA, for Triton.
    """
    kind, variable, usual = ("C", "CC", ["gcc", "clang"]) if device_type == "cuda" else ("C++", "CXX", ["g++"])
    named = os.environ.get(variable)
    candidates = usual if named is None else [named]  # if the variable is set, torch and Triton try nothing else
    if any(shutil.which(name) for name in candidates):
        folder = path_with_space() if device_type == "cpu" else None
        return folder and f"torch.compile fails in {folder}, whose path has a space; move it, or set compile to false"
    return (
        f"torch.compile needs a {kind} compiler on this device, and {' or '.join(candidates)} is not on PATH; install "
        f"it, name another in {variable}, or set compile to false"
    )


def path_with_space() -> str | None:
    """The folder of this Python's packages, if its path has a space; torch and DeepSpeed pass it to g++ unquoted."""
    folder = sysconfig.get_paths()["purelib"]
    return folder if " " in folder else None
