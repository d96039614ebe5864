"""Recognizes files that are often found in place of an image, a tar or a manifest."""

from pathlib import Path

READ_BYTES = 512
TEXT_BYTES = 60
STARTS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself (run `git lfs pull`)",
    b"/annex/objects/": "a pointer of git-annex, not the file itself (run `git annex get`)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd (decompress it with `zstd -d`)",
    b"\x04\x22\x4d\x18": "compressed with lz4 (decompress it with `lz4 -d`)",
    b"PK\x03\x04": "a ZIP archive",
    b"<!doctype html": "an HTML page, such as that of a login or an error",
    b"<html": "an HTML page, such as that of a login or an error",
    b"<?xml": "an XML document, such as the error of an object store",
}
"""First bytes of a file, in lower case, and what it is."""


def described_file(path: Path) -> str | None:
    """`described` for a file; None also if it can't be read."""
    try:
        with path.open("rb") as file:
            return described(file.read(READ_BYTES))
    except OSError:
        return None


def described(content: bytes) -> str | None:
    """What a file with these first bytes is, to follow "it is"; None if it is none of the known kinds."""
    start = content[:READ_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for magic, what in STARTS.items() if start.startswith(magic.lower())), None)


def described_data(content: bytes) -> str | None:
    """`described` for a file that must not be text: names the first words of a text, such as an error message."""
    text = content[:TEXT_BYTES].decode(errors="ignore")
    is_text = len(text.encode()) > len(content[:TEXT_BYTES]) - 4 and all(
        one.isprintable() or one.isspace() for one in text
    )
    return described(content) or (f"text that begins with {text!r}" if text and is_text else None)
