"""``opacus-pi score``: what each example of a recorded training cost."""

import argparse
from typing import Any

from opacus_pi.accounting.guarantee import rounded_up
from opacus_pi.cli.arguments import (
    add_ledgers,
    add_output,
    add_scoring,
    ledgers,
)
from opacus_pi.cli.output import answer, table
from opacus_pi.report import Scores, score, training_facts
from opacus_pi.report.scores import tie_sentence

HELP = "losses and epsilons of all examples, and who is hardest"
DESCRIPTION = """\
Rényi privacy loss and (ε, δ) of every example, from the ledger that training left.
Losses of single examples are estimates; the bound for anybody is a bound. Higher loss:
the example changed the model more, and is expected to be harder to forget. Without
noise of its own (--sigma), a training has a ranking and no ε.

The output says which examples are unusual: guard it like the data."""
EXAMPLES = """\
examples:
  opacus-pi score ledger.safetensors
  opacus-pi score run1.safetensors run2.safetensors --order 8 --delta 1e-5
  opacus-pi score plain_sgd.safetensors --sigma 1 --top 50 --out scores.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_ledgers(parser, "ledger")
    add_scoring(parser, top=10)
    add_output(parser)


def run(options: argparse.Namespace) -> int:
    """Score and print."""
    runs = ledgers(options.ledger, options.noise_std)
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
    answer(options, facts, _words(scores, facts))
    return 0


def _words(scores: Scores, facts: dict[str, Any]) -> str:
    """The answer for people."""
    quantiles = facts["quantiles"]
    own = quantiles["epsilon"]
    none = [None] * len(quantiles["loss"])
    rows = zip(
        (f"{100 * p:g} %" for p in quantiles["probability"]),
        quantiles["loss"],
        none if own is None else own,
        strict=True,
    )
    hardest = [[row["id"], row["loss"], row["epsilon"]] for row in facts["hardest"]]
    strata = [[s["name"], s["size"], s["mean_loss"]] for s in facts["strata"]]
    return "\n\n".join(
        [
            facts["sensitive"],
            _headline(scores),
            "Quantiles over examples\n" + table(("", "loss", "ε"), list(rows)),
            _with_ties(facts) + table(("id", "loss", "ε"), hardest),
            "Strata of difficulty\n" + table(("", "size", "mean loss"), strata),
        ]
    )


def _headline(scores: Scores) -> str:
    """What the columns are, and the bound."""
    about = f"{len(scores.ids)} examples, loss in nats at order {scores.order:g}"
    if scores.ranking_only:
        return (
            f"{about}.\nAssumed noise, or norms in bfloat16: the losses rank examples "
            "and claim nothing."
        )
    return (
        f"{about}, ε at δ = {scores.delta:g} (estimates).\n"
        f"Bound for anybody: loss {rounded_up(scores.worst_case_loss)}, "
        f"ε {rounded_up(scores.worst_case_epsilon)}."
    )


def _with_ties(facts: dict[str, Any]) -> str:
    """The heading of the hardest, and how many of them are not told apart."""
    words = tie_sentence(facts)
    return "Hardest examples\n" + (f"{words}\n" if words else "")
