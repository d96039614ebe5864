"""Members of uncompressed tars by offset, against tarfile."""

import tarfile
from pathlib import Path

import pytest

from data_prep.sources.tar_index import Member, open_random_access, tar_members
from tests.data_prep.tar_files import tar_bytes

FILES = [(f"{number}.jpg", bytes([number]) * (300 * number)) for number in range(4)]
ONE = tar_bytes(FILES)


def members(path: Path, content: bytes) -> list[Member]:
    path.write_bytes(content)
    return list(tar_members(open_random_access(path)))


@pytest.mark.parametrize(
    "content", [ONE, ONE + ONE, ONE[: 9 * 512 + 1024] + ONE, ONE + bytes(100 * 512) + ONE, ONE + b"\n"]
)
def test_concatenated_tars_are_read_to_the_last(tmp_path: Path, content: bytes) -> None:
    found = members(tmp_path / "a.tar", content)
    with tarfile.open(tmp_path / "a.tar", ignore_zeros=True) as tar:
        assert [(one.name, one.offset, one.size) for one in found] == [
            (one.name, one.offset_data, one.size) for one in tar
        ]
    assert len(found) in (4, 8)


def test_tars_inside_a_tar_may_be_concatenated_too(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    (inner,) = members(path, tar_bytes([("class.tar", ONE + ONE)]))
    assert [one.name for one in tar_members(open_random_access(path), inner)] == 2 * [name for name, _ in FILES]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ONE + b"x" * 20_000, "is damaged, or not an uncompressed tar, at byte 10240"),
        (ONE[:512] + bytes(512) + b"x" * 20_000, "at byte 10240"),
        (ONE[:512] + bytes(2560) + ONE[3072:], "is damaged at byte 3072 .*after its end-of-archive blocks"),
        (ONE[:-1024] + b"x" * 1024 + ONE, "is damaged at byte 10240 .*after its end-of-archive blocks"),
        (ONE[:512], "is truncated at byte 512"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a.tar is a pointer of Git LFS"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 1000, "a.tar is compressed with zstd"),
    ],
)
def test_other_bytes_behind_the_end_are_damage(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        members(tmp_path / "a.tar", content)
