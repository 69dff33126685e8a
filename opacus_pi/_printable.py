r"""Escape characters of a text that could act on a terminal or a page.

Names of files, of users and of data sets come from others. A control character in one
could erase lines, change colours, or reverse the order of what follows.

>>> printable("ε = 1\n\x1b[2J")
'ε = 1\n\\x1b[2J'
"""

from unicodedata import category

__all__ = ["in_one_line", "printable"]

# Unicode categories: control, format (direction of text), surrogate, line, paragraph.
_ACTING = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: str) -> str:
    """Return a text with such characters escaped; line breaks and tabulators stay.

    Args:
        text: Any text.
    """
    return "".join(
        one if one in "\n\t" or category(one) not in _ACTING else _escaped(one)
        for one in text
    )


def in_one_line(text: str) -> str:
    r"""Return a text with all such characters escaped, line breaks too.

    For a name within a line, which must not begin another one.

    >>> in_one_line("Ann\nε = 0")
    'Ann\\nε = 0'

    Args:
        text: Any text.
    """
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def _escaped(character: str) -> str:
    r"""Return a character as Python writes it in a text, such as ``\x1b``."""
    if character.isascii():
        return f"\\x{ord(character):02x}"
    return character.encode("ascii", "backslashreplace").decode()
