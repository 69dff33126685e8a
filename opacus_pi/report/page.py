"""Render the facts of a report as one HTML page.

All markup and all sentences of the page are in ``templates/``; this module prepares
the rows that the templates cannot compute themselves. Jinja escapes every value that
is put into the page, because the environment has ``autoescape=True`` and no template
marks a value as safe. The page loads nothing: its pictures are data addresses, its
style sheet is part of it, and its content security policy forbids everything else.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from opacus_pi._printable import printable
from opacus_pi.accounting.guarantee import rounded_up
from opacus_pi.report.run import CONFIDENCE, EXACT_REWIND, MIN_ORACLES, TOLERANCE
from opacus_pi.report.scores import (
    grouped,
    has_limits,
    limit_in_words,
    tie_sentence,
)

Facts = Mapping[str, Any]
_REWINDS = (EXACT_REWIND, "filtered rewind")
# Names of settings in a record that are no words for a reader.
_LABELS = {
    "started": "started at (UTC)",
    "start": "went back to the state",
    "num_steps": "updates of this run",
    "num_epochs": "epochs of this run",
    "seconds": "duration in seconds",
    "policy": "deletion policy",
    "num_examples": "examples passed through training",
    "num_evaluated": "examples evaluated",
}
_AGAIN = {"num_steps": "updates made again"}


def render(
    facts: Facts,
    distribution_pictures: Mapping[str, str],
    trace_pictures: Mapping[str, str],
) -> str:
    """Return the whole page.

    Args:
        facts: What ``write_report`` writes as JSON.
        distribution_pictures: Addresses of the histograms of losses and ε, by
            caption.
        trace_pictures: Addresses of the figures of an unlearning run, by caption.
    """
    run = facts.get("unlearning")
    rows = {} if run is None else _run_rows(run)
    return (
        _environment()
        .get_template("report.html")
        .render(
            facts=facts,
            quantiles=_quantile_rows(facts["quantiles"]),
            card=_card(facts),
            hardest=[
                {**row, "at_most": limit_in_words(row["limit"])}
                for row in grouped(facts["hardest"])
            ],
            limits=[("ε at most", "at_most")] if has_limits(facts) else [],
            ties=tie_sentence(facts),
            tolerance=f"{TOLERANCE:g}",
            confidence=f"{100 * CONFIDENCE:g} %",
            min_oracles=MIN_ORACLES,
            distribution_pictures=distribution_pictures,
            trace_pictures=trace_pictures,
            **rows,
        )
    )


def _environment() -> Environment:
    """Return the template environment with the filters that format numbers.

    ``autoescape`` is what makes the page safe: titles, metric names and settings come
    from the user and from files, and could contain markup.
    """
    environment = Environment(
        loader=PackageLoader("opacus_pi.report"),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelled name is an error, not an empty cell
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=_number,
        measured=_measured,
        span=_span,
        bound=_bound,
        or_none=_or_none,
    )
    return environment


def _shown(value: Any) -> Any:
    """Return what the page shows of a value: strings without control characters."""
    return printable(value) if type(value) is str else value


def _number(value: Any) -> str:
    """Write a float with four significant digits and None as a dash.

    >>> _number(0.123456), _number(float("inf")), _number(12), _number(None)
    ('0.1235', '∞', '12', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}".replace("inf", "∞")
    return str(value)


def _measured(value: Any) -> str:
    """Write a measured float with two significant digits, others as ``_number`` does.

    >>> _measured(0.3999), _measured(41.9), _measured(1234.5), _measured(1797)
    ('0.40', '42', '1200', '1797')
    """
    if isinstance(value, float | np.floating) and math.isfinite(value):
        rounded = float(f"{value:.2g}")
        is_plain = 1e-4 <= abs(rounded) < 100
        return f"{rounded:#.2g}".removesuffix(".") if is_plain else f"{rounded:g}"
    return _number(value)


def _span(value: Any) -> str:
    """Write a number, or the range of a schedule, which is a list.

    Sample rate, noise and clip norm may change from row to row of a ledger. The page
    has one line for each, so it shows the smallest and the largest value.

    >>> _span([0.5, 2.0, 1.0])
    '0.5 to 2, by a schedule'
    """
    if isinstance(value, list):
        return f"{_number(min(value))} to {_number(max(value))}, by a schedule"
    return _number(value)


def _or_none(value: str) -> str:
    """Write an infinite limit as "none"; the JSON has the word ``inf`` for it."""
    return "none" if value == "inf" else value


def _bound(value: Any) -> str:
    """Write a bound with four digits, rounded up so that it remains a bound.

    Args:
        value: The bound; the JSON facts have the word ``inf`` for an infinite one.
    """
    return _or_none(rounded_up(float(value)))


def _card(facts: Facts) -> dict[str, str]:
    """Return what the page says first: what was asked and done, and what is claimed.

    Args:
        facts: All facts of the report.
    """
    run = facts.get("unlearning")
    if run is None:
        bounds = (facts["worst_case_epsilon"], facts["composed_worst_case"])
        epsilon = min((b for b in bounds if b is not None), key=float, default=None)
        bound = "none: the noise is an assumption"
        if epsilon is not None:
            bound = f"ε ≤ {_bound(epsilon)} at δ = {facts['delta']:g}"
        return {
            "asked": f"the privacy losses of {facts['num_examples']} examples",
            "done": "measured; nothing was unlearned",
            "bound for any example": bound,
            **_open_conditions(facts["assumptions"]),
        }
    guarantee, size = run["guarantee"], run["forget_set"]["size"]
    claim = guarantee["kind"]
    if run["epsilon"] is not None:
        epsilon = float(run["epsilon"])
        limit = f"ε ≤ {_bound(epsilon)}" if math.isfinite(epsilon) else "no ε"
        claim += f", {limit if epsilon else 'ε = 0'} at δ = {run['delta']:g}"
    return {
        "asked": f"forget {size} examples" if size != 1 else "forget one example",
        "done": f"{run['method'] or 'not named'}",
        "guarantee": claim,
        **_open_conditions(guarantee["assumptions"]),
    }


def _open_conditions(assumptions: Sequence[Facts]) -> dict[str, str]:
    """Return the conditions that are not met, and how many somebody declares.

    Args:
        assumptions: Those of a claim.
    """
    missing = [one["statement"] for one in assumptions if not one["met"]]
    declared = [one for one in assumptions if one["established"] == "declared"]
    return {
        "not met or unknown": "; ".join(missing) or "nothing",
        "conditions that you declare": str(len(declared)),
    }


def _quantile_rows(quantiles: Facts) -> list[dict[str, Any]]:
    """Return one row for each quantile of loss and ε.

    Args:
        quantiles: What ``Scores.quantiles`` returned; ``epsilon`` and ``limit`` are
            None if the losses are only a ranking.
    """
    names = {0.0: "smallest", 0.5: "median", 1.0: "largest"}
    losses = quantiles["loss"]
    return [
        {
            "name": names.get(p, f"{100 * p:g} %"),
            "loss": loss,
            "epsilon": epsilon,
            "at_most": limit_in_words(limit),
        }
        for p, loss, epsilon, limit in zip(
            quantiles["probability"],
            losses,
            quantiles["epsilon"] or [None] * len(losses),
            quantiles["limit"] or [None] * len(losses),
            strict=True,
        )
    ]


def _run_rows(run: Facts) -> dict[str, Any]:
    """Return the rows of the lists and tables about an unlearning run.

    Args:
        run: What ``run_facts`` returned.

    Returns:
        The arguments of the template: ``forgotten`` and ``settings``, values by name;
        ``goes_back`` and ``is_exact``, whether it was a rewind and an exact one;
        ``metrics`` and ``barriers``, lists of rows.
    """
    forget = run["forget_set"]
    forgotten = {
        "method": run["method"],
        "examples to forget": forget["size"],
        "examples forgotten before": forget["forgotten_before"],
    }
    if "exactly_forgotten" in forget:
        exactly, is_all = forget["exactly_forgotten"], run["method"] == EXACT_REWIND
        forgotten["examples that are exactly forgotten"] = (
            f"all of them, {exactly}" if is_all else f"{exactly}, by earlier rewinds"
        )
    if "mean_loss" in forget:
        forgotten["mean loss of the forget set"] = forget["mean_loss"]
        place = forget["percentile"]
        forgotten["its percentile among all examples"] = (
            "none, because most examples have the same loss"
            if place is None
            else f"{place:.1f}"
        )
    goes_back = run["method"] in _REWINDS
    return {
        "forgotten": forgotten,
        "settings": _labelled(run["settings"], goes_back),
        "goes_back": goes_back,
        "is_exact": run["method"] == EXACT_REWIND,
        "metrics": [_metric_row(metric) for metric in run["metrics"]],
        "barriers": _barrier_rows(run["barriers"]) if run["barriers"] else [],
    }


def _labelled(settings: Facts, goes_back: bool) -> dict[str, Any]:
    """Return the settings of a run with names and values for a reader.

    Args:
        settings: The entries of its record; None is left out.
        goes_back: Whether the run was a rewind.
    """
    labels = {**_LABELS, **(_AGAIN if goes_back else {})}
    shown = {name: _setting(x) for name, x in settings.items() if x is not None}
    if goes_back and "start" in shown:
        kept = shown.get("num_steps") == 0
        after = f"after update {shown['start']}"
        shown["start"] = "none: the trained model was kept" if kept else after
    return {labels.get(n, n.replace("_", " ")): value for n, value in shown.items()}


def _metric_row(metric: Facts) -> dict[str, Any]:
    """Return the row of one metric: before, after, and of retrained models if any.

    Args:
        metric: An entry of ``metrics`` in the facts. ``oracle_std`` is missing or None
            unless there are at least two retrained models.
    """
    mean, deviation = metric.get("oracle_mean"), metric.get("oracle_std")
    time = metric.get("time")
    judged = {True: "yes", False: "no", None: "not judged"}
    return {
        "name": metric["name"].replace("_", " "),
        "before": metric["before"],
        "after": metric["after"],
        "retrained": _measured(mean)
        if deviation is None
        else f"{_measured(mean)} ± {_measured(deviation)}",
        "time": "never" if time == "inf" else time,
        "like": None if mean is None else judged[metric["is_like_retrained"]],
    }


def _barrier_rows(barriers: Facts) -> list[dict[str, Any]]:
    """Return the rows of barriers: to retrained models, and between these.

    Args:
        barriers: The facts of ``Barriers``.
    """
    pairs = {
        "unlearned model and retrained model": barriers["to_oracles"],
        "two retrained models, pair": barriers["between_oracles"],
    }
    return [
        {"name": f"{between} {number}", "barrier": barrier}
        for between, found in pairs.items()
        for number, barrier in enumerate(found, start=1)
    ]


def _setting(value: Any) -> Any:
    """Return a setting as one line, also if it is a mapping or a list.

    Entries that are 0 or False are left out: an optimizer has many that are not used.

    >>> _setting({"name": "SGD", "lr": 0.01, "nesterov": False})
    'SGD, lr 0.01'
    >>> _setting(["2026-001", "2026-002"])
    '2026-001, 2026-002'
    """
    if isinstance(value, list):
        return ", ".join(str(entry) for entry in value)
    if isinstance(value, Mapping):
        shown = [(name, entry) for name, entry in value.items() if entry]
        return ", ".join(
            str(entry) if name == "name" else f"{name} {entry}" for name, entry in shown
        )
    return value
