"""Norms measured to rank: they carry a mark, they rank, and nothing is claimed."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from opacus_pi import GradNormLedger, NoisySGD, Recorder, Unlearner
from opacus_pi.accounting import (
    epsilons,
    privacy_losses,
    privacy_statement,
    trajectory_limits,
)
from opacus_pi.difficulty.forget_sets import difficulty_strata
from opacus_pi.files.storage import read_arrays, write_arrays
from opacus_pi.ledger.rank_filling import filled_by_rank
from opacus_pi.report import score, write_report
from opacus_pi.unlearning.claims import claim
from opacus_pi.unlearning.methods import FineTune
from tests.recording.reporting import N, begun, report

REFUSED = "for ranking only.*in the model's own precision"
CRITERION = nn.CrossEntropyLoss()
MECHANISM = NoisySGD(2, 0.1, noise_std=2.0, max_grad_norm=1.0)
EXACT = GradNormLedger(MECHANISM, [0, 1], [[0.1, 0.4, 5.0], [0.2, 0.3, 5.0]])
ROUGH = replace(EXACT, ranking_only=True)


def test_the_mark_travels(tmp_path):
    path = tmp_path / "ledger.safetensors"
    ROUGH.save(path)
    kin = [
        GradNormLedger.load(path),
        *GradNormLedger.load_chunks(path, 2),
        ROUGH.subset([1]),
        ROUGH.with_noise_std(1.0),
        filled_by_rank(ROUGH),
    ]
    assert len(kin) == 6 and all(run.ranking_only for run in kin)
    assert "for ranking only" in repr(ROUGH) and "ranking" not in repr(EXACT)


def test_files_without_the_mark_are_not_for_ranking(tmp_path):
    path = tmp_path / "ledger.safetensors"
    EXACT.save(path)
    kind = "opacus_pi.GradNormLedger"
    arrays, facts = read_arrays(path, kind, 1)
    assert "norms" not in facts  # as older releases wrote it
    assert not GradNormLedger.load(path).ranking_only
    facts = {k: v for k, v in facts.items() if k not in ("kind", "version")}
    write_arrays(path, kind, 1, arrays, {**facts, "norms": "exact"})
    with pytest.raises(ValueError, match="the file's norms must .*got 'exact'"):
        GradNormLedger.load(path)


@pytest.mark.parametrize("ledger", [ROUGH, [EXACT, ROUGH]], ids=["one", "of-several"])
@pytest.mark.parametrize(
    "claimed",
    [
        lambda ledger: epsilons(ledger, 1e-5),
        lambda ledger: trajectory_limits(ledger, 2.0, 2.0),
    ],
)
def test_claims_are_refused(ledger, claimed):
    with pytest.raises(ValueError, match=REFUSED):
        claimed(ledger)
    claimed([EXACT, EXACT])
    with pytest.raises(
        ValueError, match="noise_std must .*got an assumed one.*Rank by"
    ):
        claimed(EXACT.with_noise_std(2.0))


def test_a_statement_keeps_the_bound_and_drops_the_estimate():
    rough, exact = (privacy_statement(run, [1], 1e-5) for run in (ROUGH, EXACT))
    assert rough.epsilon is None and exact.epsilon is not None
    assert rough.worst_case == exact.worst_case  # which rests on no norm
    assert "not met: gradient norms were measured to be accounted" in str(rough)
    assert "measured to be accounted" not in str(exact)


def test_unlearning_claims_nothing():
    model = nn.Linear(2, 2)
    rough, exact = (
        claim(FineTune(), model, run, np.array([0])) for run in (ROUGH, EXACT)
    )
    assert (rough.kind, exact.kind) == ("empirical", "estimate")
    assert "bfloat16, for ranking only" in str(rough)
    plan = Unlearner(model, criterion=CRITERION, ledger=ROUGH).plan([0])
    assert plan.ranking_only and "a ranking only" in str(plan)
    assert (
        not Unlearner(model, criterion=CRITERION, ledger=EXACT).plan([0]).ranking_only
    )


def test_a_report_is_a_ranking(tmp_path):
    scores = score(ROUGH)
    assert scores.ranking_only and scores.epsilons is None
    assert not score(EXACT).ranking_only
    facts = write_report(tmp_path / "page.html", ledger=ROUGH)
    assert facts["ranking_only"]
    page = (tmp_path / "page.html").read_text()
    assert "for ranking only" in page and "bound on" not in page


def test_ranking_works():
    losses = privacy_losses(ROUGH, 8)
    assert np.array_equal(losses, privacy_losses(EXACT, 8))
    assert difficulty_strata(losses, 1)["last"].tolist() == [2]


# ------------------------------------------------------------------ recording


def swept(*, ranking_only):
    """What a sweep returned."""
    return SimpleNamespace(grad_norms=torch.ones(N), ranking_only=ranking_only)


def recorded(*marks):
    """A recorder whose sweeps, one after each update, have these marks."""
    sweeps = iter(marks)
    recorder = begun(
        Recorder("swept", every=range(1, 9), criterion=CRITERION),
        sweep=lambda: swept(ranking_only=next(sweeps)),
    )
    for _ in marks:
        report(recorder)
    return recorder


def test_one_marked_sweep_marks_the_run():
    for marks in ((True,), (False, True, False)):
        assert recorded(*marks).ledger.ranking_only
    assert not recorded(False, False).ledger.ranking_only


def test_resuming_keeps_the_mark():
    state = recorded(True).state_dict()
    resumed = Recorder("swept", every=range(1, 9), criterion=CRITERION)
    resumed.load_state_dict(state)
    begun(resumed, sweep=lambda: swept(ranking_only=False))
    report(resumed)
    assert resumed.ledger.ranking_only and resumed.ledger.num_rows == 2


def test_a_checkpoint_of_an_older_release_has_no_mark():
    state = recorded(False).state_dict()
    del state["norms"]
    resumed = Recorder("swept", criterion=CRITERION)
    resumed.load_state_dict(state)
    assert not resumed.ledger.ranking_only


@pytest.mark.parametrize("mark", [True, "exact", None])
def test_an_unknown_mark_is_refused(mark):
    state = {**recorded(True).state_dict(), "norms": mark}
    with pytest.raises(ValueError, match="norms"):
        Recorder("swept", criterion=CRITERION).load_state_dict(state)
