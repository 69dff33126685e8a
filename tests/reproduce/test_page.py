"""The results page: every figure has a line, a second run stands beside the first."""

import json

import numpy as np
import pytest

from benchmarks.reproduce.earlier import DESCRIPTIONS, crossings_and_ends, described
from benchmarks.reproduce.figures import FIGURES
from benchmarks.reproduce.figures.drawing import table_of
from benchmarks.reproduce.judging.effects import Effect
from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
    Verdict,
)
from benchmarks.reproduce.page import (
    DOCS,
    EARLIER,
    RESULTS,
    again_of,
    page_of,
    stored,
    whole_pages,
)
from benchmarks.reproduce.sections import head, section, summary, table_of_claims

SCALE = {
    "sgd": {
        **dict.fromkeys(("num_train", "num_test", "num_seeds", "num_oracles"), 1_000),
        "dataset": "digits",
        "recipe": dict.fromkeys(
            ("model", "num_epochs", "learning_rate", "momentum", "batch_size"), "x"
        ),
        "num_sets": 20,
        "set_size": 200,
    }
}


WHERE = {"python": "3", "machine": "x", "cores": 2, "packages": {"torch": "2"}}
FARTHER, SLOWER = (
    {
        "name": f"correlation of difficulty with {what}",
        **{"estimate": rho, "low": round(rho - 0.1, 2), "high": round(rho + 0.1, 2)},
        **{"p": 0.001, "side": "above", "units": "9 sets", "trainings": 5},
    }
    for what, rho in (("the gap", 0.8), ("the share", -0.4))
)


def content(verdict, result, **more):
    said = {"verdict": verdict, "because": f"rho {result}", "result": {"rho": result}}
    return {"claim": "It holds", "scale": SCALE, "environment": WHERE, **said, **more}


def verdict_of_sets():
    """A verdict on two claims, one of them with a part that cannot be tested."""
    effects = {
        "farther": {m: Effect(**FARTHER) for m in ("UA", "MIA")},
        "slower": {"UA": Effect(**SLOWER)},
    }
    parts = {
        name: {m: Verdict(UNDECIDED, effect=one) for m, one in of_metrics.items()}
        for name, of_metrics in effects.items()
    }
    lower = Effect(**FARTHER | {"estimate": 0.7})
    said = "both agree", "all 15 choices agree"
    parts["farther"]["MIA"] = Verdict(BORNE_OUT, effect=lower, remarks=said)
    parts["slower"]["MIA"] = Verdict(NOT_TESTABLE, "nothing was unlearned")
    kinds = {"farther": UNDECIDED, "slower": NOT_TESTABLE}
    found = {name: Verdict(kinds[name], parts=some) for name, some in parts.items()}
    return Verdict(NOT_TESTABLE, parts=found | {"runs": Verdict("", "a few")})


def test_figures_not_run_are_listed_as_such(tmp_path):
    found = dict.fromkeys(FIGURES) | {"fig2": content("borne out", 0.9)}
    page = page_of(found, *2 * [dict.fromkeys(FIGURES)], tmp_path)
    assert page.count("| **not testable yet** |") == len(DESCRIPTIONS)
    others = len(FIGURES) - 1 - len(DESCRIPTIONS)
    assert page.count("| **not run yet** |") == others
    assert "**Verdict: borne out.** Rho 0.9." in page and "1,000 training" in page
    assert f"Verdicts on {len(FIGURES)} claims: 1 *borne out*, " in page
    assert f"and {others} *not run yet*." in page


def test_a_section_has_tables_of_effects_reasons_and_remarks(tmp_path):
    text = section(FIGURES["fig6"], verdict_of_sets(), tmp_path / "none.md")
    for line in (
        "**Verdict: not testable yet.** *farther* is undecided and *slower* is not "
        "testable yet. Of 4 parts, 1 is borne out, 2 are undecided and 1 is not "
        "testable yet.",
        "**Correlation of difficulty with the gap** (farther)",
        "| UA | undecided | 0.80 [0.70, 0.90] | above 0: 0.001 | 9 sets, 5 trainings |",
        "| slower, MIA | Nothing was unlearned. |",
        "- **farther, MIA**: Both agree. All 15 choices agree.",
        "- **runs**: A few.",
    ):
        assert line in text.splitlines()


def test_the_least_favourable_effect_of_each_kind_is_in_the_table_of_claims():
    (line,) = (
        line
        for line in table_of_claims({"fig6": verdict_of_sets()}).splitlines()
        if line.startswith("| [fig6](#fig6)")
    )
    assert "0.70 [0.70, 0.90]" in line and "0.80 [" not in line
    assert "-0.40 [-0.50, -0.30]" in line
    assert "| **not testable yet**; farther: undecided |" in line


def test_the_summary_says_where_harder_sets_are_farther_and_slower():
    text = summary({"fig6": verdict_of_sets(), "fig2": Verdict(BORNE_OUT)})
    assert "lie between 0.70 and 0.80." in text
    assert "are -0.40; all are negative, the opposite of the claim." in text
    assert "are different" not in text
    assert f"*{FIGURES['fig2'].claim[:-1]}* ([fig2](#fig2))." in text


def test_the_summary_counts_a_repeated_number_once():
    found = {"fig6": verdict_of_sets(), "fig8": verdict_of_sets()}
    assert "Only 2 of these 4 are different" in summary(found)


def test_a_note_stands_under_the_claim():
    lines = head(FIGURES["fig9"], Verdict(BORNE_OUT)).split("\n\n")
    assert lines[2] == f"**Measured.** {FIGURES['fig9'].note}"
    assert not FIGURES["fig6"].note and "Measured" not in head(
        FIGURES["fig6"], Verdict(BORNE_OUT)
    )


def test_the_table_of_runs_has_shares_of_the_mean_gap():
    gaps = np.zeros((2, 3, 3))
    gaps[:, 1:] = [[-0.4, -0.2, -0.1], [-0.2, -0.1, -0.1]]  # the first has none
    panel = {
        "mean_losses": [1, 2, 3],
        **dict.fromkeys(("gaps", "moved"), {"UA": gaps, "MIA": 2 * gaps}),
        "oracles": dict.fromkeys(("UA", "MIA"), np.zeros((3, 3))),
        "lost": np.full((2, 3), 0.02),
    }
    lines = table_of({"SGD": panel}).splitlines()
    shares = "0.300 → 0.100 | 67 % | 58 % | 0 % | 0 % | 0 % | 0 %"
    assert lines[2:] == [
        f"| SGD, UA | 2 of 3 | {shares} | 2.0 points below the oracles' |",
        f"| SGD, MIA | 2 of 3 | {shares.replace('300', '600').replace('100', '200')} "
        "| 2.0 points below the oracles' |",
    ]
    assert table_of({"SGD": panel}, ("UA",)).splitlines()[2].startswith("| SGD | ")


def test_a_second_run_is_the_same_or_says_what_it_found():
    first = dict.fromkeys(FIGURES) | {
        name: content("borne out", 0.9) for name in ("fig2", "fig9", "ranks")
    }
    again = dict.fromkeys(FIGURES) | {
        "fig2": content("borne out", 0.9),
        "fig9": content("not borne out", -0.1),
        "fig5": content("borne out", 0.9),
    }
    lines = again_of(first, again).splitlines()
    same = "The same to the last digit. Rho 0.9."
    assert f"| fig2 | borne out | borne out | {same} |" in lines
    other = "Not the same to the last digit: rho. Rho -0.1."
    assert f"| fig9 | borne out | not borne out | {other} |" in lines
    assert not [line for line in lines if "ranks" in line or "fig5" in line]


@pytest.fixture(scope="module")
def judged():
    """The stored figures, judged anew."""
    return stored(RESULTS)


def test_the_pages_are_made_of_the_stored_results(judged):
    pages = whole_pages(judged)
    assert set(pages) == {"results.md", "judges.md"}
    for name, text in pages.items():
        assert (DOCS / name).read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", FIGURES)
def test_stored_verdicts_are_those_of_the_present_code(name, judged):
    path = RESULTS / f"{name}.json"
    if not path.exists():
        before = described(EARLIER, name)
        assert before is None or before[0].verdict == NOT_TESTABLE  # None: not run yet
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content == judged[name]


def test_earlier_crossings_are_told_from_arrivals():
    lines = crossings_and_ends(EARLIER).splitlines()
    (row,) = (line for line in lines if line.startswith("| random labels |"))
    result = json.loads((EARLIER / "methods.json").read_text())["result"]
    times = result["panels"]["random labels"]["times"]["UA"]
    came = sum(time is not None for row in times for time in row)
    assert row.split(" | ")[1:3] == [str(came), str(came)]  # all of them moved on


def test_earlier_sets_are_the_columns_of_a_table():
    text = described(EARLIER, "methods")[1]
    assert "| Langevin | fourth | 0.16 → 0.04 | 60 % | 3.4 points below the" in text
    lines = described(EARLIER, "fig7")[1].splitlines()
    assert "| svhn, strided-cnn | UA | 0 | 0 | 2 | never | never |" in lines


def test_parts_of_a_verdict_are_a_nested_list():
    inner = Verdict("borne out", parts={"UA": Verdict("borne out", "ε = 3")})
    remark = Verdict("", "all values tie")
    whole = Verdict(NOT_TESTABLE, "two seeds", {"svhn": inner, "beside": remark})
    assert whole.lines() == [
        "- **svhn**: Borne out.",
        "    - **UA**: Borne out. ε = 3.",
        "- **beside**: All values tie.",
    ]
    assert whole.because == (
        "two seeds; svhn: borne out (UA: borne out (ε = 3)); beside: all values tie"
    )
    for one in (whole, verdict_of_sets()):
        assert Verdict.from_json(json.loads(json.dumps(one.to_json()))) == one
