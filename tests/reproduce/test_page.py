"""The results page: every figure has a line, a second run stands beside the first."""

from benchmarks.reproduce.figures import FIGURES
from benchmarks.reproduce.page import again_of, page_of

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
    assert "**Found.** rho 0.9." in page and "1,000 training" in page


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
