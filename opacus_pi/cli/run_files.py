"""The directory that an unlearning run writes, and errors about it for the user.

``unlearning/saved_result.py`` says what is in it. The directory gets its name only when
all of its files are complete, so a run that was interrupted leaves nothing behind.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from opacus_pi.cli.errors import BadInput, about
from opacus_pi.files.unfinished import temporary_directory
from opacus_pi.unlearning.saved_result import (
    SavedResult,
    load_result,
    read_json_object,
)


@contextmanager
def new_directory(path: str) -> Iterator[Path]:
    """Make a directory that gets its name only when everything in it was written.

    If nothing was written, no directory remains. What a killed run of the same name
    left is removed.

    Args:
        path: Its name. Nothing, or an empty directory, may exist there.

    Yields:
        A temporary directory beside it to write to.

    Raises:
        BadInput: If something exists there, or the directory cannot be made. If
            something came to exist there meanwhile, the result gets another name, which
            the message says.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(
            f"--out: {path} exists already. Name a new directory: results are never "
            "overwritten."
        )
    with ExitStack() as until_named:
        with about("--out", "Name a directory that can be created."):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = until_named.enter_context(temporary_directory(target))
        try:
            yield part
            if any(part.iterdir()):
                _give_name(part, target)
            else:
                part.rmdir()
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def _give_name(part: Path, target: Path) -> None:
    """Rename a directory; if its name was taken meanwhile, keep it under another."""
    try:
        os.replace(part, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        kept = target.with_name(f"{target.name}-{secrets.token_hex(4)}")
        os.replace(part, kept)
        raise BadInput(
            f"--out: another program wrote {target} meanwhile. Nothing is lost: this "
            f"result is in {kept}."
        ) from error


def load_run(directory: str) -> SavedResult:
    """Read the result of a run, all but the weights.

    Args:
        directory: The run's directory.

    Raises:
        BadInput: If a file is missing, damaged or something else.
    """
    remedy = "Name the directory that 'opacus-pi unlearn --out' wrote."
    with about(f"RUN_DIR {directory}", remedy):
        return load_result(directory)


def read_json(argument: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        argument: The argument that names the file, for the error message.
        path: The file.

    Raises:
        BadInput: If the file is missing or its content is not a JSON object.
    """
    with about(argument, "Name a file that opacus-pi wrote."):
        return read_json_object(path)
