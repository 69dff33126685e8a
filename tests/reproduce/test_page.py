"""The results page: every figure has a line, a second run stands beside the first."""

import json

import pytest

from benchmarks.reproduce.figures import FIGURES
from benchmarks.reproduce.figures.verdicts import NOT_TESTABLE, Verdict
from benchmarks.reproduce.page import (
    DOCS,
    RESULTS,
    again_of,
    page_of,
    stored,
    whole_page,
)

SCALE = {
    "sgd": {
        **dict.fromkeys(("num_train", "num_test", "num_seeds", "num_oracles"), 1_000),
        **dict.fromkeys(("stratum_size", "unlearn_epochs", "num_trials"), 3),
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
    assert page.count("not run yet") == len(FIGURES) - 1
    assert "**Found.** Rho 0.9." in page and "1,000 training" in page


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
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert content == stored(RESULTS)[name]


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
