r"""How an object shows itself: one line as text, and a small table in Jupyter.

A class names its facts once, in ``_shown``; both forms are made from them. Facts are
settings, sizes and names, never a number that was measured on an example or on a forget
set, because the output of a notebook is shared more freely than a ledger.

>>> class Run(Shown):
...     _note = "it is short"
...
...     def _shown(self):
...         return {"num_steps": 100, "name": "<first>", "noise_std": np.ones(9) / 3}
>>> Run()
Run(num_steps=100, name='<first>', noise_std=0.3333; it is short)
>>> Run()._repr_html_()[:57]
'<table><caption>Run</caption>\n<tr><th>num_steps</th><td>1'
"""

import re
import reprlib
from collections.abc import Mapping
from html import escape
from typing import Any, ClassVar

import numpy as np

from opacus_pi._printable import printable

__all__ = ["Shown", "stable_repr"]

_LONGEST = 80  # characters of one fact
_LONGEST_REPR = 1 << 16
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")
_MODULES = re.compile(r"(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_<])")


class Shown:
    """Base of objects that show themselves in a shell and in Jupyter."""

    _note: ClassVar[str] = ""  # a sentence that follows the facts

    def _shown(self) -> Mapping[str, Any]:
        """Return the facts to show, by the name of the attribute that has them."""
        raise NotImplementedError

    def __repr__(self) -> str:
        facts = ", ".join(
            f"{name}={_cut(repr(_plain(value)))}"
            for name, value in self._shown().items()
        )
        note = f"; {self._note}" if self._note else ""
        return f"{type(self).__name__}({facts}{note})"

    def _repr_html_(self) -> str:
        """Return the facts as a table, which Jupyter shows in place of the text."""
        rows = "\n".join(
            f"<tr><th>{_html(name)}</th><td>{_html(_plain(value))}</td></tr>"
            for name, value in self._shown().items()
        )
        note = f"\n<p>{_html(self._note)}</p>" if self._note else ""
        caption = f"<caption>{_html(type(self).__name__)}</caption>"
        return f"<table>{caption}\n{rows}\n</table>{note}"


def _plain(value: Any) -> Any:
    """Return a fact as it is written: numbers short, arrays as the range they span."""
    if isinstance(value, np.ndarray):
        low, high = float(value.min()), float(value.max())
        return _plain(low) if low == high else f"{low:.4g} to {high:.4g}"
    if isinstance(value, float | np.floating):
        return float(f"{value:.4g}")
    return value


def _html(value: Any) -> str:
    """Return a value as text that a page shows as it is."""
    return escape(_cut(printable(" ".join(str(value).split()))))


def _cut(text: str) -> str:
    """Return a text of at most the length that a fact may have."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def stable_repr(value: Any, depth: int = 3) -> str:
    """Return a text of an object and its settings that is the same in every process.

    Addresses in memory and the modules of classes are left out: a class of a script is
    in ``__main__`` when the script runs, and in another module when it is imported. An
    object without a ``repr`` of its own is described by its class and its attributes.

    >>> class Flip:
    ...     def __init__(self, p):
    ...         self.p = p
    >>> stable_repr(Flip(0.5)), stable_repr(len)
    ('Flip(p=0.5)', '<built-in function len>')

    Args:
        value: Any object.
        depth: How many levels of attributes are followed.
    """
    if isinstance(value, str):
        return repr(value)
    has_no_repr = getattr(type(value), "__repr__", None) is object.__repr__
    if depth and has_no_repr:
        held = sorted(getattr(value, "__dict__", {}).items())
        settings = (f"{name}={stable_repr(one, depth - 1)}" for name, one in held)
        return f"{type(value).__qualname__.split('.')[-1]}({', '.join(settings)})"
    shown = reprlib.Repr()
    shown.maxother = _LONGEST_REPR
    text = shown.repr_instance(value, 1)  # a text also if its own repr fails
    return _MODULES.sub("", _ADDRESS.sub("", text))
