"""Print warnings as lines for a person, without files and lines of source.

Python prints a warning with the place in the code that gave it. On the command line
that place means nothing, and one warning may be given at several.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from opacus_pi.cli.errors import one_line

# Torch says this of every model whose inputs need no gradient, as data never do.
_NOISE = "Full backward hook is firing"


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Context in which each warning is one line on the error stream, and given once.

    Warnings for users begin with "warning:", those for developers, such as that a
    function is deprecated, with "note:".
    """
    said: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> Any:
        is_for_users = issubclass(category, UserWarning | RuntimeWarning)
        text = f"{'warning' if is_for_users else 'note'}: {one_line(str(message))}"
        if text not in said:
            said.add(text)
            print(text, file=sys.stderr)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _NOISE, UserWarning)
        warnings.showwarning = show
        yield
