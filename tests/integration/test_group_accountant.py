import copy
import io

import numpy as np
import opacus
import pytest
import torch
from opacus.accountants import RDPAccountant, create_accountant
from torch import nn

from opacus_pi import AccountingError, GramLedger, GroupAccountant, Recorder
from opacus_pi.accounting import NoisySGD, group_divergence, rdp_to_epsilon
from opacus_pi.accounting.group.worst_case import group_worst_case_loss
from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import gram_ledger
from tests.private_training import Net, Training, data


def after(*phases, group_size=1):
    """An accountant that has counted (noise multiplier, sample rate, steps)."""
    accountant = GroupAccountant(group_size)
    for noise, rate, num_steps in phases:
        for _ in range(num_steps):
            accountant.step(noise_multiplier=noise, sample_rate=rate)
    return accountant


def test_groups_of_one_are_plain_renyi_accounting():
    accountant, plain = after((1.1, 0.1, 5)), RDPAccountant()
    for _ in range(5):
        plain.step(noise_multiplier=1.1, sample_rate=0.1)
    assert accountant.get_epsilon(1e-5) == plain.get_epsilon(1e-5)
    spent = accountant.get_privacy_spent(delta=1e-5, alphas=[3, 4])
    assert spent == plain.get_privacy_spent(delta=1e-5, alphas=[3, 4])


def test_the_worst_case_is_composed_over_the_history():
    accountant = after((4.0, 0.02, 30), (8.0, 0.05, 20), group_size=5)
    parts = [
        group_worst_case_loss(NoisySGD(30, 0.02, 4.0, 1.0), 5, 3.0),
        group_worst_case_loss(NoisySGD(20, 0.05, 8.0, 1.0), 5, 3.0),
    ]
    assert accountant.divergence(3.0) == pytest.approx(sum(parts), rel=1e-12)
    orders = [2.0, 3.0, 9.0]
    values = [accountant.divergence(a) for a in orders]
    expected = float(rdp_to_epsilon(values, orders, 1e-5))
    assert accountant.get_epsilon(1e-5, alphas=orders) == pytest.approx(expected)
    assert accountant.get_epsilon(1e-5) <= expected


def test_epsilon_grows_with_the_group():
    accountant, found = after((4.0, 0.02, 50)), []
    for size in (2, 3, 8, 30):
        accountant.group_size = size
        found.append(accountant.get_epsilon(1e-5))
    assert (np.diff(found) > 0).all()
    accountant.group_size = 1
    assert 0 < accountant.get_epsilon(1e-5) < found[0]


def test_nothing_was_run():
    assert GroupAccountant(7).get_epsilon(1e-5) == 0
    assert after((0.0, 0.1, 1), group_size=2).get_epsilon(1e-5) == np.inf


def test_it_searches_noise_by_name():
    options = {
        "target_epsilon": 3.0,
        "target_delta": 1e-5,
        "sample_rate": 0.1,
        "epochs": 2,
    }
    search = opacus.accountants.utils.get_noise_multiplier
    assert isinstance(create_accountant("group"), GroupAccountant)
    assert search(accountant="group", **options) == search(accountant="rdp", **options)


@pytest.mark.parametrize("engine_class", [opacus.PrivacyEngine, PrivacyEngine])
def test_in_an_engine(engine_class):
    engine = engine_class(accountant="group")
    Training(engine=engine, batch_size=6).train(1)
    plain = Training(engine=engine_class(accountant="rdp"), batch_size=6).train(1)
    single = engine.get_epsilon(1e-3)
    assert single == plain.engine.get_epsilon(1e-3) > 0
    engine.accountant.group_size = 3
    assert engine.get_epsilon(1e-3) > single


def test_a_given_group_from_training_to_epsilon(tmp_path):
    engine = PrivacyEngine(accountant="group", recorder=Recorder(weights_dir=tmp_path))
    training = Training(engine=engine, batch_size=6, noise_multiplier=3.0).train(2)
    accountant = engine.accountant
    forget = [1, 4, 9]
    grams = gram_ledger(
        tmp_path, training.model, nn.CrossEntropyLoss(), data(), forget, engine.ledger
    )
    accountant.group_size = 3
    found = accountant.divergence(3.0, grams)
    assert found == group_divergence(grams, 3.0)
    assert 0 < found <= accountant.divergence(3.0)
    orders = (1.5, 2.0, 3.0, 6.0)
    mine = accountant.epsilon(1e-3, grams, orders=orders)
    values = [group_divergence(grams, a, method="scalar") for a in orders]
    assert mine == pytest.approx(float(rdp_to_epsilon(values, orders, 1e-3)))
    assert 0 < mine <= accountant.get_epsilon(1e-3, alphas=orders) * (1 + 1e-12)
    assert accountant.epsilon(1e-3, grams) > 0
    training.train(1)
    with pytest.raises(AccountingError, match="has counted 12 updates.* run of 8"):
        accountant.divergence(3.0, grams)


def test_state_round_trips_and_compares():
    accountant = after((1.5, 0.1, 7), group_size=4)
    state = accountant.state_dict()
    assert state == accountant.state_dict() == copy.deepcopy(state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = GroupAccountant()
    other.load_state_dict(torch.load(file, weights_only=False))
    assert other.group_size == 4
    assert other.get_epsilon(1e-5) == accountant.get_epsilon(1e-5)
    assert other.state_dict() == state
    refused = (
        (RDPAccountant().state_dict() | {"group_size": 7}, "rdp"),
        (after((2.0, 0.1, 3)).state_dict() | {"group_size": 0}, "group_size"),
    )
    for wrong, words in refused:
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(wrong)
        assert other.state_dict() == state


def test_checkpoints_keep_the_group_size(tmp_path):
    training = Training(accountant="group", batch_size=6).train(1)
    training.engine.accountant.group_size = 3
    training.engine.save_checkpoint(path=tmp_path / "c.pt", module=training.model)
    resumed = Training(accountant="group", batch_size=6, module=Net())
    resumed.engine.load_checkpoint(path=tmp_path / "c.pt", module=resumed.model)
    assert resumed.engine.accountant.group_size == 3
    assert resumed.engine.get_epsilon(1e-3) == training.engine.get_epsilon(1e-3)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"])
def test_sizes_that_are_not_whole_numbers_above_0_raise(size):
    with pytest.raises(ValueError, match="group_size must"):
        GroupAccountant(size)
    with pytest.raises(ValueError, match="group_size must"):
        GroupAccountant().group_size = size


def test_bad_input():
    accountant = after((4.0, 0.02, 3))
    with pytest.raises(ValueError, match="order must .*got 1.0"):
        accountant.divergence(1.0)
    fixed = GramLedger(NoisySGD(3, 0.1, 1.0, sampling="fixed"), [3], [[[1.0]]])
    with pytest.raises(ValueError, match="poisson_sampling=True"):
        accountant.epsilon(1e-5, fixed)
    with pytest.raises(ValueError, match="delta must .*got 2"):
        after((4.0, 0.02, 3), group_size=2).get_epsilon(2.0)
