"""The engine: norms and noise on record are those of the update."""

import gc
import math
import warnings
from dataclasses import replace

import numpy as np
import opacus
import pytest
import torch
from opacus.accountants import RDPAccountant
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.utils.data import DataLoader

from opacus_pi import accounting
from opacus_pi.accounting import fingerprint, privacy_statement, worst_case_loss
from opacus_pi.gradients import sweep
from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.integration.readings import _warn_if_most_are_equal
from opacus_pi.recording import AccountingError, Recorder
from tests.private_training import ADAPTIVE, Net, Training, data, one_at_a_time

pytestmark = pytest.mark.filterwarnings(
    "ignore:This run has no ledger", "ignore:PrivacyEngine detected new dataset"
)


NUM_PARAMETERS = 6


CLIPPINGS = {
    "flat": {"max_grad_norm": 0.7},
    "per_layer": {"max_grad_norm": [0.3] * NUM_PARAMETERS},
    "adaptive": {"max_grad_norm": 0.7, **ADAPTIVE},
}


COMBINATIONS = [
    (mode, clipping, reduction, poisson, managed)
    for mode in ("hooks", "functorch", "ew", "ghost")
    for clipping in CLIPPINGS
    for reduction in ("mean", "sum")
    for poisson in (True, False)
    for managed in (True, False)
    if clipping == "flat" or mode in ("hooks", "functorch")
]


def describe(value):
    return {True: "yes", False: "no"}.get(value, value)


@pytest.mark.parametrize(
    "mode,clipping,reduction,poisson,managed", COMBINATIONS, ids=describe
)
def test_norms_and_noise_are_those_of_the_update(
    mode, clipping, reduction, poisson, managed
):
    training = Training(
        grad_sample_mode=mode,
        clipping=clipping,
        loss_reduction=reduction,
        poisson_sampling=poisson,
        batch_size=12,  # so that Opacus meets no empty batch
        lr=0.05,
        **CLIPPINGS[clipping],
    )
    truth, clip_norms = [], []

    def note(x, y):
        truth.extend(one_at_a_time(training.plain_copy(), x, y))
        clip_norms.append(float(training.optimizer.max_grad_norm))

    for _ in training.memory_managed(5) if managed else [0]:
        training.train(3, before_batch=note)
    log = training.recorder
    np.testing.assert_allclose([norm for _, norm in log.observed], truth, rtol=1e-5)
    indices = [index for index, _ in log.observed]
    assert len(indices) == len(truth) > 24
    counts = training.engine.attribution
    assert counts["by_storage"] == len(truth) == sum(counts.values())

    assert len(log.updates) == 6  # physical batches are no updates
    for update in log.updates:
        clip = update["max_grad_norm"]
        assert update["noise_std"] == pytest.approx(clip, rel=1e-6)
        assert update["sample_rate"] == 0.5
        assert any(clip == seen for seen in clip_norms)
    if clipping == "per_layer":
        assert clip_norms[0] == pytest.approx(0.3 * math.sqrt(NUM_PARAMETERS))
    if clipping == "adaptive":
        assert len(set(clip_norms)) > 1
    ledger = training.engine.ledger
    assert ledger.num_rows == 3 and ledger.source == "observed"
    assert ledger.mechanism.sampling == ("poisson" if poisson else "fixed")
    assert ledger.data_set == fingerprint(training.data_set)


def test_frozen_parameters_do_not_count():
    net = Net()
    net.conv.requires_grad_(False)
    training, truth = Training(module=net), []

    def note(x, y):
        fresh = training.plain_copy()
        fresh.conv.requires_grad_(False)
        truth.extend(one_at_a_time(fresh, x, y))

    training.train(1, before_batch=note)
    seen = [norm for _, norm in training.recorder.observed]
    np.testing.assert_allclose(seen, truth, rtol=1e-5)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_without_wrapping_the_model(mode):
    training = Training(wrap_model=False, grad_sample_mode=mode, batch_size=12)
    truth = []
    training.train(
        1,
        before_batch=lambda x, y: truth.extend(
            one_at_a_time(training.plain_copy(), x, y)
        ),
    )
    seen = [norm for _, norm in training.recorder.observed]
    np.testing.assert_allclose(seen, truth, rtol=1e-5)


def test_accumulated_batches_are_one_update_at_their_joint_rate():
    training = Training(poisson_sampling=False)
    training.optimizer.zero_grad()
    for x, y in training.loader:
        training.criterion(training.model(x), y).backward()
    training.optimizer.step()
    assert sorted(i for i, _ in training.recorder.observed) == list(range(24))
    assert [u["sample_rate"] for u in training.recorder.updates] == [1.0]


def test_empty_batches_are_updates_without_rows():
    training = Training(batch_size=1).train(2)
    assert len(training.recorder.updates) == 48
    sizes = len(training.recorder.observed)
    assert 0 < sizes and training.engine.attribution["unattributed"] == 0
    assert training.engine.ledger.mechanism.num_steps == 48


def test_schedulers_are_recorded_as_they_were_used():
    training = Training(noise_multiplier=2.0, batch_size=12)
    noise = ExponentialNoise(training.optimizer, gamma=0.5)
    clip = ExponentialGradClip(training.optimizer, gamma=0.1)
    for _ in range(3):
        training.train(1)
        noise.step()
        clip.step()
    used = [(u["noise_std"], u["max_grad_norm"]) for u in training.recorder.updates]
    expected = [(2.0 * 0.5**k * 0.1**k, 0.1**k) for k in (0, 0, 1, 1, 2, 2)]
    np.testing.assert_allclose(used, expected, rtol=1e-12)


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_worst_case_is_opacus_own_rdp(clipping):
    training = Training(
        noise_multiplier=0.8,
        batch_size=12,
        recorder=Recorder(every=range(1, 7)),  # the adapted clip norm of each update
        clipping=clipping,
        **{**CLIPPINGS[clipping], "max_grad_norm": 1e-3},
    ).train(3)
    engine, ledger = training.engine, training.engine.ledger
    assert np.nanmin(ledger.grad_norms) > 1e-3  # every gradient is clipped
    history = engine.accountant.history
    rtol = 1e-9 if clipping == "flat" else 1e-6  # adapted in single precision
    for order in (2, 3, 8, 32):
        rdp = sum(
            opacus.accountants.analysis.rdp.compute_rdp(
                q=rate, noise_multiplier=noise, steps=steps, orders=[order]
            )[0]
            for noise, rate, steps in history
        )
        worst = worst_case_loss(ledger.mechanism, order, steps=ledger.steps)
        np.testing.assert_allclose(worst, rdp, rtol=rtol)
        np.testing.assert_allclose(engine.privacy_losses(order), rdp, rtol=rtol)


@pytest.mark.parametrize("accountant", ["rdp", "prv", "per_instance"])
@pytest.mark.parametrize("noise", [0.6, 3.0])
def test_no_epsilon_exceeds_the_worst_case(accountant, noise):
    training = Training(accountant=accountant, noise_multiplier=noise, batch_size=4)
    engine = training.train(2).engine
    bound = max(0.0, engine.get_epsilon(1e-3))
    values = engine.epsilons(1e-3)
    assert values.shape == (24,) and values.dtype == np.float64
    assert values.max() <= bound and values.min() >= 0


@pytest.mark.parametrize("accountant", ["rdp", "prv", "per_instance"])
def test_epsilon_is_zero_before_training(accountant):
    engine = Training(accountant=accountant).engine
    assert engine.get_epsilon(1e-3) == 0


def test_an_approximate_epsilon_limits_nothing():
    """Every gradient is clipped, so each example has the worst case."""
    options = {"max_grad_norm": 1e-3, "noise_multiplier": 1.0, "batch_size": 4}
    engine = Training(accountant="gdp", **options).train(1).engine
    exact = Training(accountant="prv", **options).train(1).engine
    with pytest.warns(UserWarning, match="is an approximation"):
        approximate = engine.get_epsilon(1e-5)
    truth = exact.get_epsilon(1e-5)
    assert approximate < 0.9 * truth
    with pytest.warns(UserWarning, match="share the largest value"):
        assert engine.epsilons(1e-5).min() >= truth
        assert engine.epsilon_limits(1e-5).min() >= truth
        assert engine.epsilons(1e-5, composition="numerical").min() >= 0.99 * truth


def test_easy_examples_have_smaller_losses():
    training = Training(max_grad_norm=5.0, noise_multiplier=0.5, batch_size=12)
    engine = training.train(4).engine
    losses = engine.privacy_losses(8)
    norms = np.nanmean(engine.ledger.grad_norms, axis=0)
    assert losses[norms.argmin()] < losses[norms.argmax()]


def test_a_warning_where_most_examples_have_the_same_loss():
    always_clipped = Training(max_grad_norm=1e-3).train(4).engine
    words = "24 of 24 examples share the largest value.* 24 of them had gradients"
    with pytest.warns(UserWarning, match=words) as w:
        always_clipped.privacy_losses(8)
    assert "were cut" not in str(w[0].message)
    with pytest.warns(UserWarning, match="cannot be distinguished"):
        always_clipped.epsilons(1e-3)
    never_clipped = Training(max_grad_norm=1e3).train(4).engine
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        never_clipped.privacy_losses(8)
        never_clipped.epsilons(1e-3)


def test_the_warning_of_equal_losses_names_cut_estimates():
    engine = Training(max_grad_norm=1e-3, noise_multiplier=1.0).train(4).engine
    ledger = engine.ledger
    below = replace(ledger, grad_norms=ledger.grad_norms.clip(max=0.999e-3))
    losses = accounting.privacy_losses(below, 6)
    worst = accounting.worst_case_loss(below.mechanism, 6)
    assert (losses == worst).all()  # although no example is clipped
    with pytest.warns(UserWarning, match="24 had a smaller norm at some update") as w:
        _warn_if_most_are_equal(losses, below)
    text = str(w[0].message)
    assert "hoelder_p=inf" in text and "24 of them" not in text


def test_fixed_sampling_is_not_capped_by_a_number_that_assumes_poisson():
    training = Training(poisson_sampling=False, noise_multiplier=3.0, batch_size=4)
    engine = training.train(3).engine
    assert engine.epsilons(1e-3).max() > engine.get_epsilon(1e-3)


def test_make_private_with_epsilon():
    torch.manual_seed(0)
    net, engine = Net(), PrivacyEngine(accountant="rdp")
    _, optimizer, loader = engine.make_private_with_epsilon(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=12),
        target_epsilon=5.0,
        target_delta=1e-3,
        epochs=1,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert engine.ledger.mechanism.noise_std == optimizer.noise_multiplier
    assert engine.epsilons(1e-3).max() <= 5.0


def test_swept_rows_are_the_sweeps_and_leave_no_trace():
    recorder = Recorder("swept", criterion=nn.CrossEntropyLoss())
    swept = Training(recorder=recorder, grad_sample_mode="hooks").train(2)
    plain = Training(engine=opacus.PrivacyEngine(accountant="rdp")).train(2)
    for a, b in zip(swept.net.parameters(), plain.net.parameters(), strict=True):
        assert torch.equal(a, b)
    ledger = swept.engine.ledger
    assert ledger.source == "swept" and ledger.num_rows == 2
    now = sweep(swept.plain_copy(), nn.CrossEntropyLoss(), data())
    np.testing.assert_allclose(ledger.grad_norms[-1], now.grad_norms, rtol=1e-5)


def test_a_swept_recorder_needs_a_criterion_before_anything_is_wrapped():
    net = Net()
    with pytest.raises(ValueError, match=r"Recorder\(criterion=\.\.\.\)"):
        Training(module=net, recorder=Recorder("swept"))
    assert not net._forward_hooks and not hasattr(net, "autograd_grad_sample_hooks")


def test_weights_of_the_rows_are_kept(tmp_path):
    Training(recorder=Recorder(every=1, weights_dir=tmp_path)).train(2)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_the_engine_knows_the_users_module_weakly():
    training = Training()
    engine = training.engine
    assert engine.module is training.net
    del training
    gc.collect()
    with pytest.raises(AccountingError, match="keep the model"):
        _ = engine.module


def test_before_anything_is_prepared():
    engine = PrivacyEngine()
    assert sum(engine.attribution.values()) == 0
    for ask in (
        lambda: engine.ledger,
        lambda: engine.module,
        lambda: engine.privacy_losses(2),
        lambda: engine.epsilons(1e-5),
    ):
        with pytest.raises(AccountingError, match="make_private"):
            ask()


def test_batch_norm_is_rejected_by_opacus_with_a_way_to_go_on():
    def with_batch_norm():
        return nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten())

    with pytest.raises(UnsupportedModuleError) as ours:
        Training(module=with_batch_norm())
    with pytest.raises(UnsupportedModuleError) as opacus_s:
        Training(module=with_batch_norm(), engine=opacus.PrivacyEngine())
    assert type(ours.value) is type(opacus_s.value)
    notes = " ".join(getattr(ours.value, "__notes__", map(str, ours.value.args)))
    assert "make_monitored" in notes and "make_compatible" in notes


def test_monitored_training_from_an_engine():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3)
    )
    engine = PrivacyEngine()
    criterion = nn.CrossEntropyLoss()
    model, optimizer, loader = engine.make_monitored(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=12),
        noise_std=0.1,
        criterion=criterion,
    )
    assert model is net and engine.module is net
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    ledger = engine.ledger
    assert ledger.source == "swept" and not np.isnan(ledger.grad_norms).any()
    assert engine.privacy_losses(4).shape == (24,)
    assert engine.epsilons(1e-3).max() > 0


def test_the_accountants_history_is_opacus_own():
    ours = Training().train(2).engine.accountant
    assert isinstance(ours, RDPAccountant)
    other = Training(engine=opacus.PrivacyEngine(accountant="rdp")).train(2)
    assert ours.history == other.engine.accountant.history


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_a_statement_and_the_epsilons_of_an_engine_agree(accountant):
    training = Training(engine=PrivacyEngine(accountant=accountant)).train(2)
    engine, bound = training.engine, training.engine.get_epsilon(1e-3)
    own = engine.epsilons(1e-3)
    for row in (int(own.argmin()), int(own.argmax())):
        found = engine.privacy_statement([row], 1e-3)
        of_ledger = privacy_statement(engine.ledger, [row], 1e-3).worst_case
        assert found.worst_case == min(of_ledger, bound)
        assert found.is_accountants == (bound < of_ledger)
        assert found.epsilon == min(own[row], found.worst_case)
        assert found.limit is None or found.epsilon <= found.limit <= bound
    group = engine.privacy_statement([3, 5], 1e-3)
    assert group.worst_case > bound and "The bound is converted from" in str(group)


def test_the_engine_states_what_one_person_may_be_told():
    engine = Training().train(1).engine
    for rows, subject in (([3], None), ([3, 5], "Ann")):
        found = engine.privacy_statement(rows, 1e-3, subject=subject)
        assert found == privacy_statement(engine.ledger, rows, 1e-3, subject=subject)
    assert str(found).startswith("Privacy statement for Ann (2 training examples)")
    with pytest.raises(AccountingError, match="Nothing was recorded yet"):
        Training().engine.privacy_statement([3], 1e-3)
