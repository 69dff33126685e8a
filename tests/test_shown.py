"""Objects show what they are, in a shell and in Jupyter, and no measured number."""

import importlib
import re
import sys

import numpy as np
import pytest
import torch
from IPython.core.formatters import HTMLFormatter
from torch.utils.data import TensorDataset

import opacus_pi
from opacus_pi import GradNormLedger, Guarantee, NoisySGD, PrivacyEngine, Unlearner
from opacus_pi._shown import Shown
from opacus_pi.accounting.guarantee import Assumption
from opacus_pi.difficulty.agreement import rank_correlations
from opacus_pi.evaluation import UnlearningTrace
from opacus_pi.ledger.custody import LINKS, Custody, Link
from opacus_pi.report import score
from tests.private_training import Training
from tests.test_public_modules import MODULES

MECHANISM = NoisySGD(100, 0.1, 2.0, 3.0)
NORMS = np.array([[0.61803, 5.1413, np.nan], [0.27182, 1.6180, 2.2360]])
LEDGER = GradNormLedger(
    MECHANISM, [50, 100], NORMS, example_ids=[4, 2, 9], correct=np.ones((2, 3))
)


def ledger(**more):
    return GradNormLedger(MECHANISM, [50, 100], NORMS, **more)


@pytest.fixture(scope="module")
def run():
    """A plan and a result whose forget set has one example."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 2), torch.arange(12) % 3)
    norms = np.random.default_rng(0).uniform(0.1, 2, (2, 12))
    unlearner = Unlearner(
        torch.nn.Linear(2, 3),
        criterion=torch.nn.CrossEntropyLoss(),
        ledger=GradNormLedger(MECHANISM, [50, 100], norms),
    )
    plan = unlearner.plan([7])
    values = iter([0.31415, 0.27182])
    result = unlearner.unlearn(data, [7], 1, lambda model: {"loss": next(values)})
    return plan, result


def both(shown):
    """The text in a shell, and what Jupyter shows."""
    return repr(shown), HTMLFormatter()(shown)


def test_every_object_has_a_short_line_and_a_table(run):
    plan, result = run
    objects = [PrivacyEngine(), LEDGER, MECHANISM, plan, plan.guarantee, result]
    for shown in [*objects, result.trace, rank_correlations({"a": [1, 2, 3, 5]})]:
        line, table = both(shown)
        name = type(shown).__name__
        assert line.startswith(f"{name}(") and "\n" not in line and len(line) < 400
        assert f"<caption>{name}</caption>" in table and "<td>" in table


def test_no_number_of_an_example_is_shown(run):
    plan, result = run
    losses = score(LEDGER, order=8, delta=1e-5)
    for shown, values in (
        (LEDGER, NORMS),
        (losses, [*losses.losses, *losses.epsilons]),
        (plan, [plan.mean_loss, plan.percentile, 7]),
        (result, [*result.trace["loss"], 7]),
        (result.trace, result.trace["loss"]),
    ):
        for text in both(shown):
            found = {float(n) for n in re.findall(r"\d+\.?\d*", text)}
            near = np.ravel(values)[~np.isnan(np.ravel(values))]
            assert not [v for v in near for f in found if abs(f - v) < 1e-3 * v]


def test_a_ledger_says_what_is_known_about_its_custody():
    checked = tuple(Link(name, "checked", "It was.") for name in LINKS)
    unchecked = (*checked[1:], Link(checked[0].name, "unchecked", "It was not."))
    broken = (*checked[1:], Link(checked[0].name, "broken", "It was broken."))
    said = [
        repr(ledger(custody=custody)).partition("custody=")[2].partition(";")[0]
        for custody in (None, *map(Custody, (checked, unchecked, broken)))
    ]
    first = checked[0].name
    words = ["declared", "every link checked", f"unchecked: {first}"]
    assert said == [f"'{w}'" for w in [*words, f"broken: {first}"]]


def test_an_engine_shows_how_far_it_is_without_asking_for_the_ledger():
    training = Training().train(1)
    steps = training.engine.recorder.num_steps
    assert steps > 0 and f"num_steps={steps}," in repr(training.engine)


@pytest.mark.parametrize("met", [True, False])
def test_a_guarantee_shows_a_bound_and_no_estimate(met):
    rests = (Assumption("It was clipped", met, "max_grad_norm=1"),)
    guarantee = Guarantee("Langevin", rests, orders=(2.0,), divergences=(0.5,))
    bound = f"≤ {guarantee.epsilon(1e-5):.1f}"[:-1]
    assert (bound in repr(guarantee)) is met
    assert f"kind='{guarantee.kind}'" in repr(guarantee)


def test_what_others_named_is_escaped_and_cut():
    line, table = both(ledger(data_set="<script>\x1b[2J\u202e" + "x" * 500))
    assert "<script>" not in table and "&lt;script&gt;" in table
    assert not {"\x1b", "\u202e"} & set(line + table)
    assert "x" * 100 not in line + table


def test_a_schedule_is_shown_by_its_range():
    changing = NoisySGD(100, 0.1, np.linspace(1, 2, 50), 3.0)
    assert "noise_std='1 to 2'" in repr(changing)


def test_a_class_must_name_its_facts():
    with pytest.raises(NotImplementedError):
        repr(Shown())


# ------------------------------------------------------------------ data frames


def test_a_ledger_as_a_frame():
    pytest.importorskip("pandas")
    table = LEDGER.to_frame()
    assert list(table) == ["step", "example", "grad_norm", "correct"]
    for i, step in enumerate([50, 100]):
        for j, example in enumerate([4, 2, 9]):
            line = table[(table.step == step) & (table.example == example)]
            norm = float(line.grad_norm.iloc[0])
            assert norm == pytest.approx(NORMS[i, j], nan_ok=True)


def test_losses_as_a_frame():
    pytest.importorskip("pandas")
    scores = score(LEDGER, order=8, delta=1e-5)
    table = scores.to_frame()
    hardest = scores.hardest(1)[0]
    assert table.index.tolist() == [4, 2, 9] and table.index.name == "example"
    assert table.loc[hardest["id"]].tolist() == [hardest["loss"], hardest["epsilon"]]
    ranking = score(LEDGER.with_noise_std(1), order=8, delta=1e-5)
    assert list(ranking.to_frame()) == ["loss"]


def test_a_trace_as_a_frame():
    pytest.importorskip("pandas")
    trace = UnlearningTrace([0, 0.5, 1], {"loss": [3, 2, 1], "accuracy": [0, 1, 1]})
    table = trace.to_frame()
    assert table.index.name == "epochs" and table.loc[0.5].to_dict() == {
        "loss": 2,
        "accuracy": 1,
    }


@pytest.mark.parametrize("names", ["ab", "abc", "a"])
def test_correlations_as_a_frame(names):
    pytest.importorskip("pandas")
    draw = np.random.default_rng(1).normal
    found = rank_correlations({name: draw(size=9) for name in names})
    table = found.to_frame()
    assert len(table) == len(names) * (len(names) - 1) // 2
    for line in table.itertuples():
        expected = found.between(line.first, line.second)
        assert [line.rho, line.low, line.high] == expected.tolist()


def test_without_pandas_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        LEDGER.to_frame()


# ------------------------------------------------------------------ help and dir


def test_the_help_of_the_package_begins_with_one_screen():
    lines = opacus_pi.__doc__.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 88
    words = set(re.findall(r"\w+", opacus_pi.__doc__))
    assert words >= set(opacus_pi.__all__)


PACKAGES = [m for m in MODULES if hasattr(importlib.import_module(m), "__path__")]


@pytest.mark.parametrize("name", [m for m in PACKAGES if m != "opacus_pi.files"])
def test_tab_completion_shows_promised_names_only(name):
    module = importlib.import_module(name)
    below = {m.rpartition(".")[2] for m in MODULES if m.rpartition(".")[0] == name}
    promised = {*module.__all__, *below}
    if name == "opacus_pi":
        promised = (promised | {"__version__"}) - {"files"}
    assert set(dir(module)) == promised
    assert all(hasattr(module, shown) for shown in promised)
