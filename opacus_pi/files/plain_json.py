"""JSON without names that are given twice.

Python takes the last of two equal names, other programs take the first. A file with
both could be verified by one reader and say something else to the next.

>>> plain_json('{"a": 1}')
{'a': 1}
>>> plain_json('{"a": 1, "a": 2}')
Traceback (most recent call last):
    ...
ValueError: the name 'a' is given twice
"""

import json
from typing import Any

__all__ = ["plain_json"]


def plain_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Args:
        text: The text.

    Raises:
        ValueError: If it is no JSON, or an object has a name twice.
        RecursionError: If it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_distinct)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of an object as a dict, if no name is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} is given twice")
    return found
