"""``opacus-pi score``: the privacy loss and ε of each example of a training run.

The text shows quantiles, the hardest examples and the strata; the JSON has the numbers
of all examples as well. The numbers are those of ``report.score``.

The answer begins with a warning that it is sensitive: a list of ids with high losses
tells which people of a data set are unusual.
"""

import argparse
from typing import Any

from opacus_pi.accounting.guarantee import rounded_up
from opacus_pi.cli.inputs import load_ledgers
from opacus_pi.cli.output import answer, table, write_csv
from opacus_pi.ledger.custody import LINKS
from opacus_pi.report.scores import Scores, grouped, score, tie_sentence
from opacus_pi.report.write import training_facts


def run(options: argparse.Namespace) -> int:
    """Score all examples and print a summary.

    Args:
        options: The parsed arguments of ``score``.

    Returns:
        The exit code.

    Raises:
        BadInput: If a file is not a ledger, or training added no noise and none is
            assumed.
    """
    runs = load_ledgers(options.ledger, options.noise_std)
    scores = score(
        runs, order=options.order, delta=options.delta, tolerance=options.tolerance
    )
    facts = {
        "format": "opacus_pi.cli.score.v1",
        "training": training_facts(runs),
        **scores.facts(options.top),
        "per_example": {
            "ids": scores.ids,
            "losses": scores.losses,
            "epsilons": scores.epsilons,
        },
    }
    if options.csv:
        write_csv(options.csv, scores.columns())
    answer(options, facts, _text(scores, facts))
    return 0


def _text(scores: Scores, facts: dict[str, Any]) -> str:
    """Return the answer as text for a person.

    Args:
        scores: The per-example numbers.
        facts: The answer for programs, made from them.
    """
    quantiles = facts["quantiles"]
    losses, epsilons = quantiles["loss"], quantiles["epsilon"]
    rows = zip(
        (f"{100 * p:g} %" for p in quantiles["probability"]),
        losses,
        [None] * len(losses) if epsilons is None else epsilons,
        strict=True,
    )
    hardest = [
        [row["id"], row["loss"], row["epsilon"]] for row in grouped(facts["hardest"])
    ]
    strata = [[s["name"], s["size"], s["mean_loss"]] for s in facts["strata"]]
    ties = tie_sentence(facts)
    return "\n\n".join(
        [
            facts["sensitive"],
            _headline(scores),
            "Quantiles over examples\n" + table(("", "loss", "ε"), list(rows)),
            "Hardest examples\n"
            + (f"{ties}\n" if ties else "")
            + table(("id", "loss", "ε"), hardest),
            "Strata of difficulty\n" + table(("", "size", "mean loss"), strata),
        ]
    )


def _headline(scores: Scores) -> str:
    """Return the first lines of the answer: the unit of the numbers, and the bound.

    The bound is rounded up, so that what is printed is still a bound.
    """
    about = f"{len(scores.ids)} examples, loss in nats at order {scores.order:g}"
    if scores.ranking_only:
        return (
            f"{about}.\nThe noise was assumed: the losses rank the examples and "
            "guarantee nothing."
        )
    return (
        f"{about}, ε at δ = {scores.delta:g} (estimates).\n"
        f"Worst case (bound for any example): loss {rounded_up(scores.worst_case_loss)}"
        f", ε {rounded_up(scores.worst_case_epsilon)}."
        + (f"\n{scores.large_delta}" if scores.large_delta else "")
        + _rounding(scores)
        + _not_checked(scores)
    )


def _rounding(scores: Scores) -> str:
    """Return a line that says by how much the estimates may be rounded up."""
    if not scores.tolerance:
        return ""
    return (
        "\nTo save time, losses and ε of the examples are rounded up by at most "
        f"{100 * scores.tolerance:g} % (--tolerance 0: not rounded)."
    )


def _not_checked(scores: Scores) -> str:
    """Return a line for each link of custody that the numbers rest on unchecked."""
    return "".join(
        f"\nThe library assumes, without a check, that {LINKS[link.name]}. "
        f"{link.sentence}"
        for link in scores.unchecked_links
    )
