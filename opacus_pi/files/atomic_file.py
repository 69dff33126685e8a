"""Write files in one step, readable by their owner only, never through a planted link.

``replacing`` writes the new content to a temporary file in the same directory, flushes
it to the disk, and renames it. Renaming is atomic on POSIX file systems, so readers see
the old file or the new one, never a part, even if the process is killed at any moment.
``put_new_file`` does the same for a file that must not exist yet.

*Guarantee.* The temporary file has a random name, is created exclusively and is never
opened by name again. Threads, and processes with equal ids on a shared volume, cannot
write into each other's file, and a file or a link that somebody put there beforehand is
not used. Whatever mode an earlier file had, the new one is readable by its owner only.
A file is replaced only by one of its own kind (``replaced_content``).

*What breaks it.* File systems whose rename is not atomic (some network shares).

>>> import tempfile
>>> path = Path(tempfile.mkdtemp(), "state")
>>> with replacing(path) as file:
...     _ = file.write(b"new")
...     path.exists()
False
>>> path.read_text()
'new'
"""

import contextlib
import errno
import io
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from opacus_pi.files.regular_file import replaceable
from opacus_pi.files.replaced_content import START, require_replaceable
from opacus_pi.files.unfinished import locked, remove_unfinished, temporary_name

__all__ = [
    "put_new_file",
    "replace_file",
    "replacing",
    "restrict_to_owner",
    "sync_directory",
]

_OWNER_ONLY = 0o600
_REMEDIES = {
    errno.ENOSPC: "Free space on the disk, and write it again",
    errno.EDQUOT: "Free space within your quota, and write it again",
    errno.EFBIG: "Raise the limit of the size of a file (ulimit -f), or choose another "
    "place, and write it again",
    errno.ENOENT: "Make the directory first, or choose another place",
    errno.ENOTDIR: "Choose a name in a directory",
    errno.EACCES: "Choose a directory in which you may write",
    errno.EPERM: "Choose a directory in which you may write",
    errno.EROFS: "Choose a place that is not read-only",
}
# "w" would follow a link or reuse a file; O_EXCL refuses both. O_NOFOLLOW and O_CLOEXEC
# do not exist on every system.
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_NEW |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a new file to write to, and then move it to ``path``.

    The content is on the disk before it gets its name. A process that is killed
    meanwhile leaves a hidden ``.name.<digits>.tmp`` beside it, never a part under
    ``path``. The next write to ``path`` removes such files (``files/unfinished.py``).

    Args:
        path: The file's name. A link that belongs to the caller is followed, and its
            target is replaced.

    Yields:
        The file, open for writing, readable by its owner only.

    Raises:
        OSError: If it cannot be written, or if ``path`` is a link that another user put
            into a directory that is not theirs. It names ``path``.
        ValueError: If the name is that of a directory, a pipe, a device, a socket or a
            link that leads back to itself, or of a file with content of another kind,
            which stays as it is.
    """
    _require_own_link(os.fspath(path))
    target = replaceable(path)
    remove_unfinished(target)
    temporary, handle = _new_temporary_file(target)
    raw = _Noting(handle, "wb")
    try:
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            with open(temporary, "rb") as written:
                require_replaceable(target, written.read(START))
            if os.name == "posix":  # while the file is locked
                os.replace(temporary, target)
        if os.name != "posix":  # Windows cannot rename an open file
            os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        fault = raw.fault or error  # torch.save raises another error in its place
        if isinstance(fault, OSError) and fault.filename is None:
            raise _not_written(fault, target) from error
        raise
    sync_directory(target.parent)


class _Noting(io.FileIO):
    """A file that keeps the error with which a write to it failed."""

    fault: OSError | None = None

    def write(self, content: Any) -> int:
        """Write bytes.

        Args:
            content: An object with the buffer protocol.
        """
        try:
            return super().write(content)
        except OSError as error:
            self.fault = error
            raise


def _not_written(fault: OSError, path: Path) -> OSError:
    """Return an error that names the file, what is under its name, and the remedy.

    Args:
        fault: The system's error, which names no file or the temporary one.
        path: The file that was to be written.
    """
    is_kept = "the earlier file of this name is unchanged" if path.exists() else ""
    remedy = _REMEDIES.get(fault.errno or 0, "Choose another place, and write it again")
    return OSError(
        fault.errno,
        f"{fault.strerror or fault}: the file was not written"
        f"{is_kept and ', and '}{is_kept}. {remedy}",
        os.fspath(path),
    )


def _new_temporary_file(target: Path) -> tuple[Path, int]:
    """Make a file beside another one; return its name and its handle, locked."""
    while True:
        temporary = temporary_name(target)
        try:
            handle = os.open(temporary, _NEW, _OWNER_ONLY)
        except OSError as error:  # it names a file that the caller does not know
            raise _not_written(error, target) from error
        if locked(handle):
            return temporary, handle
        os.close(handle)


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write bytes to a file in one step, readable by the owner only.

    Args:
        path: The file's name.
        content: The whole content.
    """
    with replacing(path) as file:
        file.write(content)


def put_new_file(path: Path, write: Callable[[Path], None]) -> bool:
    """Create a file under a free name; leave a file that already has the name.

    The file is written under a hidden name and then linked to its own: under ``path``
    it is never half written, and it never replaces another.

    Args:
        path: The file's name.
        write: Fills an empty file, which only its owner can read, and flushes it to the
            disk.

    Returns:
        Whether the name was free.
    """
    try:
        handle, hidden = tempfile.mkstemp(".tmp", f".{path.name[:100]}.", path.parent)
    except OSError as error:  # it names a file that the caller does not know
        raise _not_written(error, path) from error
    os.close(handle)
    try:
        try:
            write(Path(hidden))
        except OSError as error:
            if error.filename not in (None, hidden):
                raise
            raise _not_written(error, path) from error
        try:
            os.link(hidden, path)
        except FileExistsError:
            return False
        sync_directory(path.parent)
        return True
    finally:
        os.unlink(hidden)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable, after a file was made or renamed.

    Some file systems cannot do that, and a directory that may be written but not read
    cannot be opened: there the names become durable when the system writes them.
    """
    try:
        handle = os.open(directory, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def restrict_to_owner(path: Path) -> None:
    """Remove the permissions of other users from a file, and warn if they had any.

    A file may have such permissions because it was restored from a copy, or created by
    another program. The file is not opened. If it belongs to another user, it is left
    as it is.

    Args:
        path: A file that exists.
    """
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if not mode & 0o077 or not stat.S_ISREG(os.stat(path).st_mode):
        return
    try:
        os.chmod(path, mode & 0o700)
    except PermissionError:
        return
    warnings.warn(
        f"{path} had mode {mode:04o}, so other users of this machine may have read "
        f"it. It is sensitive: its mode is now {mode & 0o700:04o}.",
        stacklevel=3,
    )


def _require_own_link(path: str) -> None:
    """Refuse a link that another user may have planted, as the Linux kernel does.

    In a directory that everybody can write to, such as /tmp, another user can put a
    link under a name that is about to be written, and so choose which file is replaced.
    A link is accepted if it belongs to this user, or to the owner of the directory.
    """
    try:
        found = os.lstat(path)
    except OSError:
        return  # there is no link; other errors are raised when the file is made
    if not stat.S_ISLNK(found.st_mode):
        return
    directory = os.stat(os.path.dirname(path) or ".")
    if found.st_uid not in (os.geteuid(), directory.st_uid):
        raise OSError(
            errno.ELOOP,
            f"The file is a link of user {found.st_uid}, who does not own the "
            "directory; nothing was written through it. Remove the link or choose "
            "another name",
            path,
        )
