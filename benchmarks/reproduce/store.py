"""Results on disk, each under a key made of everything that determines it.

A key is a hash of the kind of result and its facts. Equal facts give the same file, in
any process and on any machine, so interrupted studies continue and figures share jobs.
The name of a data set is not enough: a digest of its content is one of the facts.
A result whose facts are incomplete would be mistaken for another one: whatever changes
a number must be in its facts.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.report import write_json
from opacus_pi.files.atomic_file import replacing

VERSION = 2  # raise it when the meaning of a stored result changes


def path_of(directory: Path, kind: str, facts: Mapping[str, Any], suffix: str) -> Path:
    """Return the path at which the result of these facts is stored."""
    content = json.dumps([VERSION, kind, facts], sort_keys=True, allow_nan=False)
    digest = hashlib.sha256(content.encode()).hexdigest()[:24]
    return directory / kind / f"{digest}{suffix}"


def cached_json(
    directory: Path, kind: str, facts: Mapping[str, Any], compute: Callable[[], Any]
) -> Any:
    """Return a JSON result, computed if it is not stored yet.

    Args:
        directory: The store.
        kind: The kind of result, e.g. ``"unlearning"``; a subfolder of the store.
        facts: Everything that determines the result, as JSON; stored with it, as are
            the seconds that it took.
        compute: Computes the result, as JSON.

    Returns:
        The result as read back from the file, so that a fresh result and a stored one
        are the same (JSON turns tuples into lists).
    """
    path = path_of(directory, kind, facts, ".json")
    found = _read(path)
    if found is None:
        start = time.perf_counter()
        result = compute()
        seconds = round(time.perf_counter() - start, 2)
        write_json(path, {"facts": facts, "seconds": seconds, "result": result})
        found = _read(path)
    return found["result"]


def seconds_of(directory: Path, kind: str, facts: Mapping[str, Any]) -> float | None:
    """Return how long a JSON result took to compute; None if it is not stored."""
    found = _read(path_of(directory, kind, facts, ".json"))
    return None if found is None else float(found["seconds"])


def cached_arrays(
    directory: Path,
    kind: str,
    facts: Mapping[str, Any],
    compute: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Return named arrays, computed if not stored yet; see ``cached_json``."""
    path = path_of(directory, kind, facts, ".npz")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = compute()
        with replacing(path) as file:
            np.savez(file, **arrays)
    with np.load(path, allow_pickle=False) as found:
        return dict(found)


def _read(path: Path) -> dict[str, Any] | None:
    """Return a stored result, or None if it is missing; delete an unreadable file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        os.unlink(path)
        return None
