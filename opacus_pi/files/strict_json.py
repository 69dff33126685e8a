"""Write JSON that every reader accepts: without NaN, infinity and NumPy types.

Python writes ``NaN`` and ``Infinity`` into JSON, which the standard does not allow and
other languages refuse. Here such numbers become strings.

>>> json_text({"epsilon": float("inf"), "ids": np.arange(2)}, indent=None)
'{"epsilon": "inf", "ids": [0, 1]}'
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np

__all__ = ["json_text", "strict"]


def json_text(facts: Any, indent: int | None = 1) -> str:
    """Return JSON text; numbers that are not finite become strings such as "inf".

    Characters that are not printable are escaped, so that a string from a file cannot
    control the terminal on which it is printed.

    Args:
        facts: Mappings, sequences, arrays, dataclasses, strings and numbers.
        indent: Spaces for each level of nesting. None: everything on one line.
    """
    text = json.dumps(strict(facts), indent=indent, ensure_ascii=False, allow_nan=False)
    if text.isprintable():
        return text
    # Only strings can hold such characters, and JSON's escapes leave them as they were.
    return "".join(
        one if one in "\n " or one.isprintable() else json.dumps(one)[1:-1]
        for one in text
    )


def strict(value: Any) -> Any:
    """Return the same facts in JSON's own types.

    Args:
        value: Any value that ``json_text`` accepts.
    """
    if isinstance(value, np.ndarray | np.generic):
        return strict(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return strict(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [strict(entry) for entry in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value
