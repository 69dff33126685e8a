"""Replace a file in one step: readers see the old file or the new one, never a part.

The new content is written to a temporary file in the same directory, flushed to the
disk, and renamed. Renaming is atomic on POSIX file systems, so this also holds if the
process is killed at any moment. It does not hold on file systems whose rename is not
atomic (some network shares).

>>> import os, tempfile
>>> from pathlib import Path
>>> path = Path(tempfile.mkdtemp(), "state")
>>> with replacing(path) as temporary:
...     _ = Path(temporary).write_text("new")
...     path.exists()
False
>>> path.read_text()
'new'
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replace_file", "replacing"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name to write to, and then move that file to ``path``.

    The file is on the disk before it gets its name. A process that is killed meanwhile
    leaves a hidden ``.name.<process id>.tmp`` beside it, never a part under ``path``.

    Args:
        path: The file's name. Anything but a regular file (a pipe, a device) is written
            to directly.

    Yields:
        Where to write.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        yield target
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write bytes to a file in one step, readable by the owner only.

    Args:
        path: The file's name.
        content: The whole content.
    """
    with replacing(path) as temporary:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
            file.write(content)
