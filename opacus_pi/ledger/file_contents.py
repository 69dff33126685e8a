"""Hashes of the files that hold examples.

A small file is read as a whole. Of a large one blocks are read: both ends, and others
whose places are drawn from its size, so that they are the same whenever the file is
looked at. What was read is kept for as long as neither size nor times of the file have
changed.

*What breaks it:* a change of a large file between the blocks. It is said that such
files are compared in drawn blocks.
"""

import functools
import hashlib
import os
import random
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FileContent", "content_of", "is_file"]

_END = 1 << 12  # bytes that are read at each end
_WHOLE = 1 << 18  # bytes of a file that is read as a whole
_BLOCK, _NUM_BLOCKS = 1 << 12, 32


@dataclass(frozen=True)
class FileContent:
    """What was read of a file.

    Args:
        ends: Size, and a hash of both ends.
        content: Size, and a hash of all that was read.
        is_whole: Whether all of it was read.
    """

    ends: str
    content: str
    is_whole: bool = True


def is_file(path: Path) -> bool:
    """Return whether this is a regular file; a text that cannot be a name is not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def content_of(path: Path) -> FileContent:
    """Return what identifies the content of a file.

    Args:
        path: The file; it need not exist.
    """
    if not is_file(path):
        return FileContent("missing", "missing")
    try:
        found = path.stat()
        times = found.st_mtime_ns, found.st_ctime_ns
        return _read(os.path.abspath(path), found.st_size, found.st_ino, times)
    except OSError:
        return FileContent("unreadable", "unreadable", is_whole=False)


@functools.lru_cache(maxsize=1 << 13)
def _read(path: str, size: int, _inode: int, _times: tuple[int, int]) -> FileContent:
    """Read a file; the answer is kept until one of the other arguments changes."""
    with open(path, "rb") as file:
        first = file.read(_END)
        file.seek(max(0, size - _END))
        last = file.read(_END)
        whole = hashlib.sha256()
        for start, length in _blocks(size):
            file.seek(start)
            whole.update(file.read(length))
    ends = hashlib.sha256(first + last).hexdigest()[:16]
    content = f"{size}:{whole.hexdigest()[:16]}"
    return FileContent(f"{size}:{ends}", content, is_whole=size <= _WHOLE)


def _blocks(size: int) -> list[tuple[int, int]]:
    """Return the places and lengths of the blocks to read of a file."""
    if size <= _WHOLE:
        return [(0, size)]
    draw = random.Random(size)
    drawn = sorted(draw.randrange(size - _BLOCK) for _ in range(_NUM_BLOCKS))
    return [(start, _BLOCK) for start in (0, *drawn, size - _BLOCK)]
