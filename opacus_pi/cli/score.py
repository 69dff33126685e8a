"""``opacus-pi score``: the privacy loss and ε of each example of a training run.

The text shows quantiles, the hardest examples and the strata; the JSON has the numbers
of all examples as well. The numbers are those of ``report.score``. With ``--owners``
persons are ranked, too, as ``report.rank_persons`` does, and named beside examples.

The answer begins with a warning that it is sensitive: a list of ids with high losses
tells which people of a data set are unusual.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opacus_pi.accounting.guarantee import LARGE_EPSILON, rounded_up
from opacus_pi.accounting.training_bound import COMPOSITION
from opacus_pi.cli.inputs import load_ledgers
from opacus_pi.cli.output import answer, table, write_csv
from opacus_pi.cli.owners import read_owners
from opacus_pi.difficulty.forget_sets import ties
from opacus_pi.ledger.custody import LINKS
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger
from opacus_pi.report.persons import rank_persons
from opacus_pi.report.scores import (
    Scores,
    grouped,
    has_limits,
    limit_in_words,
    score,
    tie_sentence,
)
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
    owners = None
    if options.owners is not None:
        owners = read_owners(options.owners, lambda: runs[0].data_set)
    persons, named = _persons(owners, runs, scores), _by_example(owners)
    facts = {
        "format": "opacus_pi.cli.score.v1",
        "training": training_facts(runs),
        **scores.facts(options.top),
        "per_example": {
            "ids": scores.ids,
            "losses": scores.losses,
            "epsilons": scores.epsilons,
        },
        **persons,
    }
    if owners is not None:
        for row in facts["hardest"]:
            row["persons"] = named.get(row["id"], [])
    if options.csv:
        columns = scores.columns(with_limits=True)
        if owners is not None:
            texts = ["; ".join(named.get(i, [])) for i in scores.ids.tolist()]
            columns["persons"] = np.array(texts)
        write_csv(options.csv, columns)
    answer(options, facts, _text(scores, facts, options.top))
    return 0


def _by_example(owners: Mapping[str, Sequence[int]] | None) -> dict[int, list[str]]:
    """Return the persons of each example that has one.

    Args:
        owners: The positions of each person; None: no persons were named.
    """
    found: dict[int, list[str]] = {}
    for person, examples in (owners or {}).items():
        for example in examples:
            found.setdefault(int(example), []).append(person)
    return found


def _persons(
    owners: Mapping[str, Sequence[int]] | None,
    runs: list[GradNormLedger],
    scores: Scores,
) -> dict[str, Any]:
    """Return the ranked persons of ``--owners`` as facts; nothing without it.

    Args:
        owners: The positions of each person; None: no persons were named.
        runs: The ledgers.
        scores: The numbers of all examples.

    Raises:
        ValueError: If a position is not in the ledger.
    """
    if owners is None:
        return {}
    ranked = rank_persons(runs, owners, scores=scores)
    owned = np.unique(np.concatenate([np.empty(0), *map(np.asarray, owners.values())]))
    return {
        "persons": [vars(row) for row in ranked],
        "num_without_owner": len(scores.ids) - len(owned),
        "num_without_examples": len(owners) - len(ranked),
    }


def _persons_text(facts: dict[str, Any], top: int) -> list[str]:
    """Return the paragraph about persons; none without ``--owners``.

    Args:
        facts: The answer for programs.
        top: How many persons to list.
    """
    if "persons" not in facts:
        return []
    has_bound = any(row["group_epsilon"] is not None for row in facts["persons"])
    lines = [
        "Hardest persons",
        "Loss and ε are the largest of the person's examples (estimates; an ε above "
        "the bound of its line is cut to it)."
        + " The bound is the worst case of any set of as many examples: only this ε "
        "may be promised to a person." * has_bound,
    ]
    if facts["num_without_owner"]:
        lines.append(f"Examples without an owner: {facts['num_without_owner']}.")
    if facts["num_without_examples"]:
        lines.append(f"Persons without examples: {facts['num_without_examples']}.")
    lines += _tied_persons(facts["persons"])
    rows = [
        [
            *(row["person"], row["num_examples"], row["loss"], row["epsilon"]),
            "-" if row["group_epsilon"] is None else rounded_up(row["group_epsilon"]),
        ]
        for row in facts["persons"][:top]
    ]
    lines.append(table(("person", "examples", "loss", "ε", "bound on ε"), rows))
    if any((row["group_epsilon"] or 0) > LARGE_EPSILON for row in facts["persons"]):
        lines.append(
            f"A bound above {LARGE_EPSILON:g} is too large to be of practical use."
        )
    return ["\n".join(lines)]


def _tied_persons(persons: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence if most persons share the largest loss; none if not.

    Args:
        persons: The ranked persons.
    """
    if len(persons) < 2:
        return []
    levels = ties([row["loss"] for row in persons])
    tied = int((levels == levels[0]).sum())
    if tied < 2:
        return []
    return [
        f"{tied} of {len(persons)} persons share the largest loss: the loss cannot "
        "distinguish them. Here they are ordered by ε, then by their number of "
        "examples. The causes, and what distinguishes them, are above the table of "
        "the hardest examples."
    ]


def _text(scores: Scores, facts: dict[str, Any], top: int) -> str:
    """Return the answer as text for a person.

    Args:
        scores: The per-example numbers.
        facts: The answer for programs, made from them.
        top: How many persons to list.
    """
    quantiles = facts["quantiles"]
    losses, epsilons = quantiles["loss"], quantiles["epsilon"]
    unknown = [None] * len(losses)
    rows = zip(
        (f"{100 * p:g} %" for p in quantiles["probability"]),
        losses,
        unknown if epsilons is None else epsilons,
        map(limit_in_words, quantiles["limit"] or unknown),
        strict=True,
    )
    hardest = [
        [row["id"], row["loss"], row["epsilon"], limit_in_words(row["limit"])]
        for row in grouped([*map(_named, facts["hardest"])])
    ]
    columns = ("loss", "ε", *(["ε at most"] if has_limits(facts) else []))
    width = 1 + len(columns)
    strata = [[s["name"], s["size"], s["mean_loss"]] for s in facts["strata"]]
    ties = tie_sentence(facts)
    return "\n\n".join(
        [
            facts["sensitive"],
            _headline(scores),
            "Quantiles over examples\n"
            + table(("", *columns), [row[:width] for row in rows])
            + _about_limits(facts),
            "Hardest examples\n"
            + (f"{ties}\n" if ties else "")
            + table(("id", *columns), [row[:width] for row in hardest]),
            *_persons_text(facts, top),
            "Strata of difficulty\n" + table(("", "size", "mean loss"), strata),
        ]
    )


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row of an example with its persons beside the id, if it has any."""
    persons = ", ".join(row.get("persons", ()))
    return {**row, "id": f"{row['id']} ({persons})"} if persons else row


def _about_limits(facts: dict[str, Any]) -> str:
    """Return a line that says what "ε at most" is; empty if the column is missing."""
    if not has_limits(facts):
        return ""
    return (
        '\n"ε at most" is an upper limit for the ε of the example at this quantile, '
        "with 95 % confidence, as measured and not proved. This ε is not known "
        "exactly, because the norms are known only for the updates that drew the "
        "example. The limit also depends on how often the example was drawn, so it may "
        "fall where ε rises."
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
        f", ε {rounded_up(scores.least_worst_case)}{_method(scores)}."
        + (f"\n{scores.large_delta}" if scores.large_delta else "")
        + _rounding(scores)
        + _not_checked(scores)
    )


def _method(scores: Scores) -> str:
    """Return how the bound on ε was computed, if not as the ε of the examples."""
    if scores.composed_worst_case >= scores.worst_case_epsilon:
        return ""
    converted = rounded_up(scores.worst_case_epsilon)
    return (
        f" by {COMPOSITION}. The ε of the examples below are converted from Rényi "
        f"divergences, which loses more: converted, the worst case is {converted}. "
        f"Where an ε or its limit is above {rounded_up(scores.least_worst_case)}, the "
        "worst case is the smaller one"
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
