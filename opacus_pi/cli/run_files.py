"""The directory that an unlearning run leaves, and the answers that go with it.

``weights.safetensors``, ``record.json``, ``trace.json``, ``guarantee.json``; beside
them ``evaluation.json`` once the models were evaluated.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opacus_pi.accounting.guarantee import Guarantee
from opacus_pi.cli.errors import BadInput, about
from opacus_pi.evaluation import UnlearningTrace
from opacus_pi.files.atomic_file import replace_file
from opacus_pi.files.strict_json import json_text
from opacus_pi.files.weights_file import write_weights
from opacus_pi.unlearning import UnlearningResult

WEIGHTS, RECORD, TRACE = "weights.safetensors", "record.json", "trace.json"
GUARANTEE, EVALUATION = "guarantee.json", "evaluation.json"


@dataclass(frozen=True)
class SavedRun:
    """An unlearning run read back, without its model.

    Args:
        trace: The evaluations.
        guarantee: What may be claimed.
        record: What was run.
    """

    trace: UnlearningTrace
    guarantee: Guarantee
    record: dict[str, Any]


@contextmanager
def new_directory(path: str) -> Iterator[Path]:
    """A directory that appears under its name when everything is in it, if anything.

    Args:
        path: Its name; nothing may be there, or an empty directory.

    Yields:
        Where to write meanwhile.

    Raises:
        BadInput: If something is there, or it cannot be made.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(
            f"--out: {path} is there already. Name a new directory: results are never "
            "overwritten."
        )
    part = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with about("--out", "Name a directory that can be made."):
        target.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir(mode=0o700)
    try:
        yield part
        if any(part.iterdir()):
            os.replace(part, target)
        else:
            part.rmdir()
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def save_run(directory: Path, result: UnlearningResult) -> None:
    """Write what a run left."""
    state = result.model.state_dict()
    write_weights(directory / WEIGHTS, "opacus_pi.UnlearnedWeights", 1, state, {})
    replace_file(directory / RECORD, json_text(result.record).encode())
    result.trace.save(directory / TRACE)
    replace_file(directory / GUARANTEE, result.guarantee.to_json().encode())


def load_run(directory: str) -> SavedRun:
    """Read what ``save_run`` wrote.

    Args:
        directory: Its name.

    Raises:
        BadInput: If a file is missing, damaged or something else.
    """
    place = Path(directory)
    remedy = "Name the directory that 'opacus-pi unlearn --out' wrote."
    with about(f"RUN_DIR {directory}", remedy):
        text = (place / GUARANTEE).read_text(encoding="utf-8")
        return SavedRun(
            trace=UnlearningTrace.load(place / TRACE),
            guarantee=Guarantee.from_json(text),
            record=_record(f"RUN_DIR {directory}", place / RECORD),
        )


def _record(argument: str, path: Path) -> dict[str, Any]:
    """What was run; whom it names are lists of whole numbers."""
    record = read_json(argument, path)
    for name in ("forget_indices", "forgotten_before"):
        ids = record.get(name)
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise BadInput(f"{argument}: {path} holds no {name}. Unlearn again.")
    return record


def read_json(argument: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        argument: The argument that named it.
        path: The file.
    """
    with about(argument, "Name a file that opacus-pi wrote."):
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise BadInput(f"{argument}: {path} is no JSON object. Make it again.")
        return content
