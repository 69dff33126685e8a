"""Find and remove temporary files and directories of writers that were killed.

A process that is killed with ``kill -9``, or by a power cut, cannot remove the
temporary file that it was writing. The file may hold per-example values, so it should
not stay. A later write to the same name removes it, if it is certain that no process
writes to it any more:

* a writer holds a lock on its temporary file until the file has its final name. The
  system releases the lock when the process ends, however it ends;
* a process that removes a file holds this lock meanwhile, so no writer can be using it;
* locks of some network shares end at one machine. So the name says on which running
  system the file was made: there the lock is enough. A file that was made elsewhere, or
  before the system was started again, must be an hour old. A directory that was made
  elsewhere stays, because a run may be longer than an hour.

A new file may be removed as a stale one before its writer has locked it. ``locked``
then returns False, and the writer creates another file.

**What breaks it.** Systems without ``flock`` (Windows, some shares): there nothing is
removed.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked", "remove_unfinished", "temporary_directory", "temporary_name"]

_OLD = 3600.0  # seconds
_RANDOM = re.compile(r"[0-9a-f]{16}\.tmp")
_BOOT = "/proc/sys/kernel/random/boot_id"  # Linux: another one whenever it is started


def temporary_name(target: Path) -> Path:
    """Return a new name for a temporary file beside its target: hidden, and random.

    Args:
        target: The name that the file will get. A long name is shortened, because
            systems limit the length of names.
    """
    made_on = _system() or secrets.token_hex(4)
    name = f"{_prefix(target)}{made_on}{secrets.token_hex(4)}.tmp"
    return target.with_name(name)


@contextlib.contextmanager
def temporary_directory(target: Path) -> Iterator[Path]:
    """Yield a new hidden directory beside its target, which no other process removes.

    What killed processes left for the target is removed first. The caller fills the
    directory and gives it its name, or removes it.

    Args:
        target: The name that the directory will get.

    Yields:
        The directory, for its owner only.

    Raises:
        OSError: If it cannot be made.
    """
    remove_unfinished(target)
    handle, made = None, False
    while not made:
        part = temporary_name(target)
        try:
            part.mkdir(mode=0o700)
        except FileExistsError:
            continue
        handle = _open_directory(part)
        made = handle is None or (locked(handle) and part.exists())
        if not made and handle is not None:
            os.close(handle)
    try:
        yield part
    finally:
        if handle is not None:
            os.close(handle)


def locked(handle: int) -> bool:
    """Lock a temporary file that was just made, until it is closed.

    Args:
        handle: The open file.

    Returns:
        False if another process is removing it, or has done so: make another one.
    """
    return _lock(handle) is not False and os.fstat(handle).st_nlink > 0


def remove_unfinished(target: Path) -> None:
    """Remove the temporary files that killed processes left for a target.

    Args:
        target: The name that the files would have got. Only files and directories of
            this user beside the target are considered, and only those named by
            ``temporary_name``.
    """
    prefix = _prefix(target)
    try:
        with os.scandir(target.parent) as entries:
            found = [e.path for e in entries if e.name.startswith(prefix)]
    except OSError:  # a directory that may be written to, but not read
        return
    for path in found:
        name = os.path.basename(path)
        if _RANDOM.fullmatch(name, len(prefix)):
            is_here = name.startswith(_system() or "\0", len(prefix))
            _remove_if_unfinished(path, is_here)


def _prefix(target: Path) -> str:
    """Return the beginning of the temporary names of a target."""
    return f".{target.name[:100]}."


@cache
def _system() -> str:
    """Return eight digits of the running system, which shares its locks; or ""."""
    try:
        boot = Path(_BOOT).read_bytes()
    except OSError:
        return ""
    return hashlib.sha256(boot).hexdigest()[:8]


def _open_directory(path: str | Path) -> int | None:
    """Open a directory to lock it; None where the system cannot."""
    flags = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(path, os.O_RDONLY | flags)
    except OSError:
        return None


def _remove_if_unfinished(path: str, is_here: bool) -> None:
    """Remove a file or directory of this user, if no process can be using it.

    Args:
        path: Its name.
        is_here: Whether it was made on this running system.
    """
    handle: int | None
    try:
        handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | _NO_WAIT)
    except IsADirectoryError:
        handle = _open_directory(path) if is_here else None
    except OSError:
        return
    if handle is None:
        return
    try:
        found = os.fstat(handle)
        is_directory = stat.S_ISDIR(found.st_mode)
        is_old = is_here or time.time() - found.st_mtime > _OLD
        is_ours = found.st_uid == _user() and (
            is_directory or stat.S_ISREG(found.st_mode)
        )
        if is_old and is_ours and _lock(handle):
            if is_directory:
                shutil.rmtree(path)
            else:
                os.unlink(path)
    except OSError:
        return
    finally:
        os.close(handle)


_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # opening a pipe of this name must not wait


def _user() -> int:
    """Return the user who owns the files of this process."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _lock(handle: int) -> bool | None:
    """Lock a file without waiting; None where the system cannot lock files."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
