"""The files of an unlearning run: save a result, and read it back.

The directory contains ``weights.safetensors``, ``record.json`` (what was run),
``trace.json`` (metrics over epochs), ``guarantee.json`` and, for others,
``guarantee_to_show.json``: a statement with the requests, the date and the hash of the
weights, without the estimate that only the owner of the data may see. Later
``evaluation.json`` is added, if the output of ``opacus-pi evaluate`` is put there. The
record is written last and has the hashes of the others.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opacus_pi._shown import Shown
from opacus_pi._validate import expect
from opacus_pi.accounting.conversion import check_delta
from opacus_pi.accounting.guarantee import Guarantee
from opacus_pi.evaluation.trace import UnlearningTrace
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
from opacus_pi.models.weights_name import weights_name
from opacus_pi.unlearning.deletion_statements import statement_of
from opacus_pi.unlearning.honouring_weights import sha256_of
from opacus_pi.unlearning.unlearner import UnlearningResult

__all__ = ["SavedResult", "load_result", "save_result"]

WEIGHTS, RECORD, TRACE = "weights.safetensors", "record.json", "trace.json"
GUARANTEE, EVALUATION = "guarantee.json", "evaluation.json"
TO_SHOW = "guarantee_to_show.json"
_HASHED = (TRACE, GUARANTEE, WEIGHTS, TO_SHOW)  # by the record
# They may be kept elsewhere; records of earlier releases do not have their hashes.
_MAY_BE_ABSENT = (WEIGHTS, TO_SHOW)
_UNEDITED = "Restore it from a copy, or unlearn again."
RUN_FILES = (WEIGHTS, RECORD, TRACE, GUARANTEE, TO_SHOW, EVALUATION)


@dataclass(frozen=True, repr=False)
class SavedResult(Shown):
    """An unlearning run read back, without its model.

    Args:
        trace: The metrics over the run.
        guarantee: What may be claimed about the weights.
        record: What was run, with the forgotten examples. What could not be checked
            about the files is in ``record["not_checked"]``, in sentences.
    """

    trace: UnlearningTrace
    guarantee: Guarantee
    record: dict[str, Any]

    def _shown(self) -> dict[str, Any]:
        return {
            "method": self.record.get("method"),
            "evaluations": len(self.trace),
            "guarantee": self.guarantee.kind,
        }


def save_result(
    directory: str | os.PathLike[str], result: UnlearningResult, delta: float = 1e-5
) -> None:
    """Write the result of a run into a directory, as ``opacus-pi unlearn --out`` does.

    ``load_result`` and ``opacus-pi report`` read it. If the process is killed while it
    writes, the directory has no record, and both refuse it.

    Args:
        directory: Is made if it does not exist; must be empty. Only its owner can read
            the files, which list the forgotten examples.
        result: What ``unlearn``, ``rewind`` or an entry of what ``process`` returned.
        delta: δ in (0, 1) at which the statement for others says ε.

    Raises:
        FileExistsError: If the directory has files: results are never overwritten.
        ValueError: If ``delta`` is not in (0, 1), or the model was changed after the
            run.
        OSError: If it cannot be written.
    """
    check_delta(delta)
    left = result.record.get("unlearned_weights")
    expect(
        not left or left == weights_name(result.model),
        "result",
        "a model with other weights than those that the run left",
        "must have the model as the run left it",
        "Save the result before the model is changed.",
    )
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(
            f"{directory} exists already. Name a new directory: results are never "
            "overwritten."
        )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = result.model.state_dict()
    write_weights(directory / WEIGHTS, UNLEARNED_WEIGHTS, state, {})
    result.trace.save(directory / TRACE)
    replace_file(directory / GUARANTEE, result.guarantee.to_json().encode())
    shown = statement_of(result, delta, sha256_of(directory / WEIGHTS))
    replace_file(directory / TO_SHOW, shown.to_json().encode())
    files = {name: sha256_of(directory / name) for name in _HASHED}
    record = with_json_checksum({**result.record, "files": files})
    replace_file(directory / RECORD, json_text(record).encode())


def load_result(directory: str | os.PathLike[str]) -> SavedResult:
    """Read what ``save_result`` wrote, all but the weights.

    What it returns can be passed to ``write_report(result=...)``. The weights are in
    the file ``weights.safetensors``.

    Args:
        directory: The run's directory.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, of another run or something else.
    """
    place = Path(directory)
    guarantee = read_guarantee(place / GUARANTEE)
    record = _record(place / RECORD)
    return SavedResult(
        trace=UnlearningTrace.load(place / TRACE),
        guarantee=guarantee,
        record={**record, "not_checked": [*_require_own_files(place, record)]},
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
        ValueError: If a file has another hash, or the record was edited.
    """
    hashes = record.get("files")
    if not isinstance(hashes, dict) or not has_checksum(record):
        return (
            f"Whether {TRACE}, {GUARANTEE} and {RECORD} are of the same run is not "
            "known, because an earlier release wrote them. Compare them yourself.",
        )
    require_unedited(record, RECORD, _UNEDITED)
    for name in _HASHED:
        path = directory / name
        if name in _MAY_BE_ABSENT and not (name in hashes and path.exists()):
            continue
        if hashes.get(name) != sha256_of(path):
            raise ValueError(
                f"{name} is not the file that {RECORD} names, so "
                "it is of another run. Restore both from a copy, or unlearn again."
            )
    return ()


def _record(path: Path) -> dict[str, Any]:
    """Read what was run; the forgotten examples must be lists of whole numbers.

    The record is JSON, because people may read and archive it as text. The
    report counts the lists and looks up the losses of the examples, so their form is
    checked.

    Args:
        path: The file.
    """
    record = read_json_object(path)
    for name in ("forget_indices", "forgotten_before"):
        ids = record.get(name)
        if not isinstance(ids, list) or not all(
            type(i) is int and 0 <= i < 1 << 63 for i in ids
        ):
            raise ValueError(
                f"{path} has no list of whole numbers named {name}. Run 'opacus-pi "
                "unlearn' again."
            )
    return record


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its content is not a JSON object.
    """
    require_regular(path)
    try:
        content = plain_json(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(
            f"{os.fspath(path)} is not a JSON object. Run the command that wrote it "
            "again."
        )
    return content
