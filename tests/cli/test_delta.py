"""Every ε is stated at the δ that was asked for, and says at which."""

import json
import math

import pytest

from opacus_pi import Guarantee
from opacus_pi.accounting.guarantee import rounded_up
from opacus_pi.cli.parser import build_parser
from opacus_pi.unlearning import DeletionStatement
from opacus_pi.unlearning.honouring_weights import sha256_of
from tests.cli.conftest import DATA, MODEL

LEDGER = ("--ledger", "ledger.safetensors")
NOISY = ("--method", "langevin", "--set", "noise_std=0.02")
PLAN = ("plan", "ledger.safetensors", "--forget", "3", "--model", "cli_project:build")
RUN = (*MODEL, *DATA, "--forget", "3", "--epochs", "1", *NOISY)
WITH_DELTA = {"score", "plan", "unlearn", "report"}  # evaluate states no ε


def options(name):
    parser = build_parser()._subparsers._group_actions[0].choices[name]
    return {flag for action in parser._actions for flag in action.option_strings}


def test_the_commands_that_state_an_epsilon_take_a_delta():
    found = {n for n in (*WITH_DELTA, "evaluate", "verify") if "--delta" in options(n)}
    assert found == WITH_DELTA


@pytest.mark.parametrize("delta", ["0", "1", "-0.1", "nan", "inf", "small"])
@pytest.mark.parametrize(
    "words",
    [
        ("score", "ledger.safetensors"),
        PLAN,
        ("unlearn", *RUN, "--out", "never"),
        ("report", *LEDGER, "--out", "never.html"),
    ],
    ids=lambda words: words[0],
)
def test_a_delta_outside_0_1_is_refused_before_anything_is_run(run, words, delta):
    code, out, err = run(*words, f"--delta={delta}")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert f"argument --delta: '{delta}' is not a number between 0 and 1" in err


def test_plans(run, answer):
    found = answer(*PLAN, *NOISY, "--delta", "1e-3")
    claim = Guarantee.from_json(json.dumps(found["guarantee"]))
    assert found["delta"] == 1e-3 and found["epsilon"] == claim.epsilon(1e-3)
    assert math.isfinite(found["epsilon"])
    usual = answer(*PLAN, *NOISY)
    assert usual["delta"] == 1e-5 and usual["epsilon"] > found["epsilon"]
    text = run(*PLAN, *NOISY, "--delta", "1e-3")[1]
    assert f"ε ≤ {rounded_up(claim.epsilon(1e-3))} at δ = 0.001" in text


def test_an_unlearning_run_and_its_report(run, answer, tmp_path):
    out = tmp_path / "run"
    found = answer("unlearn", *RUN, *LEDGER, "--delta", "0.01", "--out", out)
    claim = Guarantee.from_json((out / "guarantee.json").read_text())
    assert (found["delta"], found["epsilon"]) == (0.01, claim.epsilon(0.01))
    page = tmp_path / "r.html"
    shown = DeletionStatement.load(out / "guarantee_to_show.json")
    assert claim.estimates and shown.guarantee == claim.without_estimates()
    assert (shown.delta, shown.num_forgotten) == (0.01, 1)
    digest = sha256_of(out / "weights.safetensors")
    assert shown.weights_file == digest and shown.requests == ()
    code, text, _ = run("verify", out / "guarantee_to_show.json")
    assert code == 0 and text.startswith("verified: a statement about a deletion\n\n")
    assert digest in text and f"ε ≤ {rounded_up(claim.epsilon(0.01))} at δ" in text
    assert "estimate for this set" not in text
    report = answer("report", out, *LEDGER, "--delta", "0.02", "--out", page)["report"]
    assert report["delta"] == report["unlearning"]["delta"] == 0.02
    assert report["unlearning"]["epsilon"] == claim.epsilon(0.02)
    assert "seed" not in report["unlearning"]["settings"]  # the owner's alone
    words = page.read_text(encoding="utf-8")
    assert f"ε ≤ {rounded_up(claim.epsilon(0.02))} at δ = 0.02" in words
    assert f"ε ≈ {claim.estimated_epsilon(0.02):.4g} at δ = 0.02" in words
    assert "ε at δ = 0.02" in words and "1e-05" not in words


def test_the_words_of_a_run(run, tmp_path):
    words = (*RUN, *LEDGER, "--delta", "0.01", "--out", tmp_path / "run")
    assert "at δ = 0.01 (a bound" in run("unlearn", *words)[1]


@pytest.mark.parametrize(
    "words",
    [
        ("score", "ledger.safetensors"),
        (*PLAN, *NOISY),
        ("unlearn", *RUN, *LEDGER),
        ("report", *LEDGER),
    ],
    ids=lambda words: words[0],
)
def test_a_delta_that_is_not_below_1_over_n_is_said_once(run, tmp_path, words):
    for delta, times in ("0.01", 1), ("0.008", 0):  # 1/120 is between them
        out = tmp_path / f"{delta}.html"
        if words[0] in ("unlearn", "report"):
            words = (*words, "--out", out)
        code, text, err = run(*words, "--delta", delta)
        assert (code, err) == (0, "")
        if words[0] == "report":
            text = out.read_text(encoding="utf-8")
        assert text.count("δ = 0.01 is not below 1/n = 0.0083 (n = 120") == times
