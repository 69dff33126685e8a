"""How often the judges err: the committed table, and simulations to refute it."""

import pytest
from scipy import stats

from benchmarks.reproduce.judging import __main__ as table
from benchmarks.reproduce.judging import verdicts
from benchmarks.reproduce.judging.scenario import counted
from benchmarks.reproduce.judging.simulated import SCENARIOS
from benchmarks.reproduce.judging.verdicts import BORNE_OUT, NOT_BORNE_OUT

SIZE = 0.05
ROWS = table.stored()["rows"]
MOST = int(stats.binom.ppf(0.95, table.CHECKED, SIZE))  # of a judge of this size
_TIES = 3  # draws that another platform may decide in another way


def name(row):
    return f"{row['judge'].split(' (')[0]}: {row['scenario']}"


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_stored_sizes_are_at_most_five_percent(row):
    found = row["rates"]
    assert sum(found.values()) == pytest.approx(1)
    wrong = NOT_BORNE_OUT if row["effect"] else BORNE_OUT
    assert (found[wrong] > SIZE) == row["fools"]


def test_the_stored_table_is_of_the_present_scenarios_and_constants():
    content = table.stored()
    known = [(one.judge, one.name, one.effect, one.fools) for one in SCENARIOS]
    fields = "judge", "scenario", "effect", "fools"
    assert known == [tuple(row[field] for field in fields) for row in ROWS]
    assert content["settings"] == table.settings()
    drawn = [one.draws for one in SCENARIOS]
    assert drawn == [row["draws"] for row in ROWS] and min(drawn) >= 200
    shown = (table.OUT / "judges.md").read_text(encoding="utf-8")
    assert shown == table.table(content)


@pytest.mark.parametrize(
    ("scenario", "row"), list(zip(SCENARIOS, ROWS, strict=True)), ids=lambda one: ""
)
def test_the_first_draws_are_judged_again_as_in_the_table(scenario, row):
    """A binomial limit on errors, and the verdicts that this code gives."""
    found = counted(scenario.verdicts(table.CHECKED))
    wrong = NOT_BORNE_OUT if scenario.effect else BORNE_OUT
    assert found[wrong] <= MOST or scenario.fools
    for kind, number in found.items():
        assert abs(number - row["checked"][kind]) <= _TIES


@pytest.mark.parametrize("claim", ["farther", "rises"])
def test_a_judge_of_twice_the_size_would_be_found_out(claim, monkeypatch):
    monkeypatch.setattr(verdicts, "LEVEL", 0.1)
    nulls = [
        one
        for one in SCENARIOS
        if f" {claim}" in f" {one.judge}" and not one.effect and not one.fools
    ]
    found = [counted(one.verdicts(200))[BORNE_OUT] for one in nulls]
    assert max(found) > stats.binom.ppf(0.95, 200, SIZE)
