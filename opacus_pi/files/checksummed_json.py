"""JSON objects that contain a checksum of their own content.

People may read such a file as text. The checksum detects damage and careless edits. It
does not detect a person who edits the file and computes the checksum again.

>>> facts = with_json_checksum({"accuracy": 0.5, "ids": (0, 1)})
>>> sorted(facts)
['accuracy', 'checksum', 'ids']
>>> require_unedited({**facts, "accuracy": 0.9}, "a.json", "Restore it from a copy.")
Traceback (most recent call last):
    ...
ValueError: a.json does not match its checksum. It was edited or damaged. Restore it from a copy.
"""  # noqa: E501

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from opacus_pi._validate import require
from opacus_pi.files.strict_json import strict

__all__ = ["has_checksum", "require_unedited", "with_json_checksum"]

_CHECKSUM = "checksum"  # the entry that holds it


def with_json_checksum(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts in JSON's own types, with their checksum.

    Args:
        facts: What ``strict_json.json_text`` accepts.

    Returns:
        The same entries, and ``"checksum"``.
    """
    content: dict[str, Any] = strict(facts)
    return {**content, _CHECKSUM: _digest(content)}


def has_checksum(content: Mapping[str, Any]) -> bool:
    """Return whether a parsed file has a checksum; those of earlier releases may not.

    Args:
        content: The parsed file.
    """
    return _CHECKSUM in content


def require_unedited(content: Mapping[str, Any], name: str, remedy: str) -> None:
    """Refuse a parsed file that does not match its checksum.

    Args:
        content: The parsed file.
        name: Its name, for the message.
        remedy: One sentence: what to do about an edited file.

    Raises:
        ValueError: If it was edited or damaged, or has no checksum.
    """
    require(
        content.get(_CHECKSUM) == _digest(content),
        f"{name} does not match its checksum.",
        f"It was edited or damaged. {remedy}",
    )


def _digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of everything but the checksum."""
    rest = {name: value for name, value in content.items() if name != _CHECKSUM}
    text = json.dumps(rest, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
