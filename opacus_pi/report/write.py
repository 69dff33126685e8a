"""One page and one JSON file that say what a run cost and what may be claimed."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range
from opacus_pi.files.atomic_file import replace_file
from opacus_pi.files.strict_json import json_text, strict
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger, runs_of
from opacus_pi.report import sections
from opacus_pi.report.figures import distribution_figures, trace_figures
from opacus_pi.report.html import page, paragraph
from opacus_pi.report.run import Barriers, Unlearned, run_facts
from opacus_pi.report.scores import Scores, score

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
    tolerance: float = 0.0,
    title: str = "Privacy and unlearning report",
) -> dict[str, Any]:
    """Write one self-contained HTML page, and the same facts as JSON beside it.

    The page loads nothing, runs no script, and escapes every text it shows. Both files
    are readable by the owner only: they say which examples are unusual.

    Args:
        path: Name of the page; the JSON gets the same name with ``.json``.
        ledger: The record of one training, or of several independent runs of it.
        result: What ``Unlearner.unlearn`` returned, or anything with its ``trace``,
            ``guarantee`` and ``record``; None: a report of the training alone.
        oracle: For each metric its values over models retrained without the forget
            set.
        barriers: Loss barriers to those.
        order: Rényi order of the losses, above 1.
        delta: δ of the epsilons, in (0, 1).
        top: How many of the hardest examples to name, at least 0.
        tolerance: As in ``score``.
        title: Heading of the page.

    Returns:
        The facts, as in the JSON.

    Raises:
        ValueError: If the ledger has no noise, not even an assumed one, the oracle
            comes without a result, or a number leaves its domain; nothing is written.
    """
    page_path = Path(path)
    expect(
        page_path.suffix != ".json",
        "path",
        page_path,
        "to be the page's name, not the JSON's",
        "Name it report.html; the JSON is written beside it.",
    )
    expect(
        result is not None or (oracle is None and barriers is None),
        "result",
        None,
        "to be given with an oracle or barriers",
        "Retrained models are shown beside an unlearning run.",
    )
    in_range(0, float("inf"), top=top, remedy="0 names nobody.")
    scores = score(ledger, order=order, delta=delta, tolerance=tolerance)
    facts = _facts(title, ledger, scores, top)
    if result is not None:
        facts["unlearning"] = strict(run_facts(result, scores, oracle, barriers))
    content = page(title, _body(facts, scores, result, oracle or {}))
    replace_file(page_path, content.encode())
    replace_file(page_path.with_suffix(".json"), json_text(facts).encode())
    return facts


def training_facts(ledger: Ledgers) -> dict[str, Any]:
    """What was recorded, without a word about any example.

    Args:
        ledger: One run, or several of one training.
    """
    runs = runs_of(ledger)
    first = runs[0]
    mechanism = first.mechanism
    return {
        "data_set": first.data_set,
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


def _facts(title: str, ledger: Ledgers, scores: Scores, top: int) -> dict[str, Any]:
    """The part that speaks of training."""
    facts: dict[str, Any] = strict(
        {
            "format": FORMAT,
            "title": title,
            "training": training_facts(ledger),
            **scores.facts(top),
        }
    )
    return facts


def _body(
    facts: dict[str, Any],
    scores: Scores,
    result: Unlearned | None,
    oracle: Mapping[str, ArrayLike],
) -> str:
    """All sections of the page."""
    run = facts.get("unlearning")
    forget_loss = None if run is None else run["forget_set"].get("mean_loss")
    parts = [
        sections.warning(facts),
        sections.training(facts),
        sections.privacy(facts, distribution_figures(scores, forget_loss)),
        sections.hardest(facts),
        sections.strata(facts),
    ]
    if result is not None:
        drawn = trace_figures(result.trace, oracle)
        parts += [sections.unlearning(facts, drawn), sections.guarantee(facts)]
    end = "Losses in nats. The same facts stand in the JSON file beside this page."
    return "\n".join([*parts, paragraph(end, class_="note")])
