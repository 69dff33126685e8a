"""Write the report about one run: an HTML page, and a JSON file with the same facts.

The facts are collected once and then both rendered and saved. Before that they pass
through ``strict_json.strict``, which turns arrays into lists and infinities into words.
The page is made from what the file contains, so the two cannot disagree.

Nothing is written until everything was computed and rendered, so a wrong argument
leaves existing files as they were.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range
from opacus_pi.files.atomic_file import replace_file
from opacus_pi.files.replaced_content import require_replaceable
from opacus_pi.files.strict_json import json_text, strict
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger, runs_of
from opacus_pi.ledger.same_data import without_hashes
from opacus_pi.report.figures import distribution_pictures, trace_pictures
from opacus_pi.report.page import render
from opacus_pi.report.run import Barriers, Unlearned, run_facts
from opacus_pi.report.scores import score

FORMAT = "opacus_pi.Report.v1"
Ledgers = GradNormLedger | Sequence[GradNormLedger]


def write_report(
    path: str | os.PathLike[str],
    *,
    ledger: Ledgers,
    result: Unlearned | None = None,
    oracle: Mapping[str, ArrayLike] | None = None,
    barriers: Barriers | None = None,
    order: float = 8.0,
    delta: float = 1e-5,
    top: int = 20,
    tolerance: float | None = None,
    title: str = "Privacy and unlearning report",
) -> dict[str, Any]:
    """Write one self-contained HTML page, and a JSON file with the same facts.

    The page loads nothing, runs no script and escapes every text that it shows. Both
    files are readable by their owner only, because they name unusual examples.

    Args:
        path: Name of the page. The JSON file gets the same name with ``.json``.
        ledger: The ledger of one training run, or of several independent runs.
        result: What ``Unlearner.unlearn`` returned, or any object with its ``trace``,
            ``guarantee`` and ``record``. If its record has ``"not_checked"``, the page
            lists these sentences about files that may not belong together. None: the
            report covers the training alone.
        oracle: For each metric, its values over models that were retrained without
            the forget set, computed on the same examples as those of the result.
        barriers: Loss barriers to those models.
        order: Rényi order of the losses, above 1.
        delta: δ of every ε, in (0, 1).
        top: Number of hardest examples to list, at least 0.
        tolerance: Largest relative error of a loss or ε, as in
            ``opacus_pi.report.score``. Above 0 the page says it.
        title: Heading of the page.

    Returns:
        The facts, as in the JSON file.

    Raises:
        ValueError: If the ledger has no noise, not even an assumed one, if an oracle
            is given without a result, if the result does not come from the training of
            the ledger, if a number is outside its domain, or if one of the two files
            exists and holds neither a text nor a report. Then nothing is written.
    """
    page_path = Path(path)
    expect(
        page_path.suffix != ".json",
        "path",
        page_path,
        "must not end in .json, because the JSON file is written beside the page",
        "Pass for example report.html.",
    )
    expect(
        result is not None or (oracle is None and barriers is None),
        "result",
        None,
        "must be given if oracle or barriers are given",
        "Pass the unlearning result that they belong to.",
    )
    in_range(0, float("inf"), top=top, remedy="Pass 0 to list no example.")
    scores = score(ledger, order=order, delta=delta, tolerance=tolerance)
    facts: dict[str, Any] = strict(
        {
            "format": FORMAT,
            "title": title,
            "training": training_facts(ledger),
            **scores.facts(top),
        }
    )
    if result is not None:
        facts["unlearning"] = strict(
            run_facts(result, runs_of(ledger), scores, oracle, barriers)
        )
    page = render(
        facts,
        distribution_pictures(scores, _forget_loss(facts)),
        {} if result is None else trace_pictures(result.trace, oracle or {}),
    )
    _write_both(page_path, page, facts)
    return facts


def _write_both(page_path: Path, page: str, facts: Mapping[str, Any]) -> None:
    """Write the page and the JSON beside it, or neither if one may not be replaced."""
    text = json_text(facts)
    contents = {page_path: page.encode(), page_path.with_suffix(".json"): text.encode()}
    for place, content in contents.items():
        require_replaceable(place, content)
    for place, content in contents.items():
        replace_file(place, content)


def training_facts(ledger: Ledgers) -> dict[str, Any]:
    """Return what was recorded, without anything about a single example.

    Several runs of one training procedure share the mechanism, so it is read from the
    first.

    Args:
        ledger: One run, or several runs of one training procedure.

    Returns:
        Values by name. Sample rate, noise and clip norm are arrays if they follow a
        schedule.
    """
    runs = runs_of(ledger)
    first = runs[0]
    mechanism = first.mechanism
    return {
        "data_set": None if first.data_set is None else without_hashes(first.data_set),
        "num_runs": len(runs),
        "num_rows": first.num_rows,
        "source": first.source,
        "num_steps": mechanism.num_steps,
        "sampling": mechanism.sampling,
        "sample_rate": mechanism.sample_rate,
        "noise_std": mechanism.noise_std,
        "noise_is_assumed": mechanism.assumed_noise,
        "max_grad_norm": mechanism.max_grad_norm,
    }


def _forget_loss(facts: Mapping[str, Any]) -> float | None:
    """Return the mean loss of the forget set, or None if there is none.

    It is missing without an unlearning run, and if the ledger lacks an example of the
    set.

    Args:
        facts: The facts of the report.
    """
    if "unlearning" not in facts:
        return None
    mean: float | None = facts["unlearning"]["forget_set"].get("mean_loss")
    return mean
