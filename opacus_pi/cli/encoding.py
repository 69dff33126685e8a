r"""Print every text, also where the output cannot hold all of its characters.

An output may have an encoding without Greek letters: a pipe under Windows, or a process
with ``PYTHONIOENCODING=ascii``. Then letters and signs are replaced by their names in
ASCII, and what has none by an escape. JSON keeps its content: there, all are escapes.

>>> in_ascii("ε ≤ 1, Ünal 🙂")
'epsilon <= 1, \\u00dcnal \\ud83d\\ude42'
"""

import codecs
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unicodedata import name

__all__ = ["in_ascii", "printable_json", "printing_all"]

_HANDLER = "opacus_pi.in_ascii"
_SIGNS = {
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "−": "-",
    "–": "-",
    "—": "-",
    "·": "*",
    "×": "x",
    "±": "+-",
    "→": "->",
    "←": "<-",
    "²": "^2",
    "‖": "||",
    "√": "sqrt",
    "∞": "inf",
    "∈": "in",
    "…": "...",
    "é": "e",  # Rényi
}
_LETTER = "GREEK SMALL LETTER "


def in_ascii(text: str) -> str:
    """Return a text in which all characters that are not ASCII are replaced.

    Args:
        text: Any text.
    """
    return "".join(one if one.isascii() else _replaced(one) for one in text)


def printable_json(text: str) -> str:
    """Return JSON text that the standard output can hold, with the same content.

    Args:
        text: JSON text; only its strings have characters that are not ASCII.
    """
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return "".join(o if o.isascii() else json.dumps(o)[1:-1] for o in text)
    return text


@contextmanager
def printing_all() -> Iterator[None]:
    """Context in which printing never fails because of a character.

    It changes what standard output and error do with characters that their encoding
    lacks, and nothing else. Streams that cannot be changed stay as they are.
    """
    codecs.register_error(_HANDLER, _handled)
    before = [
        (stream, stream.errors)
        for stream in (sys.stdout, sys.stderr)
        if hasattr(stream, "reconfigure")
    ]
    for stream, _ in before:
        stream.reconfigure(errors=_HANDLER)
    try:
        yield
    finally:
        for stream, errors in before:
            if not stream.closed:
                stream.reconfigure(errors=errors)


def _handled(error: UnicodeError) -> tuple[str, int]:
    """Return what to write in place of characters, and where to go on.

    Args:
        error: What the encoder found.

    Raises:
        UnicodeError: If it is about reading.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return in_ascii(error.object[error.start : error.end]), error.end


def _replaced(one: str) -> str:
    """Return what stands for one character that is not ASCII."""
    if one in _SIGNS:
        return _SIGNS[one]
    known = name(one, "")
    if known.startswith(_LETTER) and known.removeprefix(_LETTER).isalpha():
        return known.removeprefix(_LETTER).lower().replace("lamda", "lambda")
    return json.dumps(one)[1:-1]
