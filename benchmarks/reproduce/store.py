"""Results on disk under a key made of everything that determines them."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.report import write_json
from opacus_pi.files.atomic_file import replacing

VERSION = 1  # raise it when the meaning of a stored result changes


def path_of(directory: Path, kind: str, facts: Mapping[str, Any], suffix: str) -> Path:
    """Where a result of these facts is kept."""
    content = json.dumps([VERSION, kind, facts], sort_keys=True, allow_nan=False)
    digest = hashlib.sha256(content.encode()).hexdigest()[:24]
    return directory / kind / f"{digest}{suffix}"


def cached_json(
    directory: Path, kind: str, facts: Mapping[str, Any], compute: Callable[[], Any]
) -> Any:
    """A JSON result, computed unless it is there.

    Args:
        directory: The store.
        kind: What it is, e.g. ``"unlearning"``.
        facts: Everything that determines it, as JSON; kept beside the result.
        compute: Makes the result, as JSON.

    Returns:
        The result as it reads from the file, computed or not.
    """
    path = path_of(directory, kind, facts, ".json")
    found = _read(path)
    if found is None:
        write_json(path, {"facts": facts, "result": compute()})
        found = _read(path)
    return found["result"]


def cached_arrays(
    directory: Path,
    kind: str,
    facts: Mapping[str, Any],
    compute: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Named arrays, computed unless they are there; see ``cached_json``."""
    path = path_of(directory, kind, facts, ".npz")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = compute()
        with replacing(path) as part, open(part, "wb") as file:
            np.savez(file, **arrays)
    with np.load(path, allow_pickle=False) as found:
        return dict(found)


def _read(path: Path) -> dict[str, Any] | None:
    """A stored result, or None where there is none that is whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        os.unlink(path)
        return None
