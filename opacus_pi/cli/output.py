"""How an answer is written: text or JSON on the standard output, JSON in a file."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opacus_pi.cli.errors import about
from opacus_pi.files.atomic_file import replace_file
from opacus_pi.files.strict_json import json_text


def answer(options: argparse.Namespace, facts: Mapping[str, Any], words: str) -> None:
    """Print the text, or the JSON; write the JSON where it was asked for.

    Args:
        options: The parsed arguments, with ``json`` and maybe ``json_file``.
        facts: The answer for programs.
        words: The answer for people.
    """
    if getattr(options, "json_file", None):
        with about("--out", "Name a file in a directory that can be written."):
            replace_file(Path(options.json_file), json_text(facts).encode() + b"\n")
    print(json_text(facts) if options.json else words)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns of text, the first to the left, numbers with four digits."""
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
    """A value as text."""
    if value is None:
        return "-"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return str(value)
