"""``opacus-pi report``: one page and one JSON file about a run.

The command reads what ``unlearn`` and ``evaluate`` wrote and gives it to
``report.write_report``. Files that were edited by hand are refused where their content
has another form, because the page shows it.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from opacus_pi.cli.errors import BadInput, about
from opacus_pi.cli.evaluate import FORMAT
from opacus_pi.cli.evaluated import of_same_set, require_of_run
from opacus_pi.cli.inputs import load_ledgers
from opacus_pi.cli.output import answer
from opacus_pi.cli.run_files import load_run, read_json
from opacus_pi.files.checksummed_json import has_checksum, require_unedited
from opacus_pi.report.run import Barriers
from opacus_pi.report.write import write_report
from opacus_pi.unlearning.saved_result import EVALUATION, SavedResult

_EVALUATE_AGAIN = "Restore it from a copy, or run 'opacus-pi evaluate' again."


def run(options: argparse.Namespace) -> int:
    """Write the page and its JSON.

    Args:
        options: The parsed arguments of ``report``.

    Returns:
        The exit code.

    Raises:
        BadInput: If a file cannot be used. Then nothing is written.
    """
    page = Path(options.out)
    if page.suffix != ".html":
        raise BadInput(
            f"--out: {page} does not end in .html. Name the page report.html."
        )
    runs = load_ledgers(options.ledger, options.noise_std, "--ledger")
    result = None if options.run_dir is None else load_run(options.run_dir)
    oracle, barriers, unchecked = _evaluation(options, result)
    if result is not None:
        not_checked = [*result.record["not_checked"], *unchecked]
        result = replace(result, record={**result.record, "not_checked": not_checked})
    facts = write_report(
        page,
        ledger=runs,
        result=result,
        oracle=oracle,
        barriers=barriers,
        order=options.order,
        delta=options.delta,
        top=options.top,
        tolerance=options.tolerance,
        title=options.title,
    )
    written = [str(page), str(page.with_suffix(".json"))]
    summary = {"format": "opacus_pi.cli.report.v1", "written": written, "report": facts}
    text = f"Wrote {written[0]} and {written[1]}.\n{facts['sensitive']}"
    answer(options, summary, text)
    return 0


def _evaluation(
    options: argparse.Namespace, result: SavedResult | None
) -> tuple[dict[str, Any] | None, Barriers | None, tuple[str, ...]]:
    """Return what was evaluated, and what could not be checked about its file.

    Args:
        options: The parsed arguments.
        result: The unlearning run, if one was named.

    Returns:
        The metrics of retrained models, as far as they are of the same forget set as
        those of the run, and the barriers to them, each or None, and sentences for the
        page.

    Raises:
        BadInput: As ``_read_evaluation``, or if the evaluation was edited or is of
            another run.
    """
    path = _evaluation_file(options)
    if result is None or path is None:
        return None, None, ()
    found = read_json(f"--evaluation {path}", path)
    oracle, barriers = _read_evaluation(path, found)
    unchecked = _require_unedited(path, found)
    unchecked += require_of_run(found, result.record, path)
    oracle, left_out = of_same_set(found, result.record, oracle, path)
    return oracle, barriers, (*unchecked, *left_out)


def _require_unedited(path: str | Path, found: dict[str, Any]) -> tuple[str, ...]:
    """Refuse an evaluation that was edited after ``evaluate`` wrote it.

    Args:
        path: The file, for the message.
        found: Its content.

    Returns:
        A sentence, if the file has no checksum.

    Raises:
        BadInput: If it does not match its checksum.
    """
    if not has_checksum(found):
        return (
            f"Whether {path} was edited is not known, because it has no checksum, as "
            "in earlier releases. Run opacus-pi evaluate again.",
        )
    with about("--evaluation", _EVALUATE_AGAIN):
        require_unedited(found, str(path), _EVALUATE_AGAIN)
    return ()


def _evaluation_file(options: argparse.Namespace) -> str | Path | None:
    """Return the path of what ``evaluate`` wrote: as named, or in the directory.

    ``evaluate --out RUN_DIR/evaluation.json`` is the usual place, so it is found
    without being named again.

    Args:
        options: The parsed arguments.

    Returns:
        The path, or None if nothing was named and the directory has no such file.
    """
    path: str | Path | None = options.evaluation
    if path is None and options.run_dir is not None:
        usual = Path(options.run_dir, EVALUATION)
        path = usual if os.path.lexists(usual) else None
    return path


def _read_evaluation(
    path: str | Path, found: dict[str, Any]
) -> tuple[dict[str, Any] | None, Barriers | None]:
    """Read what ``evaluate`` wrote; every number is converted, so none is a text.

    The page shows these values. A file edited by hand could otherwise put words where
    the reader expects a measurement.

    Args:
        path: The file, for the message.
        found: Its content.

    Returns:
        Metrics of retrained models and barriers, each None if there were no such
        models.

    Raises:
        BadInput: If the file has another format or is damaged.
    """
    try:
        if found.get("format") != FORMAT:
            raise ValueError("another format")
        barriers = found["barriers"] and Barriers.from_json(found["barriers"])
        oracle = found["oracle"] and {
            str(name): [float(value) for value in values]
            for name, values in found["oracle"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"--evaluation: {path} is damaged, or it is not an evaluation. "
            "Name the file that 'opacus-pi evaluate --out' wrote."
        ) from error
    return oracle, barriers
