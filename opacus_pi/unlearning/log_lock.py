"""One process at a time carries out the requests of a log."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opacus_pi._errors import LogInUseError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Context in which no other process carries out requests about this model.

    Two processes that unlearn at once would each overwrite the other's weights. The
    lock is a file beside the log; the system releases it when a process ends, even
    if that was killed.

    Args:
        path: The deletion log.

    Raises:
        LogInUseError: If another process carries out requests.
        OSError: If the lock file cannot be opened.
    """
    place = f"{path}.lock"
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        handle = os.open(place, flags, 0o600)
    except OSError as error:
        words = (
            "The lock file is a link, which is not opened. Remove it and call "
            "process again"
            if error.errno == errno.ELOOP
            else f"{error.strerror}: requests are carried out with a lock file "
            "beside the log. Keep the log in a directory in which you may write"
        )
        raise OSError(error.errno, words, place) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LogInUseError(
                f"{path}: another process is carrying out requests. "
                "Wait until it is done, and repeat this."
            ) from error
        yield
    finally:
        os.close(handle)
