"""What would silently break privacy is refused, or at least said."""

import copy
import dataclasses
import json
import os
import warnings

import numpy as np
import pytest
import torch
from opacus.accountants.utils import get_noise_multiplier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from opacus_pi import FineTune, Guarantee, Langevin, PrivacyEngine, Recorder, Unlearner
from opacus_pi.accounting import NoisySGD, privacy_losses, worst_case_loss
from opacus_pi.accounting.guarantee import Assumption
from opacus_pi.accounting.statement import privacy_statement
from opacus_pi.recording import AccountingError
from tests.private_training import NUM_EXAMPLES, Training, data

pytestmark = [
    pytest.mark.filterwarnings("ignore:This run has no ledger"),
    pytest.mark.filterwarnings("ignore:PrivacyEngine detected new dataset"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
]


def refused(training, reason):
    with pytest.raises(AccountingError, match=reason):
        _ = training.engine.ledger
    with pytest.raises(AccountingError, match=reason):
        training.engine.epsilons(1e-3)


# ------------------------------------------------------------------ sampling


def test_a_shuffled_loader_is_not_accounted_as_poisson():
    shuffled = Training(poisson_sampling=False, noise_multiplier=4.0).train(2)
    mechanism = shuffled.engine.ledger.mechanism
    assert mechanism.sampling == "fixed"
    poisson = {"sampling": "poisson", "max_participations": None}
    amplified = dataclasses.replace(mechanism, **poisson)
    # every example takes part twice, each time for sure: 2 α r² / 2 with r = 1/4
    assert worst_case_loss(mechanism, 4) == pytest.approx(2 * 4 / 16 / 2)
    assert worst_case_loss(amplified, 4) < worst_case_loss(mechanism, 4) / 2
    losses = shuffled.engine.privacy_losses(4)
    drawn = {"mechanism": amplified, "participations": None}
    amplified_losses = privacy_losses(
        dataclasses.replace(shuffled.engine.ledger, **drawn), 4
    )
    assert (losses > amplified_losses).all()


def test_opacus_own_number_of_a_shuffled_loader_comes_with_a_warning():
    shuffled, drawn = Training(poisson_sampling=False).train(1), Training().train(1)
    with pytest.warns(UserWarning, match="assumes Poisson sampling.*no bound"):
        shuffled.engine.get_epsilon(1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "24 of 24 examples share")
        shuffled.engine.epsilons(1e-3)  # accounts for what was done
        drawn.engine.get_epsilon(1e-3)


def weighted():
    weights = torch.ones(NUM_EXAMPLES)
    weights[3] = 20.0  # drawn nearly always
    sampler = WeightedRandomSampler(weights, NUM_EXAMPLES)
    return DataLoader(data(), batch_size=6, sampler=sampler)


def test_a_weighted_sampler_is_refused_or_replaced():
    kept = Training(loader=weighted(), poisson_sampling=False).train(1)
    refused(kept, "How often WeightedRandomSampler draws an example is not known")
    replaced = Training(loader=weighted()).train(1)
    assert replaced.engine.ledger.mechanism.sampling == "poisson"
    assert replaced.loader.batch_sampler.sample_rate == 0.25  # for everybody


@pytest.mark.parametrize(
    ("poisson", "name", "value"),
    [
        (True, "sample_rate", 0.9),
        (False, "batch_size", 24),
        (True, "num_samples", 12),
        (False, "drop_last", True),
    ],
)
def test_a_batch_size_that_was_changed_after_make_private(poisson, name, value):
    training = Training(poisson_sampling=poisson).train(1)
    _ = training.engine.ledger
    assert hasattr(training.loader.batch_sampler, name)
    setattr(training.loader.batch_sampler, name, value)
    for x, y in training.loader:
        training.batch(x, y)
        break
    refused(training, "batch size, sample rate or length changed after make_private")


def test_torch_itself_forbids_the_obvious_way():
    with pytest.raises(ValueError, match="batch_size"):
        Training().loader.batch_size = 12


def test_batches_that_were_joined_are_not_one_update_of_the_sampler():
    told = Recorder(unattributed="worst_case")
    training = Training(poisson_sampling=False, recorder=told)
    batches = list(training.loader)
    with pytest.warns(UserWarning, match="unattributed"):
        training.batch(*map(torch.cat, zip(*batches[:2], strict=True)))
    ledger = training.engine.ledger  # unattributed samples: every example is charged C
    assert (ledger.grad_norms == 1).all() and (ledger.ratios() == 1).all()
    training = Training(poisson_sampling=False)
    batches = list(training.loader)
    with pytest.warns(UserWarning, match="unattributed"):
        training.batch(*map(torch.cat, zip(*batches[:2], strict=True)))
    with pytest.raises(AccountingError, match="12 of 12 samples.*several delivered"):
        _ = training.engine.ledger


# ------------------------------------------------------------------ data


def others():
    """Data that are not the training set, of the same kind."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(NUM_EXAMPLES, 2, 6, generator=generator)
    return TensorDataset(x, torch.zeros(NUM_EXAMPLES, dtype=torch.int64))


def test_training_on_batches_of_another_loader_is_warned_of():
    training = Training()
    with pytest.warns(UserWarning, match="Iterate over that loader itself"):
        for x, y in DataLoader(others(), batch_size=6):
            training.batch(x, y)
    assert training.engine.attribution["unattributed"] == NUM_EXAMPLES
    with pytest.raises(AccountingError, match="24 of 24 samples.*No batch of the"):
        _ = training.engine.ledger


def test_an_iterator_begun_before_make_private_is_named():
    """Under fixed sampling the returned loader is the one that was passed."""
    loader = DataLoader(others(), batch_size=6)
    batches = iter(loader)
    training = Training(data_set=loader.dataset, loader=loader, poisson_sampling=False)
    assert training.loader is loader
    with pytest.warns(UserWarning, match="begun before make_private"):
        training.batch(*next(batches))


def test_batches_of_one_example_are_named_at_the_link_of_the_model():
    training = Training(batch_size=1, poisson_sampling=False)
    training.batch(*next(iter(training.loader)))
    links = {k.name: k for k in training.engine.ledger.custody.unchecked}
    assert "two examples or more" in links["model"].sentence


def test_evaluation_data_in_the_middle_of_training_are_no_examples():
    training = Training(poisson_sampling=False).train(1)
    before = training.engine.attribution
    with pytest.warns(UserWarning, match="unattributed"):
        training.batch(*next(iter(DataLoader(others(), batch_size=6))))
    after = training.engine.attribution
    assert after["unattributed"] == 6
    assert {**after, "unattributed": 0} == before


def test_evaluation_itself_is_no_training():
    training = Training(poisson_sampling=False).train(1)
    training.model.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, _ in DataLoader(others(), batch_size=6):
            training.model(x)
    training.model.train()
    training.train(1)
    assert training.engine.attribution["unattributed"] == 0


# ------------------------------------------------------------------ no clipping


@pytest.mark.parametrize("noise_std", [0.0, 0.05])
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_training_without_clipping_has_no_epsilon_of_opacus(accountant, noise_std):
    """Whose accountant has counted no update, which it takes for no loss."""
    engine, criterion = PrivacyEngine(accountant=accountant), nn.CrossEntropyLoss()
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    _, optimizer, loader = engine.make_monitored(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=6),
        noise_std=noise_std,
        criterion=criterion,
    )
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    with pytest.raises(AccountingError, match="no epsilon holds for every example"):
        engine.get_epsilon(1e-3)
    if noise_std:
        assert np.isfinite(engine.epsilons(1e-3)).all()
    else:
        with pytest.raises(ValueError, match="Without noise no loss is finite"):
            engine.epsilons(1e-3)


# ------------------------------------------------------------------ weights


def test_the_optimizer_that_make_private_was_given_is_not_to_be_stepped():
    training = Training().train(1)
    x, y = data()[:6]
    training.optimizer.zero_grad()
    training.criterion(training.forward(x), y).backward()
    training.optimizer.original_optimizer.step()  # no clipping, no noise
    refused(training, "neither clipped nor noised.*that make_private returned")


def test_even_if_it_is_the_only_one():
    training = Training()
    x, y = next(iter(training.loader))
    training.criterion(training.forward(x), y).backward()
    with pytest.warns(UserWarning, match="neither clipped nor noised"):
        training.optimizer.original_optimizer.step()
    refused(training, "neither clipped nor noised")
    assert training.engine.get_epsilon(1e-3) == 0  # all that Opacus knows


@pytest.mark.parametrize("how", ["by hand", "another optimizer"])
def test_weights_that_something_else_changed_are_warned_of_once(how):
    training = Training().train(1)

    def change():
        if how == "by hand":
            with torch.no_grad():
                training.net.out.weight.mul_(0.9)
            return
        other = torch.optim.SGD(training.net.parameters(), lr=0.1)
        x, y = data()[:6]
        training.optimizer.zero_grad()
        training.criterion(training.forward(x), y).backward()
        other.step()
        training.optimizer.zero_grad()

    change()
    with pytest.warns(UserWarning, match="Weights were changed between two updates"):
        training.train(1)
    change()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Weights were changed")
        training.train(1)


def averaged(training):
    average = torch.optim.swa_utils.AveragedModel(training.net)
    training.train(1)
    average.update_parameters(training.net)
    copy.deepcopy(training.net).load_state_dict(average.module.state_dict())


def restored(training):
    training.net.load_state_dict(copy.deepcopy(training.net.state_dict()))


def evaluated(training):
    training.model.eval()
    training.forward(data()[:6][0])
    training.model.train()


def scheduled(training):
    scheduler = torch.optim.lr_scheduler.StepLR(training.optimizer, 1)
    training.train(1)
    scheduler.step()


@pytest.mark.parametrize("mode", ["hooks", "ghost", "functorch"])
@pytest.mark.parametrize("between", [averaged, restored, evaluated, scheduled])
def test_what_is_no_change_of_the_weights_is_no_alarm(between, mode):
    training = Training(grad_sample_mode=mode).train(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Weights were changed")
        warnings.filterwarnings("error", message="This run has no ledger")
        between(training)
        training.train(1)
    assert training.engine.ledger.num_examples == NUM_EXAMPLES


def test_two_engines_with_one_optimizer_one_after_the_other():
    first = Training().train(1)
    inner = first.optimizer.original_optimizer
    plain = first.plain_copy()
    inner.param_groups[0]["params"] = list(plain.parameters())
    second = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = second.make_private(
        module=plain,
        optimizer=inner,
        data_loader=DataLoader(data(), batch_size=6),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert first.engine.ledger.mechanism.num_steps == 4
    assert second.ledger.mechanism.num_steps == 4


# ------------------------------------------------------------------ claims


def test_without_noise_nothing_is_private():
    training = Training(noise_multiplier=0.0).train(1)
    assert training.engine.ledger.mechanism.noise_std == 0
    for ask in (
        lambda: training.engine.epsilons(1e-3),
        lambda: training.engine.privacy_losses(2),
        training.engine.ledger.ratios,
    ):
        with pytest.raises(
            ValueError, match="noise_std must be above 0, got 0.0. Without noise"
        ):
            ask()
    assert training.engine.get_epsilon(1e-3) == np.inf
    statement = privacy_statement(training.engine.ledger, [3], 1e-3)
    assert statement.epsilon is None and statement.worst_case == np.inf
    with pytest.raises(ValueError):
        get_noise_multiplier(
            target_epsilon=0.0, target_delta=1e-5, sample_rate=0.1, epochs=1
        )


def test_an_assumed_noise_makes_a_ranking_and_no_statement():
    training = Training(noise_multiplier=0.0).train(1)
    assumed = training.engine.ledger.with_noise_std(1.0)
    assert assumed.mechanism.assumed_noise
    statement = privacy_statement(assumed, [3], 1e-3)
    assert statement.epsilon is None and statement.worst_case == np.inf
    assert any("noise" in a.statement.lower() for a in statement.assumptions)


def test_the_assumption_is_not_lost_in_a_file(tmp_path):
    training = Training(noise_multiplier=0.0).train(1)
    training.engine.ledger.with_noise_std(1.0).save(tmp_path / "run")
    again = type(training.engine.ledger).load(tmp_path / "run")
    assert again.mechanism.assumed_noise
    assert again.subset([1, 2]).mechanism.assumed_noise


@pytest.mark.parametrize("method", [FineTune(), Langevin(0.0), Langevin(0.1)], ids=str)
def test_a_bound_with_declarations_is_never_called_certified(method):
    training = Training().train(1)
    plain = training.plain_copy()
    unlearner = Unlearner(
        plain,
        criterion=nn.CrossEntropyLoss(),
        method=method,
        ledger=training.engine.ledger,
        generator=torch.Generator().manual_seed(0),
    )
    result = unlearner.unlearn(data(), [1, 2], num_epochs=1, batch_size=6)
    claim = result.guarantee
    assert claim.kind == "certified if" and not claim.unmet
    assert len(claim.declarations) >= 4
    assert str(claim).startswith("Certified if the declarations below hold")
    estimates = dataclasses.replace(
        claim, assumptions=(*claim.assumptions, Assumption("x", False, "unknown"))
    )
    assert estimates.kind == "estimate"
    assert "certified" not in str(estimates).splitlines()[0].lower()
    with pytest.raises((AttributeError, dataclasses.FrozenInstanceError)):
        claim.kind = "certified"
    text = json.loads(claim.to_json()) | {"kind": "certified"}
    with pytest.raises(ValueError, match="kind must .*got certified"):
        Guarantee.from_json(json.dumps(text))


def test_a_kind_is_not_an_argument():
    fact = Assumption("It holds", met=True, evidence="said so")
    with pytest.raises(TypeError, match="kind"):
        Guarantee("mine", (fact,), kind="certified")
    with pytest.raises(TypeError, match="kind"):
        dataclasses.replace(Guarantee("mine", (fact,)), kind="certified")
    assert Guarantee("mine", (), (2.0,), (0.1,)).kind == "estimate"  # nothing shown


# ------------------------------------------------------------------ publishing


def test_what_says_who_is_unusual_says_that_it_is_sensitive(tmp_path):
    training = Training().train(1)
    ledger = training.engine.ledger
    assert "sensitive: it shows which examples are unusual" in repr(ledger)
    assert not any(
        f"{norm:.4f}" in repr(ledger) for norm in np.ravel(ledger.grad_norms)
    )
    ledger.save(tmp_path / "run")
    assert os.stat(tmp_path / "run").st_mode & 0o077 == 0  # only the owner may read it


def test_a_statement_is_one_persons():
    ledger = Training().train(1).engine.ledger
    own = privacy_statement(ledger, [3], 1e-3, subject="ann")
    assert "ann" in str(own) and "estimate, not a bound" in str(own)
    assert "owner" in own.sharing.lower() or "only" in own.sharing.lower()
    several = privacy_statement(ledger, [3, 4], 1e-3)
    assert several.epsilon is None  # values of single rows are no person's value


def test_a_noise_that_is_none_cannot_be_recorded():
    with pytest.raises(ValueError, match="noise_std"):
        NoisySGD(10, 0.5, noise_std=float("nan"))
    with pytest.raises(ValueError, match="noise_std"):
        NoisySGD(10, 0.5, noise_std=float("inf"))
