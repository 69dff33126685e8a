"""What benchmarks write: JSON, the environment that it was made in, and tables."""

import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opacus_pi.files.atomic_file import replace_file

PACKAGES = ("torch", "opacus", "numpy", "scipy", "scikit-learn", "opacus-pi")


def environment() -> dict[str, Any]:
    """Return versions and machine, without names or paths."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(content, indent=1).encode())


def markdown(rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    head, *body = (list(row) for row in rows)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
