"""The directory that an unlearning run writes.

It contains ``weights.safetensors``, ``record.json`` (what was run), ``trace.json``
(metrics over epochs), ``guarantee.json`` and, for others, ``guarantee_to_show.json``: a
statement with the requests, the date and the hash of the weights, without the estimate
that only the owner of the data may see. Later ``evaluation.json`` is added, if
the output of ``opacus-pi evaluate`` is put there. The directory gets its name only when
all of its files are complete, so a run that was interrupted leaves nothing behind.
"""

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opacus_pi.accounting.guarantee import Guarantee
from opacus_pi.cli.errors import BadInput, about
from opacus_pi.evaluation import UnlearningTrace
from opacus_pi.files.atomic_file import replace_file
from opacus_pi.files.checksummed_json import (
    has_checksum,
    require_unedited,
    with_json_checksum,
)
from opacus_pi.files.kinds import UNLEARNED_WEIGHTS
from opacus_pi.files.plain_json import plain_json
from opacus_pi.files.regular_file import require_regular
from opacus_pi.files.strict_json import json_text
from opacus_pi.files.weights_file import write_weights
from opacus_pi.unlearning import UnlearningResult, deletion_statement
from opacus_pi.unlearning.honouring_weights import sha256_of

WEIGHTS, RECORD, TRACE = "weights.safetensors", "record.json", "trace.json"
GUARANTEE, EVALUATION = "guarantee.json", "evaluation.json"
TO_SHOW = "guarantee_to_show.json"
_HASHED = (TRACE, GUARANTEE, WEIGHTS, TO_SHOW)  # by the record
# They may be kept elsewhere; records of earlier releases do not have their hashes.
_MAY_BE_ABSENT = (WEIGHTS, TO_SHOW)
_UNEDITED = "Restore it from a copy, or unlearn again."
RUN_FILES = (WEIGHTS, RECORD, TRACE, GUARANTEE, TO_SHOW, EVALUATION)


@dataclass(frozen=True)
class SavedRun:
    """An unlearning run read back, without its model.

    Args:
        trace: The metrics over the run.
        guarantee: What may be claimed about the weights.
        record: What was run, with the forgotten examples.
        unchecked: Sentences about what could not be checked.
    """

    trace: UnlearningTrace
    guarantee: Guarantee
    record: dict[str, Any]
    unchecked: tuple[str, ...] = ()


@contextmanager
def new_directory(path: str) -> Iterator[Path]:
    """Make a directory that gets its name only when everything in it was written.

    If nothing was written, no directory remains.

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
    with about("--out", "Name a directory that can be created."):
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{target.name[:100]}."
        part = Path(tempfile.mkdtemp(".tmp", prefix, target.parent))  # mode 0700
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


def save_run(directory: Path, result: UnlearningResult, delta: float) -> None:
    """Write the result of a run into an empty directory.

    Args:
        directory: The directory, such as ``new_directory`` yields.
        result: What ``Unlearner.unlearn`` returned.
        delta: δ at which the statement for others says ε.
    """
    state = result.model.state_dict()
    write_weights(directory / WEIGHTS, UNLEARNED_WEIGHTS, state, {})
    result.trace.save(directory / TRACE)
    replace_file(directory / GUARANTEE, result.guarantee.to_json().encode())
    shown = deletion_statement(result, delta, weights_path=directory / WEIGHTS)
    replace_file(directory / TO_SHOW, shown.to_json().encode())
    files = {name: sha256_of(directory / name) for name in _HASHED}
    record = with_json_checksum({**result.record, "files": files})
    replace_file(directory / RECORD, json_text(record).encode())


def load_run(directory: str) -> SavedRun:
    """Read what ``save_run`` wrote, all but the weights.

    Args:
        directory: The run's directory.

    Raises:
        BadInput: If a file is missing, damaged or something else.
    """
    place = Path(directory)
    remedy = "Name the directory that 'opacus-pi unlearn --out' wrote."
    with about(f"RUN_DIR {directory}", remedy):
        guarantee = read_guarantee(place / GUARANTEE)
        record = _record(f"RUN_DIR {directory}", place / RECORD)
        return SavedRun(
            trace=UnlearningTrace.load(place / TRACE),
            guarantee=guarantee,
            record=record,
            unchecked=_require_own_files(place, record),
        )


def read_guarantee(path: Path) -> Guarantee:
    """Read a guarantee; an error names the file.

    Args:
        path: What ``save_run`` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, edited or something else.
    """
    require_regular(path)
    try:
        return Guarantee.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _require_own_files(directory: Path, record: dict[str, Any]) -> tuple[str, ...]:
    """Refuse a trace, guarantees or weights that another run wrote.

    Args:
        directory: The run's directory.
        record: Its record, which has hashes of the files, and a checksum.

    Returns:
        A sentence, if the record is of an earlier release and lacks one of these.

    Raises:
        BadInput: If a file has another hash, or the record was edited.
    """
    hashes = record.get("files")
    if not isinstance(hashes, dict) or not has_checksum(record):
        return (
            f"Whether {TRACE}, {GUARANTEE} and {RECORD} are of the same run is not "
            "known, because an earlier release wrote them. Compare them yourself.",
        )
    with about(f"RUN_DIR {directory}", _UNEDITED):
        require_unedited(record, RECORD, _UNEDITED)
    for name in _HASHED:
        path = directory / name
        if name in _MAY_BE_ABSENT and not (name in hashes and path.exists()):
            continue
        if hashes.get(name) != sha256_of(path):
            raise BadInput(
                f"RUN_DIR {directory}: {name} is not the file that {RECORD} names, so "
                "it is of another run. Restore both from a copy, or unlearn again."
            )
    return ()


def _record(argument: str, path: Path) -> dict[str, Any]:
    """Read what was run; the forgotten examples must be lists of whole numbers.

    The record is JSON, because people may read and archive it as text. The
    report counts the lists and looks up the losses of the examples, so their form is
    checked.

    Args:
        argument: The argument that names the directory, for the message.
        path: The file.
    """
    record = read_json(argument, path)
    for name in ("forget_indices", "forgotten_before"):
        ids = record.get(name)
        if not isinstance(ids, list) or not all(
            type(i) is int and 0 <= i < 1 << 63 for i in ids
        ):
            raise BadInput(
                f"{argument}: {path} has no list of whole numbers named {name}. Run "
                "'opacus-pi unlearn' again."
            )
    return record


def read_json(argument: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        argument: The argument that names the file, for the error message.
        path: The file.

    Raises:
        BadInput: If the file is missing or its content is not a JSON object.
    """
    with about(argument, "Name a file that opacus-pi wrote."):
        require_regular(path)
        try:
            content = plain_json(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise BadInput(
                f"{argument}: {path} is not a JSON object. Run the command that wrote "
                "it again."
            )
        return content
