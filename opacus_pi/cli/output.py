"""Write an answer: text or JSON on the standard output, and JSON in a file.

Every command makes one mapping of facts. Programs get it as JSON; the text for people
is made from the same facts, so the two cannot disagree. The JSON file is readable by
its owner only, and it is replaced in one step.
"""

import argparse
import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opacus_pi._printable import printable
from opacus_pi.cli.encoding import printable_json
from opacus_pi.cli.errors import about
from opacus_pi.files.atomic_file import replace_file
from opacus_pi.files.strict_json import json_text


def answer(options: argparse.Namespace, facts: Mapping[str, Any], text: str) -> None:
    """Print the text or the JSON, and write the JSON to a file if one was named.

    The file is written first: if that fails, nothing is printed that could be taken for
    success.

    Args:
        options: The parsed arguments, with ``json`` and maybe ``json_file``.
        facts: The answer for programs. Infinities are written as words, because JSON
            has no number for them.
        text: The answer for people.

    Raises:
        BadInput: If the file cannot be written.
    """
    if getattr(options, "json_file", None):
        with about("--out", "Name a file in a directory that can be written."):
            replace_file(Path(options.json_file), json_text(facts).encode() + b"\n")
    print(printable_json(json_text(facts)) if options.json else printable(text))


def write_csv(path: str, columns: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write columns as a CSV file that only its owner can read.

    Args:
        path: The file's name; an existing file is replaced in one step.
        columns: The values of each column by its heading, one for each line. NaN is
            written as an empty cell: the value is not known.

    Raises:
        BadInput: If the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    values = (map(_known, array.tolist()) for array in columns.values())
    writer.writerows(zip(*values, strict=True))
    with about("--csv", "Name a file in a directory that can be written."):
        replace_file(Path(path), text.getvalue().encode())


def _known(value: Any) -> Any:
    """Return a value; an empty text in place of NaN."""
    return "" if isinstance(value, float) and math.isnan(value) else value


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format columns of text: the first one left-aligned, the others right-aligned.

    >>> print(table(("metric", "before", "after"), [("test_accuracy", 0.91, 0.9042)]))
    metric         before   after
    test_accuracy    0.91  0.9042

    Args:
        header: One heading per column.
        rows: The values; each is formatted by ``cell``.
    """
    lines = [list(header), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if k == 0 else text.rjust(width)
            for k, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def cell(value: Any) -> str:
    """Format a value: floats with four significant digits, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return str(value)
