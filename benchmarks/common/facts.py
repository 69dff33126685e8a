"""What determines a result, as JSON, for keys that survive the growth of the code.

A stored result is found under a key made of the facts of its description. When a
description gets a new field, whose default means what was always done, the old results
stay valid and must keep their keys. So ``later`` marks such a field, and ``facts_of``
leaves it out while it has its default.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Recipe:
...     model: str
...     precision: str = later("float32")
>>> facts_of(Recipe("mlp"))
{'model': 'mlp'}
>>> facts_of(Recipe("mlp", "bfloat16"))
{'model': 'mlp', 'precision': 'bfloat16'}
"""

from dataclasses import field, fields, is_dataclass
from typing import Any

_LATER = "added after results had been stored"


def later(default: Any) -> Any:
    """A field that came after results had been stored.

    Args:
        default: What was done before there was the field.
    """
    return field(default=default, metadata={_LATER: True})


def facts_of(value: Any) -> Any:
    """A dataclass as ``asdict`` gives it, without later fields at their defaults."""
    if isinstance(value, tuple | list):
        return type(value)(map(facts_of, value))
    if not is_dataclass(value):
        return value
    return {
        one.name: facts_of(getattr(value, one.name))
        for one in fields(value)
        if not (one.metadata.get(_LATER) and getattr(value, one.name) == one.default)
    }
