"""Memory is constant: ten times the images take as much."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.palette.codec import save_palette
from tests.data_prep.tar_files import encode_image, tar_bytes

ROOT = Path(__file__).parents[3]
FEW, MANY = 1_500, 15_000
PROGRAM = """
import resource, runpy, sys
try:
    runpy.run_module("data_prep", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


def write_folder(folder: Path, images: list[bytes], count: int) -> list[str]:
    for number in range(count):
        file = folder / f"train/class{number % 10}/a_name_as_long_as_imagenets_{number:08d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(images[number % len(images)])
    return ["--source.kind", "image_folder", "--source.path", str(folder)]


def write_tars(folder: Path, images: list[bytes], count: int) -> list[str]:
    """The same number of tars, larger ones: more of them would be no harder."""
    folder.mkdir()
    for tar in range(3):
        members = [(f"{number:08d}.jpg", images[number % len(images)]) for number in range(count // 3)]
        (folder / f"{tar:05d}.tar").write_bytes(tar_bytes(members))
    return ["--source.kind", "webdataset", "--source.path", str(folder)]


def peak_kilobytes(options: list[str], palette: Path, out: Path, workers: int) -> int:
    command = [sys.executable, "-c", PROGRAM, "shards", *options, "--palette.file", str(palette)]
    command += ["--workers", str(workers), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize("write", [write_folder, write_tars])
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ten_times_the_images_take_no_more_memory(
    write: object, workers: int, tmp_path: Path, small: tuple[np.ndarray, np.ndarray]
) -> None:
    assert callable(write)
    images = [encode_image(pixels, "jpeg") for pixels in small[0]]
    save_palette(tmp_path / "palette.npy", np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32))
    peaks = []
    for count in (FEW, MANY):
        options = write(tmp_path / f"{count}", images, count)
        peaks.append(peak_kilobytes(options, tmp_path / "palette.npy", tmp_path / f"{count}-out", workers))
    assert peaks[1] < 1.1 * peaks[0], peaks
