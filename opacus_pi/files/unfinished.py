"""Find and remove the temporary files of writers that were killed.

A process that is killed with ``kill -9``, or by a power cut, cannot remove the
temporary file that it was writing. The file may hold per-example values, so it should
not stay. A later write to the same name removes it, if it is certain that no process
writes to it any more:

* a writer holds a lock on its temporary file until the file has its final name. The
  system releases the lock when the process ends, however it ends;
* a process that removes a file holds this lock meanwhile, so no writer can be using it;
* the file must be an hour old, for network shares whose locks end at one machine.

A new file may be removed as a stale one before its writer has locked it, if the
writer's clock is an hour behind that of the share. ``locked`` then returns False, and
the writer creates another file.

**What breaks it.** Systems without ``flock`` (Windows, some shares): there nothing is
removed.
"""

import os
import re
import secrets
import stat
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked", "remove_unfinished", "temporary_name"]

_OLD = 3600.0  # seconds
_RANDOM = re.compile(r"[0-9a-f]{16}\.tmp")


def temporary_name(target: Path) -> Path:
    """Return a new name for a temporary file beside its target: hidden, and random.

    Args:
        target: The name that the file will get. A long name is shortened, because
            systems limit the length of names.
    """
    return target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}.tmp")


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
        target: The name that the files would have got. Only files of this user in the
            target's directory are considered, and only those named by
            ``temporary_name``.
    """
    prefix = _prefix(target)
    try:
        with os.scandir(target.parent) as entries:
            found = [e.path for e in entries if e.name.startswith(prefix)]
    except OSError:  # a directory that may be written to, but not read
        return
    for path in found:
        if _RANDOM.fullmatch(os.path.basename(path), len(prefix)):
            _remove_if_unfinished(path)


def _prefix(target: Path) -> str:
    """Return the beginning of the temporary names of a target."""
    return f".{target.name[:100]}."


def _remove_if_unfinished(path: str) -> None:
    """Remove a file if it is old, this user's, and no process holds its lock."""
    try:
        handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | _NO_WAIT)
    except OSError:
        return
    try:
        found = os.fstat(handle)
        is_old = stat.S_ISREG(found.st_mode) and time.time() - found.st_mtime > _OLD
        is_own = found.st_uid == _user()
        if is_old and is_own and _lock(handle):
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
