"""The cost of certified heads on the command line is the library's."""

import json
import stat

import numpy as np
import pytest

from opacus_pi.unlearning.heads import RidgeHead, extract_features, unit_rows

ARGUMENTS = ("--model", "cli_project:build", "--data", "cli_project:train_set")
QUICK = ("--classes", 10, "--steps", 60, "--noise-std", 0.003)


def head(project_module):
    features, labels = extract_features(
        project_module.build(), project_module.train_set()
    )
    rows = unit_rows(features, intercept=True)
    made = RidgeHead(num_classes=10, num_steps=60, noise_std=0.003, seed=0)
    return made.fit(rows, labels), rows, labels


def test_numbers_are_the_librarys(answer):
    found = answer(
        "heads", *ARGUMENTS, *QUICK, "--forget", "3,17", "--top", 2, "--seed", 0
    )
    import cli_project

    expected, rows, labels = head(cli_project)
    epsilons, steps = expected.epsilons(), expected.steps_to(1.0)
    assert found["accuracy"] == {"train": expected.score(rows, labels), "test": None}
    assert found["quantiles"]["epsilon"][-1] == epsilons.max()
    assert found["quantiles"]["steps"][0] == steps.min()
    hardest = [row["id"] for row in found["hardest"]]
    assert hardest == np.argsort(-epsilons)[:2].tolist()
    cost = expected.cost([3, 17])
    assert found["forget"]["steps"] == cost.num_steps
    assert found["forget"]["epsilon_before"] == cost.epsilon_before
    assert "Sensitive" in found["sensitive"]


def test_a_softmax_head_and_a_test_set(run, tmp_path):
    more = "--test", "cli_project:test_set", "--head", "softmax", "--steps", 20
    path = tmp_path / "heads.json"
    code, out, err = run(
        "heads", *ARGUMENTS, "--classes", 10, *more, "--epsilon", 3, "--out", path
    )
    assert (code, err) == (0, "") and "softmax head on 120 examples" in out
    assert "The column 'steps' has the unlearning steps until ε ≤ 3." in out
    assert "To forget" not in out  # no set was named
    facts = json.loads(path.read_text())
    assert facts["noise_std"] == 0.02 and 0 <= facts["accuracy"]["test"] <= 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--classes", 3), "--data"),
        (("--noise-std", 0), "--noise-std must be above 0"),
        (("--forget", "500"), "--forget must be"),
        (("--head", "tree"), "invalid choice: 'tree'"),
    ],
)
def test_bad_arguments_are_named(run, change, words):
    code, out, err = run("heads", *ARGUMENTS, *QUICK, *change)
    assert (code, out) == (2, "") and words in err
