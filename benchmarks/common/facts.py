"""What determines a result, as JSON; keys stay the same when a field is added.

A stored result is found under a key made of its facts, the fields of a dataclass. If
the dataclass gets a new field whose default is what was always done, old results are
still valid and must keep their keys. ``later`` marks such a field, and ``facts_of``
leaves it out as long as it has its default.

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
    """Return a dataclass field that was added after results had been stored.

    Args:
        default: The value that corresponds to what was done before.
    """
    return field(default=default, metadata={_LATER: True})


def facts_of(value: Any) -> Any:
    """Return a dataclass as a dict, without later fields that have their default."""
    if isinstance(value, tuple | list):
        return type(value)(map(facts_of, value))
    if not is_dataclass(value):
        return value
    return {
        one.name: facts_of(getattr(value, one.name))
        for one in fields(value)
        if not (one.metadata.get(_LATER) and getattr(value, one.name) == one.default)
    }
