"""What a report says, section by section: facts in, HTML out."""

from collections.abc import Mapping, Sequence
from typing import Any

from opacus_pi.accounting.rounding import rounded_up
from opacus_pi.report.html import (
    bullets,
    facts_list,
    paragraph,
    pictures,
    section,
    table,
    tag,
    text,
)
from opacus_pi.report.run import TOLERANCE

Facts = Mapping[str, Any]

_RANKING = (
    "Training added no noise of its own, so that the noise is an assumption, or "
    "gradient norms were measured for ranking only. Losses order the examples and "
    "claim nothing; there is no ε."
)
_ESTIMATE = (
    "Values of single examples are estimates: they put the recorded norms of this "
    "training where the theorem has an expectation over many. Only the bound for "
    "anybody is a bound, given the assumptions below."
)


def warning(facts: Facts) -> str:
    """What the reader must know before anything else."""
    words = tag("strong", "Do not pass this page on.") + " " + text(facts["sensitive"])
    return tag("div", tag("p", words), class_="warning", role="note")


def training(facts: Facts) -> str:
    """What was run and recorded."""
    run = facts["training"]
    named = {
        "data set": run["data_set"] or "not named",
        "examples": facts["num_examples"],
        "recorded runs": run["num_runs"],
        "rows of norms": f"{run['num_rows']}, {run['source']}",
        "updates": run["num_steps"],
        "sampling": f"{run['sampling']}, rate {_span(run['sample_rate'])}",
        "noise on the sum of gradients": _span(run["noise_std"]),
        "clip norm": _or_none(_span(run["max_grad_norm"])),
    }
    return section("Training", facts_list(named))


def privacy(facts: Facts, drawn: Mapping[str, str]) -> str:
    """Losses and ε of all examples."""
    ranking = facts["ranking_only"]
    quantiles = facts["quantiles"]
    own = quantiles["epsilon"] or [None] * len(quantiles["loss"])
    rows = zip(
        map(_share, quantiles["probability"]), quantiles["loss"], own, strict=True
    )
    bounds = {
        f"loss at order {facts['order']:g}, anybody": facts["worst_case_loss"],
        f"ε at δ = {facts['delta']:g}, anybody": facts["worst_case_epsilon"],
    }
    return section(
        "Privacy of the examples",
        paragraph(_RANKING if ranking else _ESTIMATE, class_="note"),
        ""
        if ranking
        else facts_list({f"bound on {k}": _bound(v) for k, v in bounds.items()}),
        pictures(drawn),
        table("Quantiles over examples", ("quantile", "loss", "ε"), list(rows)),
        _assumptions("What ε rests on", facts["assumptions"]),
    )


def hardest(facts: Facts) -> str:
    """Who cost most, by id alone."""
    rows = [(str(r["id"]), r["loss"], r["epsilon"]) for r in facts["hardest"]]
    caption = f"The {len(rows)} examples of largest loss, by position in the data set"
    shown = table(caption, ("id", "loss", "ε"), rows)
    words = tied_words(facts)
    note = paragraph(words, class_="note") if words else ""
    return section("Hardest examples", note, shown)


def tied_words(facts: Facts) -> str:
    """That the largest loss is that of several; empty where it is of one.

    Args:
        facts: What ``Scores.facts`` returned.
    """
    tied = facts["num_at_top"]
    if tied < 2:
        return ""
    bound = ", the bound for anybody" if facts["num_at_bound"] else ""
    return (
        f"{tied} examples share the largest loss{bound}: nothing tells them apart, "
        "and their order here is a draw."
    )


def strata(facts: Facts) -> str:
    """Five sets of rising difficulty."""
    if not facts["strata"]:
        return ""
    header = ("stratum", "size", "smallest loss", "mean", "largest", "mean ε")
    names = (
        "name",
        "size",
        "smallest_loss",
        "mean_loss",
        "largest_loss",
        "mean_epsilon",
    )
    rows = [[row[name] for name in names] for row in facts["strata"]]
    words = (
        "Cut from the ranking by loss: the easiest, those around each quartile, and "
        "the hardest. A harder set is expected to take longer to forget."
    )
    shown = table("Strata of difficulty", header, rows)
    return section("Strata", paragraph(words, class_="note"), shown)


def unlearning(facts: Facts, drawn: Mapping[str, str]) -> str:
    """What was forgotten, and how it went beside retrained models."""
    run = facts["unlearning"]
    forget = run["forget_set"]
    named = {
        "method": run["method"],
        "forgotten examples": forget["size"],
        "forgotten before": forget["forgotten_before"],
    }
    if "mean_loss" in forget:
        named["mean loss of the forget set"] = forget["mean_loss"]
        named["its percentile among all examples"] = f"{forget['percentile']:.1f}"
    settings = {
        name.replace("_", " "): _setting(value)
        for name, value in run["settings"].items()
        if value is not None
    }
    parts = [facts_list(named), facts_list(settings)]
    if run["metrics"]:
        parts += [_metrics(run), pictures(drawn)]
    else:
        parts.append(paragraph("Nothing was evaluated during the run.", class_="note"))
    if run["barriers"]:
        parts.append(_barriers(run["barriers"]))
    return section("Unlearning", *parts)


def guarantee(facts: Facts) -> str:
    """What may be claimed, in words, with everything it rests on."""
    found = facts["unlearning"]["guarantee"]
    lines = facts["unlearning"]["guarantee_in_words"]
    words = [line for line in lines if not line.startswith("  ")]
    return section(
        "Guarantee",
        *(paragraph(line) for line in words),
        _assumptions("What it rests on", found["assumptions"]),
    )


def _assumptions(caption: str, assumptions: Sequence[Facts]) -> str:
    """The conditions, the unmet ones first."""
    ordered = sorted(assumptions, key=lambda a: a["met"])
    entries = [
        ("Met:" if a["met"] else "Not met or unknown:", a["statement"], a["evidence"])
        for a in ordered
    ]
    return tag("h3", text(caption)) + bullets(entries, class_="conditions")


def _metrics(run: Facts) -> str:
    """Before, after and the retrained models."""
    rows = []
    for m in run["metrics"]:
        mean, spread = m.get("oracle_mean"), m.get("oracle_std")
        beside = text(mean) + (f" ± {text(spread)}" if spread is not None else "")
        near = m.get("time")
        rows.append(
            (
                m["name"].replace("_", " "),
                m["before"],
                m["after"],
                beside,
                "never" if near == "inf" else near,
            )
        )
    header = ("metric", "before", "after", "retrained", "near")
    words = (
        "No value is good in itself: the model retrained without the forget set shows "
        "the value to reach (mean ± standard deviation over such models). Near: "
        f"{run['trace']['unit']} until the run was within {TOLERANCE:g} of that mean."
    )
    shown = table("Before and after, beside retrained models", header, rows)
    return paragraph(words, class_="note") + shown


def _barriers(found: Facts) -> str:
    """Loss barriers, with those between retrained models to compare with."""
    matched = "hidden units matched first" if found["matched"] else "weights as is"
    rows = [
        (f"unlearned to retrained {k}", value)
        for k, value in enumerate(found["to_oracles"], start=1)
    ]
    rows += [
        (f"between retrained models, pair {k}", value)
        for k, value in enumerate(found["between_oracles"], start=1)
    ]
    return table(f"Loss barriers ({matched})", ("between", "barrier"), rows)


def _share(probability: float) -> str:
    """The name of a quantile."""
    names = {0.0: "smallest", 0.5: "median", 1.0: "largest"}
    return names.get(probability, f"{100 * probability:g} %")


def _span(value: Any) -> str:
    """A number, or the range of a schedule."""
    if isinstance(value, list):
        return f"{text(min(value))} to {text(max(value))}, by a schedule"
    return text(value)


def _or_none(value: Any) -> Any:
    """A limit, or that there is none."""
    return "none" if value == "inf" else value


def _bound(value: Any) -> Any:
    """A bound with four digits, rounded up, or that there is none."""
    return _or_none(rounded_up(float(value)))


def _setting(value: Any) -> Any:
    """A setting on one line."""
    if isinstance(value, Mapping):
        shown = [(k, v) for k, v in value.items() if v]
        return ", ".join(str(v) if k == "name" else f"{k} {v}" for k, v in shown)
    return value
