"""What DP-SGD guarantees after unlearning: a bound for any set, given declarations."""

import itertools
import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine as OpacusEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import (
    AccountingError,
    GradNormLedger,
    Guarantee,
    PrivacyEngine,
    Unlearner,
    accounting,
)
from opacus_pi.accounting.training_bound import COMPOSITION, worst_case_curve
from opacus_pi.unlearning import FineTune, Langevin
from opacus_pi.unlearning.history import History, history_from_json
from opacus_pi.unlearning.methods import Method
from opacus_pi.unlearning.requests import DeletionRequests
from opacus_pi.unlearning.rivals import NegGradPlus
from tests.accounting.exact_training import hockey_stick, random_case
from tests.unlearning.unlearners import beside_data, ledger_of, unlearner

CRITERION, DELTA, SIZE = nn.CrossEntropyLoss(), 1e-5, 60


def data():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(SIZE, 1, 8, 8, generator=generator)
    return TensorDataset(images, torch.arange(SIZE) % 3)


def trained(accountant="prv", poisson=True, audited=True, **options):
    """An engine that trained a small CNN by DP-SGD."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 3))
    engine = PrivacyEngine(accountant=accountant, **options)
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=10, shuffle=not poisson),
        noise_multiplier=1.5,
        max_grad_norm=1.0,
        poisson_sampling=poisson,
    )
    if audited:
        assert engine.audit(CRITERION).passed
    train(model, optimizer, loader)
    engine.kept = model, optimizer, loader
    return engine


def train(model, optimizer, loader):
    for x, y in loader:
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def engine():
    return trained()


def of(source, **options):
    return Unlearner(source, criterion=CRITERION, **options)


def test_a_network_of_dp_sgd_gets_the_worst_case_of_its_accountant(engine):
    """Both from the plan and from the run; the declarations are all it rests on."""
    mine = of(engine, method=Langevin(noise_std=0.01))
    planned = mine.plan([3]).guarantee
    claim = mine.unlearn(data(), [3], num_epochs=1).guarantee
    assert beside_data(claim) == beside_data(planned)
    assert claim.kind == "certified if" and not claim.unmet
    composed = accounting.privacy_statement(engine.ledger, [3], DELTA).worst_case
    counted = engine.get_epsilon(DELTA)
    assert claim.epsilon(DELTA) == min(composed, counted)
    text = claim.text(DELTA)
    assert "by the engine's PRV accountant" in text
    assert "by numerical composition of the updates" in text
    curve = worst_case_curve(engine.ledger.mechanism, 1)
    assert claim.divergences == claim.reverse_divergences == curve.divergences
    by_order = accounting.rdp_to_epsilon(curve.divergences, curve.orders, DELTA)
    assert claim.reverse_epsilon(DELTA) == composed < by_order
    assert "the ε that training gave the kept ones does not cover" in claim.text()
    declared = [a.statement for a in claim.declarations]
    assert len(declared) == 5
    for words in (
        "settings",
        "nothing else",
        "no item contains data of another example",
        "noise",
        "forget set was not chosen",
    ):
        assert any(words in statement for statement in declared)
    assert Guarantee.from_json(claim.to_json()) == claim


def test_the_estimate_of_the_example_stands_beside_the_bound(engine):
    claim = of(engine).plan([3]).guarantee
    ledger = engine.ledger
    pairs = zip(claim.orders, claim.estimates, strict=True)
    found = {a: e for a, e in pairs if math.isfinite(e)}
    assert len(found) > 20
    for order in list(found)[::10]:
        assert found[order] == accounting.privacy_losses(ledger, order)[3]
    assert claim.estimated_epsilon(DELTA) <= claim.epsilon(DELTA)
    assert "there is an estimate for this set" in str(claim)
    assert math.isinf(of(engine).plan([3, 4]).guarantee.estimated_epsilon(DELTA))


def test_a_set_gets_the_group_bound(engine):
    claim = of(engine).plan([3, 5, 8]).guarantee
    assert claim.kind == "certified if" and not claim.statements
    mechanism = engine.ledger.mechanism
    for order, bound in zip(claim.orders[::20], claim.divergences[::20], strict=True):
        whole = accounting.group_worst_case_loss(mechanism, 3, order)
        assert bound == pytest.approx(whole, rel=1e-12)  # summed in another order
    assert claim.reverse_divergences == claim.divergences
    assert "the worst case of any 3 examples together, so it holds for" in str(claim)
    assert claim.epsilon(DELTA) > 3 * of(engine).plan([3]).guarantee.epsilon(DELTA)


def test_a_saved_ledger_gives_the_same_curve(engine, tmp_path):
    path = tmp_path / "ledger.safetensors"
    engine.ledger.save(path)
    claim = of(engine.module, ledger=GradNormLedger.load(path)).plan([3]).guarantee
    from_engine = of(engine).plan([3]).guarantee
    assert claim.divergences == from_engine.divergences
    assert claim.kind == "certified if"
    assert claim.epsilon(DELTA) == from_engine.reverse_epsilon(DELTA)
    statement = accounting.privacy_statement(engine.ledger, [3], DELTA)
    assert claim.epsilon(DELTA) == statement.worst_case


def test_the_loss_counts_as_declared_until_it_was_audited():
    engine = trained(audited=False)
    links = [a for a in of(engine).plan([3]).guarantee.declarations]
    assert any("loss is the mean or the sum" in a.statement for a in links)


def test_fixed_sampling_charges_the_counted_updates():
    engine = trained(poisson=False)
    claim = of(engine).plan([3]).guarantee
    assert claim.kind == "certified if"
    assert [s.source for s in claim.statements] == [COMPOSITION]
    # one participation with the clip norm, noise 1.5: a Gaussian of shift 1 / 1.5
    gaussian = [a / 2 / 1.5**2 for a in claim.orders]
    assert claim.divergences == pytest.approx(gaussian)
    assert "no example in more than 1 updates" in str(claim)


@pytest.mark.parametrize(
    "accountant, source", [("rdp", "RDP"), ("gdp", None), ("per_instance", None)]
)
def test_only_accountants_that_bound_are_quoted(accountant, source):
    engine = trained(accountant=accountant)
    *pairs, composed = of(engine).plan([3]).guarantee.statements
    assert composed.source == COMPOSITION and composed.both_directions
    (pair,) = pairs or [None]
    assert (pair is None) if source is None else (source in pair.source)
    if pair:
        assert pair.both_directions
        assert pair.epsilon == pytest.approx(engine.get_epsilon(DELTA))


def test_an_accountant_that_counted_other_updates_is_not_quoted():
    engine = trained()
    assert engine.accountant_bound() is not None
    engine.accountant.step(noise_multiplier=1.5, sample_rate=0.1)
    with pytest.raises(AccountingError, match="but there were more"):
        engine.accountant_bound()


def test_further_training_does_not_change_what_an_unlearner_states():
    engine = trained()
    mine = of(engine)
    before = mine.plan([3]).guarantee
    train(*engine.kept)
    assert mine.plan([3]).guarantee == before
    assert of(engine).plan([3]).guarantee.epsilon(DELTA) > before.epsilon(DELTA)


def test_the_accountant_is_asked_at_the_delta_that_was_given(engine):
    claim = of(engine).plan([3], delta=1e-7).guarantee
    assert {s.delta for s in claim.statements} == {1e-7}
    assert "at δ = 1e-07 (a bound, by" in str(claim)
    for bad in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="delta"):
            of(engine).plan([3], delta=bad)
        with pytest.raises(ValueError, match="delta"):
            of(engine).unlearn(data(), [3], 0, delta=bad)


@dataclass(frozen=True)
class Mine(FineTune):
    """A user's method: what it does is not known."""


def test_a_users_own_method_counts_as_declared(engine):
    for method, declared in ((FineTune(), False), (Mine(), True), (Method(), True)):
        claim = of(engine, method=method).plan([3]).guarantee
        found = [a.statement for a in claim.declarations]
        assert ("unlearning never looks at the forget set" in found) is declared
    assert of(engine, method=NegGradPlus()).plan([3]).guarantee.kind == "empirical"


# ------------------------------------------------------------------ several requests


def test_a_later_request_for_what_an_earlier_run_was_fine_tuned_on(engine):
    """The noise of training does not cover what fine-tuning has learnt since."""
    mine = of(engine)
    assert mine.unlearn(data(), [3], 1).guarantee.kind == "certified if"
    later = mine.plan([4]).guarantee
    assert later.kind == "empirical" and later.divergences == ()
    assert "forget all requested sets in one run" in str(later)
    with pytest.warns(UserWarning, match="nothing new"):
        again = mine.unlearn(data(), [3], 1).guarantee
    assert again.kind == "certified if"  # it was left out of all runs


def test_requests_without_updates_are_covered_together(engine):
    mine = of(engine)
    mine.unlearn(data(), [3], 0)
    claim = mine.unlearn(data(), [4, 5], 1).guarantee
    assert claim.kind == "certified if"
    assert claim.divergences == of(engine).plan([3, 4, 5]).guarantee.divergences


def test_updates_by_hand_are_noticed(engine):
    mine = of(engine)
    mine.unlearn(data(), [3], 1)
    list(mine.run([data()[:8]], num_steps=1))
    claim = mine.plan([3]).guarantee
    assert claim.kind == "empirical"
    assert "weights were changed after it" in str(claim)


def test_an_interrupted_run_is_remembered(engine):
    """After its first update: a run that made none leaves nothing behind."""
    mine, calls = of(engine), []

    def interrupt(model):
        calls.append(model)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"accuracy": 0.5}

    with pytest.raises(KeyboardInterrupt):
        mine.unlearn(data(), [3], 1, evaluate=interrupt)
    assert len(calls) == 2
    assert mine.plan([3]).guarantee.kind == "empirical"


def test_a_deletion_log_keeps_what_later_claims_need(engine, tmp_path):
    """In one run both are covered; one after the other only the first is."""
    bound, none = "certified if", "empirical"
    for together, kinds in ((True, [bound]), (False, [bound, none])):
        requests = DeletionRequests(tmp_path / f"{together}.db", SIZE)
        requests.submit("a", indices=[3])
        requests.submit("b", indices=[4])
        found = requests.process(of(engine), data(), together=together, num_epochs=1)
        assert [r.guarantee.kind for r in found] == kinds
        fresh = of(engine)
        requests.resume(fresh)
        assert fresh.plan([5]).guarantee.kind == none
        again = fresh.plan([4, 3]).guarantee
        assert again.kind == (bound if together else none)


def test_histories_of_earlier_releases_are_read():
    old = history_from_json('{"stop": null, "looked": ""}')
    assert old.looked == "an earlier run is not described" and old.updated
    assert history_from_json('{"stop": null, "looked": "x"}').looked == "x"
    runs = (("exact rewind", 1), ("FineTune()", 3))
    new = History(None, "x", True, 2, "a", "b", runs)
    assert history_from_json(new.text) == new
    before = {
        name: fact for name, fact in json.loads(new.text).items() if name != "runs"
    }
    assert history_from_json(json.dumps(before)) == replace(new, runs=None)
    assert history_from_json('{"looked": ""}') is None
    for changes in (
        {"updated": "yes"},
        {"left": 3},
        {"num_used": None},
        {"more": 1},
        {"runs": [3]},
    ):
        facts = json.loads(new.text) | changes
        assert history_from_json(json.dumps(facts)) is None


# ------------------------------------------------------------------ bad input


def test_weights_of_another_model_get_no_number(engine):
    other = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 3))
    claim = of(other, ledger=engine.ledger).plan([3]).guarantee
    assert claim.kind == "empirical"
    assert [a.statement for a in claim.unmet] == [
        "the model holds the last weights of the recorded training"
    ]


def test_runs_of_different_trainings_get_no_number(engine):
    ledger = engine.ledger
    louder = replace(ledger.mechanism, noise_std=10 * ledger.mechanism.noise_std)
    runs = [replace(ledger, mechanism=louder), ledger]  # the second left the weights
    mine = Unlearner(engine.module, criterion=CRITERION, ledger=runs)
    with pytest.raises(ValueError, match="must have the same mechanism, but run 1"):
        mine.unlearn(data(), [3, 5], num_epochs=1)
    assert not len(mine.forgotten)


def test_a_broken_chain_gets_no_number():
    engine = trained()
    model, optimizer, loader = engine.kept
    (batch,) = itertools.islice(loader, 1)
    with pytest.warns(UserWarning, match="no longer has a ledger"):
        train(model, optimizer, [batch, batch])  # one draw in two updates
    with pytest.raises(AccountingError, match="batch"):
        of(engine).plan([3])


def test_forgetting_everything_is_refused(engine):
    with pytest.raises(ValueError, match="must leave at least one example"):
        of(engine).plan(range(SIZE))


def test_no_noise_gives_no_number():
    claim = unlearner(ledger=ledger_of(data(), noise_std=1e-300)).plan([3]).guarantee
    assert math.isinf(claim.epsilon(DELTA)) and claim.kind == "empirical"


# ------------------------------------------------------------------ PRV, against laws


def test_prv_bounds_the_direction_with_against_without():
    """Exact δ at the accountant's ε, over random tiny trainings of Poisson batches."""
    rng, checked = np.random.default_rng(5), 0
    while checked < 4:
        case = random_case(rng, spacing=1.5)
        rate, noise = case.schedule[0][0], case.training.noise_std
        if len(case.group) > 1 or rate == 1 or len(case.schedule) > 2:
            continue
        law, rest = case.laws
        accountant = OpacusEngine(accountant="prv").accountant
        accountant.history = [
            (noise / case.training.max_grad_norm, rate, len(case.schedule))
        ]
        delta = (1e-3, 0.05)[checked % 2]
        epsilon = max(0.0, accountant.get_epsilon(delta))
        assert hockey_stick(law, rest, epsilon) <= delta
        checked += 1
