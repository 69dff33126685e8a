"""The audit on the command line is the library's, and its exit code the verdict."""

import pytest

ARGUMENTS = ("--model", "cli_project:build", "--data", "cli_project:train_set")
WEIGHTED = """
import torch


criterion = torch.nn.CrossEntropyLoss(weight=torch.arange(1.0, 11.0))


def mixing():
    return torch.nn.Sequential(torch.nn.Linear(64, 10), torch.nn.Softmax(dim=0))


def normed():
    norms = torch.nn.BatchNorm2d(1), torch.nn.BatchNorm2d(1)
    ends = torch.nn.Flatten(), torch.nn.Linear(64, 10)
    return torch.nn.Sequential(torch.nn.Unflatten(1, (1, 8, 8)), *norms, *ends)


one_example = [(torch.zeros(64), torch.tensor(1))]
"""


@pytest.fixture
def own(project, monkeypatch):
    (project / "cli_own.py").write_text(WEIGHTED)


@pytest.mark.parametrize("mode", ["hooks", "fast", "ghost"])
def test_a_sound_model_passes(answer, mode):
    found = answer("audit", *ARGUMENTS, "--mode", mode, "--examples", 5)
    assert found["passed"] is True
    assert (found["mode"], found["num_examples"]) == (mode, 5)
    rows = {row["name"]: row["passed"] for row in found["comparisons"]}
    assert rows["norms"] is rows["model"] is True and False not in rows.values()


def test_weights_of_a_file_are_audited(run):
    code, out, err = run("audit", *ARGUMENTS, "--weights", "model.safetensors")
    assert (code, err) == (0, "") and out.startswith("Audit of 16 examples")
    assert run("audit", *ARGUMENTS, "--weights", "none.pt")[0] == 2


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (("--criterion", "cli_own:criterion"), "loss"),
        (("--model", "cli_own:mixing"), "model"),
    ],
)
def test_what_cannot_be_accounted_for_is_exit_code_1(own, run, change, row):
    code, out, err = run("audit", *ARGUMENTS, *change)
    assert (code, err) == (1, "") and "FAILED" in out.splitlines()[0]
    assert any(line.split()[:2] == [row, "FAILED"] for line in out.splitlines()[1:])


def test_batch_norm_has_a_remedy_and_is_named_once(own, run):
    code, out, _ = run("audit", *ARGUMENTS, "--model", "cli_own:normed")
    (norms,) = (line for line in out.splitlines() if line.startswith("  norms"))
    assert code == 1 and norms.count("BatchNorm cannot support training") == 1, out
    assert "opacus_pi.compatible.make_compatible(module)" in out
    assert "engine.make_monitored" in out and "ShouldReplaceModuleError" not in out


def test_one_example_cannot_be_compared(own, run):
    words = (*ARGUMENTS[:3], "cli_own:one_example")
    code, out, err = run("audit", *words)
    assert (code, out) == (2, "") and "fewer than two" in err
