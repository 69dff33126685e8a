"""Sample rates of loaders, and of updates on accumulated gradients without noise."""

import warnings

import numpy as np
import pytest
import torch
from opacus.data_loader import DPDataLoader
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from opacus_pi import GradNormLedger, NoisySGD, PrivacyEngine
from opacus_pi.accounting import privacy_losses
from opacus_pi.gradients import norm_sweep
from opacus_pi.integration.monitor import sampling_scheme
from opacus_pi.recording import Recorder
from tests.integration.monitor.training import N, linear_data, monitored, small

SIGMA, CRITERION = 3.0, nn.CrossEntropyLoss()


def quiet(**changes):
    """A monitored run without noise over six batches of four."""
    return monitored(
        **{
            "noise_std": 0,
            "poisson_sampling": False,
            "data_set": linear_data(24),
            "recorder": Recorder("swept", every=[2, 4]),
            **changes,
        }
    )


def accumulate(run, num_batches, num_epochs=2, passes=lambda x, y: [(x, y)]):
    """The user's loop; returns the norms of all examples after every update."""
    norms, count = [], 0
    for _ in range(num_epochs):
        for x, y in run.loader:
            for part, labels in passes(x, y):
                loss = cross_entropy(run.module(part), labels, reduction="sum")
                (loss / len(y) / num_batches).backward()
            count += 1
            if count % num_batches == 0:
                run.optimizer.step()
                run.optimizer.zero_grad()
                norms.append(norm_sweep(run.module, CRITERION, linear_data(24)))
    return norms


def assert_rate(run, rate):
    np.testing.assert_allclose(run.recorder.ledger.mechanism.sample_rate, rate)


def test_the_record_is_the_one_made_by_hand():
    run = quiet()
    norms = accumulate(run, 3)
    assert len(norms) == 4
    rate = 3 / 6  # an example is in one batch of six, and in half of the updates
    mechanism = NoisySGD(4, rate, noise_std=SIGMA, sampling="fixed")
    found = run.recorder.ledger.with_noise_std(SIGMA)
    counts = found.participations
    assert (counts.sum(axis=0) == 2).all()  # two epochs
    norms = np.array([norms[1], norms[3]])
    by_hand = GradNormLedger(mechanism, [2, 4], norms, participations=counts)
    for order in (2.0, 8.0):
        np.testing.assert_allclose(
            privacy_losses(found, order), privacy_losses(by_hand, order), rtol=1e-5
        )


@pytest.mark.parametrize("poisson", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_rates_add_up(poisson, num_workers):
    loader = DataLoader(linear_data(24), batch_size=4, num_workers=num_workers)
    run = quiet(data_loader=loader, poisson_sampling=poisson)
    accumulate(run, 2, num_epochs=2)
    mechanism = run.recorder.ledger.mechanism
    assert mechanism.sampling == ("poisson" if poisson else "fixed")
    assert_rate(run, 2 / 6)


def test_one_batch_an_update_is_the_rate_as_before():
    run = quiet()
    accumulate(run, 1, num_epochs=1)
    assert_rate(run, 1 / 6)


def test_all_batches_are_the_whole_data_set():
    run = quiet(recorder=Recorder("swept", every=[1]))
    accumulate(run, 6, num_epochs=2)
    assert_rate(run, 1.0)
    run = quiet(recorder=Recorder("swept", every=[1]))
    accumulate(run, 12, num_epochs=2)
    assert_rate(run, 1.0)  # and no more


def test_a_row_has_the_largest_rate_of_its_updates():
    run = quiet()
    for count, (x, y) in enumerate(run.loader, start=1):
        cross_entropy(run.module(x), y).backward()
        if count in (1, 3, 4, 6):  # of 1, 2, 1 and 2 batches
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert_rate(run, 2 / 6)


def halves(x, y):
    return zip(x.chunk(2), y.chunk(2), strict=True)


@pytest.mark.parametrize(
    "passes",
    [
        halves,  # a batch in parts
        lambda x, y: [(x, y), (x, y)],  # two losses of one batch
        lambda x, y: [(x * 1.01, y)],  # transformed in the loop
        lambda x, y: [(x * 1.01, y), (x * 0.99, y)],
        lambda x, y: halves(x.clone(), y),  # on another device
        lambda x, y: [(a.clone(), b) for a, b in halves(x, y)],
    ],
)
def test_passes_of_one_batch_count_once(passes):
    run = quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulate(run, 2, passes=passes)
    assert_rate(run, 2 / 6)


def test_unidentified_passes_count_as_a_batch_each_with_one_warning():
    run = quiet()
    with pytest.warns(
        UserWarning, match="2 forward passes.* 2 of them .* too large"
    ) as w:
        accumulate(run, 1, passes=lambda x, y: halves(x * 1.01, y))
    assert len([one for one in w if "forward passes" in str(one.message)]) == 1
    assert_rate(run, 2 / 6)


def test_evaluations_between_updates_are_not_counted():
    run = quiet()
    data = linear_data(24)[:]
    for x, y in run.loader:
        cross_entropy(run.module(x), y).backward()
        with torch.no_grad():
            run.module(data[0])  # in training mode
        run.module(data[0]).sum().detach()  # no backward pass comes
        run.module.eval()(x).sum()
        run.module.train()
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert_rate(run, 1 / 6)


@pytest.mark.parametrize(
    "passes", [lambda x, y: [(x, y)], lambda x, y: [(x.clone(), y)], halves]
)
def test_a_loop_that_loads_all_batches_first(passes):
    run = quiet()
    run.loader = list(run.loader)
    accumulate(run, 3, passes=passes)
    assert_rate(run, 3 / 6)


def test_an_engine_records_it_too():
    engine, model = PrivacyEngine(), small()
    model, optimizer, loader = engine.make_monitored(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(linear_data(24), batch_size=4),
        noise_std=0.0,
        criterion=CRITERION,
        poisson_sampling=False,
    )
    for count, (x, y) in enumerate([*loader, *loader], start=1):
        cross_entropy(model(x), y).backward()
        if count % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert engine.ledger.mechanism.sample_rate == pytest.approx(2 / 6)


def test_sampling_schemes_of_loaders():
    data = linear_data()
    assert sampling_scheme(DataLoader(data, batch_size=100)).mean_batch_size == N
    assert sampling_scheme(DataLoader(data, batch_size=4)).mean_batch_size == 4
    dropping = sampling_scheme(DataLoader(data, batch_size=4, drop_last=True))
    assert dropping.sample_rate == 1 / 5
    poisson = sampling_scheme(
        DPDataLoader.from_data_loader(DataLoader(data, batch_size=4))
    )
    assert poisson.sample_rate == 1 / 6
    assert poisson.mean_batch_size == pytest.approx(N / 6)
