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

from collections.abc import Mapping
from html import escape
from typing import Any, ClassVar

import numpy as np

from opacus_pi._printable import printable

__all__ = ["Shown"]

_LONGEST = 80  # characters of one fact


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
