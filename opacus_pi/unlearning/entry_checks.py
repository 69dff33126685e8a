"""Check the parts of a log entry before it is written.

An entry cannot be taken back. One that could not be read again would block the log for
ever, so whatever is appended is checked first.

>>> payload_text({"indices": [3, 5]})
'{"indices":[3,5]}'
>>> payload_text([3, 5])
Traceback (most recent call last):
    ...
ValueError: payload must be a mapping of names to facts, got list. Pass a dict whose keys are strings.
"""  # noqa: E501

import json
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from opacus_pi._validate import expect

__all__ = ["payload_text", "plain_name", "require_kind", "require_name"]

_MAX_DEPTH = 100  # levels of a payload; far from where Python's JSON gives up
_MAX_NAME = 65_536  # characters
_MAX_DIGITS = 1000  # of a whole number as a name


def payload_text(payload: Mapping[str, Any]) -> str:
    """Return the canonical text of a payload.

    Args:
        payload: JSON-able facts by name.

    Raises:
        TypeError: If it is not JSON-able.
        ValueError: If it could not be read back: it is no mapping, has NaN or infinity,
            or is nested more than a hundred levels deep.
    """
    expect(
        isinstance(payload, Mapping),
        "payload",
        type(payload).__name__,
        "must be a mapping of names to facts",
        "Pass a dict whose keys are strings.",
    )
    others = [key for key in payload if not isinstance(key, str)]
    expect(
        not others,
        "payload",
        f"the key {others[0]!r}" if others else None,
        "must have strings as keys",
        "Pass a dict whose keys are strings.",
    )
    text = json.dumps(
        dict(payload), sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    expect(
        _depth(payload) <= _MAX_DEPTH,
        "payload",
        "more",
        f"must be nested at most {_MAX_DEPTH} levels deep",
        "Flatten the payload: a deeper one could not be read back.",
    )
    return text


def _depth(value: Any) -> int:
    """Return how deep containers are nested, at most one more than the limit."""
    level: list[Any] = [value]
    for depth in range(_MAX_DEPTH + 1):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, Mapping):
                inner.extend(one.values())
            elif isinstance(one, list | tuple):
                inner.extend(one)
        if not inner:
            return depth
        level = inner
    return _MAX_DEPTH + 1


def require_kind(kind: Any) -> None:
    """Refuse a kind that is no printable text.

    Args:
        kind: What happened, as the caller names it.

    Raises:
        ValueError: If it is anything but a short text.
    """
    expect(
        isinstance(kind, str) and 0 < len(kind) <= 100 and kind.isprintable(),
        "kind",
        repr(kind),
        "must be a printable text of at most 100 characters",
        'Name what happened in a word, such as "request".',
    )


def require_name(name: Any) -> None:
    """Refuse a name that is neither None nor a text of reasonable length.

    Args:
        name: The entry's name, as the caller gives it.

    Raises:
        ValueError: If it is anything else.
    """
    expect(
        name is None or (isinstance(name, str) and len(name) <= _MAX_NAME),
        "name",
        f"{len(name)} characters" if isinstance(name, str) else repr(name),
        f"must be a string of at most {_MAX_NAME} characters, or None",
        "Use a short name that no other entry has.",
    )


def plain_name(argument: str, name: Any) -> str:
    """Return a string, or a whole number's decimal digits.

    Args:
        argument: What is named, for the message.
        name: Of any type.

    Raises:
        ValueError: If it is neither.
    """
    whole = isinstance(name, Integral) and abs(int(name)) < 10**_MAX_DIGITS
    expect(
        (whole and not isinstance(name, bool)) or isinstance(name, str),
        argument,
        f"a number of more than {_MAX_DIGITS} digits"
        if isinstance(name, Integral) and not whole
        else repr(name),
        "must be a string or a whole number",
        "Convert it with str(...).",
    )
    return str(name)
