"""The replication is judged by what its plan expected, and by nothing else."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import reproduce
from benchmarks.reproduce.figures import FIGURES
from benchmarks.reproduce.judging.effects import Effect
from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
    Verdict,
)
from benchmarks.reproduce.replication import (
    EXPECTED,
    MET,
    NOT_MET,
    OPEN,
    REFUTED,
    Expectation,
    outcome,
    replication_of,
    speeds_of,
)

RISING, FALLING = (Expectation("x", (("UA",), ("MIA",)), one) for one in (False, True))


def whole(*parts):
    """Return a verdict on UA and on MIA from pairs of a verdict and ρ, or None."""
    found = [
        Verdict(kind, effect=None if rho is None else Effect("ρ", rho, -1.0, 1.0))
        for kind, rho in parts
    ]
    return Verdict(UNDECIDED, parts=dict(zip(("UA", "MIA"), found, strict=True)))


@pytest.mark.parametrize(
    ("expected", "parts", "found"),
    [
        (RISING, [(BORNE_OUT, 0.9), (BORNE_OUT, 0.8)], MET),
        (RISING, [(BORNE_OUT, 0.9), (UNDECIDED, 0.1)], NOT_MET),
        (RISING, [(BORNE_OUT, 0.9), (UNDECIDED, -0.1)], REFUTED),
        (RISING, [(BORNE_OUT, 0.9), (NOT_BORNE_OUT, 0.1)], REFUTED),
        (RISING, [(BORNE_OUT, 0.9), (NOT_TESTABLE, None)], OPEN),
        (FALLING, [(UNDECIDED, -0.9), (NOT_BORNE_OUT, -0.8)], MET),
        (FALLING, [(UNDECIDED, -0.9), (UNDECIDED, 0.1)], REFUTED),
        (FALLING, [(UNDECIDED, -0.9), (BORNE_OUT, 0.9)], REFUTED),
        (FALLING, [(UNDECIDED, -0.9), (NOT_TESTABLE, None)], OPEN),
    ],
)
def test_an_expectation_is_met_refuted_or_open_as_the_plan_says(expected, parts, found):
    assert outcome(expected, whole(*parts)) == found


def test_the_expectations_are_those_of_the_plan():
    plan = (Path(reproduce.__file__).parent / "REPLICATION.md").read_text("utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in plan.split("## What we expect")[1].splitlines()
        if line.startswith("| ")
    ][1:]
    assert [row[0] for row in rows] == [one.figure for one in EXPECTED]
    for (_, part, _, text), one in zip(rows, EXPECTED, strict=True):
        assert (text != "borne out") == one.falling
        assert all(word in part for word in one.parts[0][:1])


def test_nothing_is_said_until_all_figures_have_been_run():
    nothing = dict.fromkeys(FIGURES)
    assert not replication_of(nothing, nothing)


def test_speeds_of_few_sets_are_given_for_all_choices():
    gaps = np.zeros((5, 8, 9))
    left = np.linspace(1, [[0.5], [0.6], [0.7]], 9, axis=-1)[:, 0]  # harder: slower
    gaps[:, 5:] = -0.4 * left
    panel = {
        "mean_losses": list(range(8)),
        "gaps": {"UA": gaps, "MIA": gaps},
        "moved": dict.fromkeys(("UA", "MIA"), np.zeros_like(gaps)),
        "oracles": dict.fromkeys(("UA", "MIA"), np.zeros((3, 8))),
        "lost": np.zeros((5, 8)),
    }
    assert speeds_of({"result": panel}) == "1.00 to 1.00 by UA, 1.00 to 1.00 by MIA"
