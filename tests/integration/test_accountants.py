import copy
import io

import numpy as np
import opacus
import pytest
import torch
from opacus.accountants import RDPAccountant, create_accountant
from opacus.data_loader import DPDataLoader
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer
from torch import nn
from torch.utils.data import TensorDataset

from opacus_pi.accounting import fingerprint
from opacus_pi.integration.accountants import PerInstanceAccountant, num_steps_of
from opacus_pi.integration.grad_sample import GradSampleModule
from opacus_pi.recording import AccountingError, Recorder
from tests.private_training import ADAPTIVE, Net, Training, data


class ByHand:
    """A pipeline without an engine; the data set also returns each position."""

    def __init__(self, accountant=None, optimizer_class=DPOptimizer, **options):
        torch.manual_seed(0)
        x, y = data().tensors
        self.data_set = TensorDataset(x, y, torch.arange(len(x)))
        self.loader = DPDataLoader(self.data_set, sample_rate=0.25)
        self.model = GradSampleModule(Net())
        self.optimizer = optimizer_class(
            torch.optim.SGD(self.model.parameters(), lr=0.1),
            noise_multiplier=0.8,
            max_grad_norm=0.5,
            expected_batch_size=6,
            **options,
        )
        self.accountant = PerInstanceAccountant() if accountant is None else accountant
        hook = self.accountant.get_optimizer_hook_fn(sample_rate=0.25)
        self.optimizer.attach_step_hook(hook)
        self.seen = {}

    def train(self, num_epochs=1):
        for _ in range(num_epochs):
            for x, y, indices in self.loader:
                self.optimizer.zero_grad()
                nn.functional.cross_entropy(self.model(x), y).backward()
                norms = self.model.per_sample_gradient_norms
                self.accountant.record(indices, norms)
                self.seen |= dict(zip(indices.tolist(), norms.tolist(), strict=True))
                self.optimizer.step()
        return self


def begun(**options):
    accountant = PerInstanceAccountant()
    options.setdefault("recorder", Recorder(every=1))
    accountant.begin(num_examples=24, sample_rate=0.25, **options)
    return accountant


def test_a_pipeline_built_by_hand():
    hand = ByHand(begun()).train()
    ledger = hand.accountant.ledger
    assert ledger.mechanism.num_steps == 4 == num_steps_of(hand.accountant)
    assert ledger.mechanism.noise_std == 0.8 * 0.5
    for index in range(24):
        recorded = ledger.grad_norms[0, index]
        assert recorded == pytest.approx(hand.seen.get(index, np.nan), nan_ok=True)
    losses = hand.accountant.privacy_losses(4)
    assert losses.shape == (24,) and (losses > 0).all()
    bound = hand.accountant.get_epsilon(1e-3)
    assert hand.accountant.epsilons(1e-3).max() <= max(0.0, bound)


def test_a_history_of_fewer_updates_is_no_worst_case_of_the_record():
    hand = ByHand(begun()).train()
    own = hand.accountant.epsilons(1e-3)
    hand.accountant.history = [(0.8, 0.25, 1)]
    assert hand.accountant.get_epsilon(1e-3) < own.max()
    np.testing.assert_allclose(hand.accountant.epsilons(1e-3), own, rtol=0.1)


def test_it_gives_what_the_engine_gives():
    training = Training(accountant="per_instance", batch_size=6).train(2)
    accountant = training.engine.accountant
    assert isinstance(accountant, PerInstanceAccountant)
    np.testing.assert_array_equal(
        accountant.privacy_losses(8), training.engine.privacy_losses(8)
    )
    assert accountant.ledger.mechanism.num_steps == 8  # counted once, by the engine


def test_get_epsilon_is_plain_renyi_accounting():
    accountant, plain = PerInstanceAccountant(), RDPAccountant()
    for _ in range(5):
        for a in (accountant, plain):
            a.step(noise_multiplier=1.1, sample_rate=0.1)
    assert accountant.get_epsilon(1e-5) == plain.get_epsilon(1e-5)
    assert len(accountant) == len(plain) == 1


@pytest.mark.parametrize("engine_class", [opacus.PrivacyEngine])
def test_opacus_own_engine_has_the_worst_case_only(engine_class):
    engine = engine_class(accountant="per_instance")
    training = Training(engine=engine, batch_size=6).train(1)
    plain = Training(engine=engine_class(accountant="rdp"), batch_size=6).train(1)
    assert engine.get_epsilon(1e-3) == plain.engine.get_epsilon(1e-3) > 0
    for ask in (
        lambda: engine.accountant.privacy_losses(2),
        lambda: engine.accountant.epsilons(1e-3),
        lambda: engine.accountant.ledger,
        lambda: engine.accountant.record([0], [1.0]),
    ):
        with pytest.raises(AccountingError, match="opacus_pi.PrivacyEngine"):
            ask()
    assert training.engine.accountant.history


def test_opacus_own_engine_with_norms_recorded_by_the_loop():
    engine = opacus.PrivacyEngine(accountant="per_instance")
    training = Training(
        engine=engine,
        grad_sample_mode="ghost",
        poisson_sampling=False,
        shuffle=False,
        batch_size=6,
    )
    recorder = Recorder(every=1)
    engine.accountant.begin(
        num_examples=24, sample_rate=0.25, sampling="fixed", recorder=recorder
    )
    for i, (x, y) in enumerate(training.loader):
        training.optimizer.zero_grad()
        training.criterion(training.model(x), y).backward()
        rows = range(6 * i, 6 * i + len(x))
        norms = training.model.per_sample_gradient_norms
        engine.accountant.record(list(rows), norms)
        training.optimizer.step()
    assert not np.isnan(engine.accountant.ledger.grad_norms).any()
    assert engine.accountant.privacy_losses(2).shape == (24,)


def test_it_searches_noise_by_name():
    noise = opacus.accountants.utils.get_noise_multiplier(
        target_epsilon=3.0,
        target_delta=1e-5,
        sample_rate=0.1,
        epochs=2,
        accountant="per_instance",
    )
    assert isinstance(create_accountant("per_instance"), PerInstanceAccountant)
    assert noise == opacus.accountants.utils.get_noise_multiplier(
        target_epsilon=3.0,
        target_delta=1e-5,
        sample_rate=0.1,
        epochs=2,
        accountant="rdp",
    )


def test_state_round_trips_and_compares():
    hand = ByHand(begun(data_set=fingerprint(data()))).train(2)
    state = hand.accountant.state_dict()
    assert state == hand.accountant.state_dict() == copy.deepcopy(state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = PerInstanceAccountant()
    other.load_state_dict(torch.load(file, weights_only=False))
    assert other.state_dict() == state
    np.testing.assert_array_equal(
        other.privacy_losses(4), hand.accountant.privacy_losses(4)
    )
    hand.train(1)
    assert hand.accountant.state_dict() != state
    resumed = ByHand(other).train(1)
    assert resumed.accountant.ledger.mechanism.num_steps == 12


def test_a_state_without_a_record():
    plain = PerInstanceAccountant()
    plain.step(noise_multiplier=1.0, sample_rate=0.5)
    state = plain.state_dict()
    assert set(state) == {"history", "mechanism"}
    other = PerInstanceAccountant()
    other.load_state_dict(state)
    assert other.get_epsilon(1e-5) == plain.get_epsilon(1e-5)


def test_states_of_other_accountants_are_refused():
    with pytest.raises(ValueError, match="rdp"):
        PerInstanceAccountant().load_state_dict(RDPAccountant().state_dict())


@pytest.mark.parametrize("change", [{"mechanism": "rdp"}, {"num_steps": 99}])
def test_a_refused_state_changes_nothing(change):
    hand = ByHand(begun(data_set=fingerprint(data()))).train(1)
    state = copy.deepcopy(hand.accountant.state_dict())
    saved = ByHand(begun(data_set=fingerprint(data()))).train(2).accountant.state_dict()
    if "mechanism" not in change:
        saved = copy.deepcopy(saved)
        saved["per_instance_record"]["facts"] |= change
        change = {}
    with pytest.raises(ValueError):
        hand.accountant.load_state_dict(saved | change)
    assert hand.accountant.state_dict() == state


def test_updates_that_were_not_recorded():
    hand = ByHand()
    for x, y, _ in hand.loader:
        hand.optimizer.zero_grad()
        nn.functional.cross_entropy(hand.model(x), y).backward()
        hand.optimizer.step()
    hand.accountant.begin(num_examples=24, sample_rate=0.25)
    hand.train(1)
    with pytest.raises(
        AccountingError, match="accountant counted 8 updates, but recorded 4"
    ):
        hand.accountant.privacy_losses(2)


def test_adaptive_clipping_by_hand():
    options = {"optimizer_class": AdaClipDPOptimizer, **ADAPTIVE}
    hand = ByHand(begun(recorder=Recorder(every=0.25)), **options).train(1)
    mechanism = hand.accountant.ledger.mechanism
    assert len(set(mechanism.max_grad_norm)) == 4 and mechanism.assumed_noise
    np.testing.assert_allclose(
        mechanism.noise_std, 0.8 * mechanism.max_grad_norm, rtol=1e-6
    )


@pytest.mark.parametrize(
    "indices,norms,message",
    [
        ([0, 1], [1.0], "grad_norms"),
        ([24], [1.0], r"in \[0, 24\)"),
        ([-1], [1.0], r"in \[0, 24\)"),
    ],
)
def test_reports_of_impossible_samples_raise(indices, norms, message):
    with pytest.raises(ValueError, match=message):
        begun().record(indices, norms)


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_examples"):
        PerInstanceAccountant().begin(num_examples=0, sample_rate=0.5)
    with pytest.raises(ValueError, match="sample_rate"):
        PerInstanceAccountant().begin(num_examples=3, sample_rate=1.5)


def test_counting_an_accountant_that_keeps_its_own_history():
    class OwnHistory:
        history = ["free text"]

    assert num_steps_of(OwnHistory()) == 0
