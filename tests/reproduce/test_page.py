"""The results page: every figure has a line, a second run stands beside the first."""

import json

import pytest

from benchmarks.reproduce.earlier import crossings_and_ends, described
from benchmarks.reproduce.figures import FIGURES
from benchmarks.reproduce.judging.verdicts import DESCRIBED, NOT_TESTABLE, Verdict
from benchmarks.reproduce.page import (
    DOCS,
    EARLIER,
    RESULTS,
    again_of,
    page_of,
    stored,
    whole_page,
)

SCALE = {
    "sgd": {
        **dict.fromkeys(("num_train", "num_test", "num_seeds", "num_oracles"), 1_000),
        "dataset": "digits",
        "recipe": dict.fromkeys(
            ("model", "num_epochs", "learning_rate", "momentum", "batch_size"), "x"
        ),
    }
}


def content(verdict, result):
    said = {"verdict": verdict, "because": f"rho {result}", "result": result}
    return {"claim": "It holds", "scale": SCALE, **said}


def test_figures_not_run_are_listed_as_such(tmp_path):
    found = dict.fromkeys(FIGURES) | {"fig2": content("borne out", 0.9)}
    page = page_of(found, tmp_path)
    earlier = len(list(EARLIER.glob("*.json")))
    assert page.count("| **not testable yet** |") == earlier - 1
    assert page.count("| **described, not judged** |") == 1
    assert page.count("| **not run yet** |") == 5
    assert "**Found.** Rho 0.9." in page and "1,000 training" in page
    counts = "1 borne out, 1 described, not judged, 5 not run yet, 12 not testable yet"
    assert f"Of 19 claims: {counts}." in page


def test_parts_with_another_verdict_are_named_in_the_table(tmp_path):
    parts = {"farther": "borne out", "slower": "not testable yet", "runs": ""}
    judged = {name: {"verdict": one, "because": ""} for name, one in parts.items()}
    figure = content("not testable yet", 0.9) | {"parts": judged}
    page = page_of(dict.fromkeys(FIGURES) | {"fig6": figure}, tmp_path)
    assert "| **not testable yet**; farther: borne out |" in page


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
    assert "| fig2 | borne out | borne out | the same to the last digit |" in lines
    assert "| fig9 | borne out | not borne out | rho -0.1 |" in lines
    assert not [line for line in lines if "ranks" in line or "fig5" in line]


def test_the_page_is_made_of_the_stored_results():
    assert (DOCS / "results.md").read_text(encoding="utf-8") == whole_page()


@pytest.mark.parametrize("name", FIGURES)
def test_stored_verdicts_are_those_of_the_present_code(name):
    path = RESULTS / f"{name}.json"
    if not path.exists():
        kind = DESCRIBED if name == "predicted" else NOT_TESTABLE
        before = described(EARLIER, name)
        assert before is None or before.verdict == kind  # None: not run yet
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content == stored(RESULTS)[name]


def test_earlier_crossings_are_told_from_arrivals():
    lines = crossings_and_ends(EARLIER).splitlines()
    (row,) = (line for line in lines if line.startswith("| random labels |"))
    result = json.loads((EARLIER / "methods.json").read_text())["result"]
    times = result["panels"]["random labels"]["times"]["UA"]
    came = sum(time is not None for row in times for time in row)
    assert row.split(" | ")[1:3] == [str(came), str(came)]  # all of them moved on


def test_the_earlier_hardest_set_was_farther_and_not_slower():
    (text,) = (
        one.reason
        for name, one in described(EARLIER, "fig5").parts.items()
        if name.startswith("gap by UA")
    )
    assert "q3 0.164 → 0.136 (area 2.0; closed 17 %, 83 % remained" in text
    assert "last 0.702 → 0.420 (area 6.9; closed 40 %, 65 % remained" in text


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
    assert Verdict.from_json(json.loads(json.dumps(whole.to_json()))) == whole
