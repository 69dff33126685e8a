"""Refuse names of anything but a regular file, before it is opened.

Opening a pipe waits until another program opens its other end, perhaps for ever.
Reading a device may never end, and data written to it are lost. A link that leads back
to itself points to no file, and renaming a file to it would silently remove the link.
So every function of the package that reads or writes a named file calls one of the two
functions here first.

**What breaks it.** Another program that replaces the file after the check.

>>> require_regular("/dev/null")
Traceback (most recent call last):
    ...
ValueError: path must name a regular file, not a device, got /dev/null. It can be read only once or never ends: save its content to a file first.
"""  # noqa: E501

import os
import stat
from pathlib import Path

from opacus_pi._validate import expect

__all__ = ["replaceable", "require_readable_once", "require_regular"]

_READ_ONCE = "It can be read only once or never ends: save its content to a file first."
_DESCRIPTORS = ("/dev/fd", "/proc/self/fd")
_NOT_REPLACED = "Nothing was written. Pass the name of a new or an existing file."
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link that leads back to itself",
}


def require_regular(path: str | os.PathLike[str]) -> None:
    """Refuse to read anything but a regular file.

    Args:
        path: The file's name. Links are followed.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be looked at, because of permissions or a link that leads
            back to itself.
        ValueError: If it is a directory, a pipe, a device or a socket.
    """
    _require(path, os.stat(path).st_mode, {stat.S_IFDIR: "Pass the file's name."})


def require_readable_once(path: str | os.PathLike[str]) -> None:
    """Refuse to read anything but a regular file, or a pipe that is open already.

    A shell passes ``<(command)`` as the name of a pipe that it has opened, such as
    ``/dev/fd/63``. It can be read once, from beginning to end. A pipe with a name in a
    directory is refused: opening it would wait until something is written to it.

    Args:
        path: The file's name. The caller reads it once, and does not go back in it.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: As ``require_regular`` does.
        ValueError: As ``require_regular`` does, except for open pipes.
    """
    if not (_is_open_already(path) and stat.S_ISFIFO(os.stat(path).st_mode)):
        require_regular(path)


def _is_open_already(path: str | os.PathLike[str]) -> bool:
    """Return whether a name is that of a descriptor that this process has open."""
    name = os.path.abspath(path)
    return name == "/dev/stdin" or os.path.dirname(name) in _DESCRIPTORS


def replaceable(path: str | os.PathLike[str]) -> Path:
    """Return the path that a writer replaces or creates; refuse all but regular files.

    Args:
        path: The file's name; it need not exist. A link is followed.

    Returns:
        The path with all links followed.

    Raises:
        ValueError: If a directory, a pipe, a device, a socket or a link that leads back
            to itself has the name.
    """
    target = os.path.realpath(path)
    try:
        mode = os.lstat(target).st_mode
    except OSError:
        return Path(target)  # there is no file; other errors are raised when it is made
    _require(path, mode, dict.fromkeys(_KINDS, _NOT_REPLACED))
    return Path(target)


def _require(path: str | os.PathLike[str], mode: int, remedies: dict[int, str]) -> None:
    """Refuse what is not a regular file.

    Args:
        path: The name, for the message.
        mode: The file's type and permissions, as ``os.stat`` returns them.
        remedies: What the user can do, by the type of file.
    """
    kind = stat.S_IFMT(mode)
    expect(
        kind == stat.S_IFREG,
        "path",
        os.fspath(path),
        f"must name a regular file, not {_KINDS.get(kind, 'another kind of file')}",
        remedies.get(kind, _READ_ONCE),
    )
