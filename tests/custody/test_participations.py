"""Under fixed sampling participations are counted, and accounting charges the counts.

The oracle counts in the training loop itself, by a number that every example carries.
"""

import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine, Recorder
from opacus_pi.accounting import privacy_losses, worst_case_loss
from opacus_pi.accounting.group.worst_case import group_worst_case_loss
from opacus_pi.ledger import GradNormLedger
from opacus_pi.ledger.mechanism import NoisySGD

NUM, BATCH = 24, 6


def full_passes(loader, step):
    for _ in range(3):
        for batch in loader:
            step(*batch)


def left_early(loader, step):
    for _ in range(5):
        for batch in itertools.islice(loader, 2):
            step(*batch)


def restarted(loader, step):
    for _ in range(7):
        step(*next(iter(loader)))


def kept_in_a_list(loader, step):
    for batch in list(loader) * 4:
        step(*batch)


def inner_loop(loader, step):
    for batch in loader:
        for _ in range(3):
            step(*batch)


LOOPS = [full_passes, left_early, restarted, kept_in_a_list, inner_loop]


def counting_step(model, optimizer):
    """One update on a batch, and how often each example was in one.

    The last entry of an example's inputs is its number.
    """
    counted = np.zeros(NUM, int)

    def step(inputs, targets):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        np.add.at(counted, inputs[:, -1].long().numpy(), 1)

    return step, counted


def run(loop, *, shuffle=True, recorder=None, **options):
    """Train by a loop; return the engine, and how often the loop used each example."""
    torch.manual_seed(0)
    numbers = torch.arange(NUM)
    x = torch.randn(NUM, 4)
    data = TensorDataset(torch.cat([x, numbers[:, None].float()], dim=1), numbers % 3)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    engine = PrivacyEngine(accountant="rdp", recorder=recorder or Recorder(every=0.5))
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=DataLoader(data, batch_size=BATCH, shuffle=shuffle),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        **options,
    )
    step, counted = counting_step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop(loader, step)
    return engine, counted


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("mode", ["hooks", "fast"])
def test_counts_are_those_of_the_loop(loop, shuffle, mode):
    engine, counted = run(loop, shuffle=shuffle, grad_sample_mode=mode)
    ledger = engine.ledger
    np.testing.assert_array_equal(ledger.participations.sum(axis=0), counted)
    assert ledger.mechanism.max_participations == counted.max()
    # alpha / (2 sigma^2) for each update, noise_multiplier 1 and order 8
    assert worst_case_loss(ledger.mechanism, 8) == pytest.approx(4 * counted.max())


def test_each_example_is_charged_its_own_updates():
    engine, counted = run(left_early, shuffle=False)
    ledger = engine.ledger
    losses = privacy_losses(ledger, 8, hoelder_p=np.inf)
    ratios = np.minimum(np.nan_to_num(ledger.grad_norms), 1.0)
    expected = (ledger.participations * 4 * ratios**2).sum(axis=0)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert (losses[counted == 0] == 0).all() and (losses[counted > 0] > 0).all()


def test_a_swept_record_counts_too():
    recorder = Recorder("swept", every=0.5, criterion=nn.CrossEntropyLoss())
    engine, counted = run(restarted, shuffle=False, recorder=recorder)
    np.testing.assert_array_equal(engine.ledger.participations.sum(axis=0), counted)


def test_counts_survive_files_subsets_and_saved_states(tmp_path):
    engine, counted = run(restarted, shuffle=False)
    engine.ledger.save(tmp_path / "run")
    loaded = GradNormLedger.load(tmp_path / "run")
    assert loaded.mechanism.max_participations == counted.max()
    part = loaded.subset([3, 20])
    np.testing.assert_array_equal(part.participations.sum(axis=0), counted[[3, 20]])
    chunks = list(GradNormLedger.load_chunks(tmp_path / "run", 10))
    joined = np.concatenate([c.participations for c in chunks], axis=1)
    np.testing.assert_array_equal(joined, loaded.participations)
    again = Recorder(every=0.5)
    again.load_state_dict(engine.recorder.state_dict())
    np.testing.assert_array_equal(again.ledger.participations, loaded.participations)


def test_the_most_expensive_updates_count():
    noise = np.array([2.0, 1.0, 4.0])
    mechanism = NoisySGD(6, 0.5, noise, 1.0, sampling="fixed", max_participations=3)
    # rows of 2, 2 and 2 updates; order 2: 1 / sigma^2 each
    found = worst_case_loss(mechanism, 2, steps=[2, 4, 6])
    assert found == pytest.approx(2 * 1.0 + 1 * 0.25)
    group = group_worst_case_loss(mechanism, 2, 2, steps=[2, 4, 6])
    assert group == pytest.approx(4 * (2 * 1.0 + 1 * 0.25))


def test_poisson_ledgers_have_no_counts():
    with pytest.raises(ValueError, match="max_participations must be None for"):
        NoisySGD(6, 0.5, 1.0, max_participations=3)
    norms = np.ones((1, 2))
    with pytest.raises(ValueError, match="participations must be None for"):
        GradNormLedger(
            NoisySGD(6, 0.5, 1.0), [6], norms, participations=np.ones((1, 2), int)
        )


@pytest.mark.parametrize("loop", [full_passes, left_early, restarted])
@pytest.mark.parametrize("noise_std", [0.0, 0.5])
def test_monitored_runs_count_too(loop, noise_std):
    torch.manual_seed(0)
    data = TensorDataset(torch.arange(NUM).float()[:, None], torch.arange(NUM) % 3)
    model = nn.Linear(1, 3)
    engine = PrivacyEngine(accountant="rdp", recorder=Recorder("swept", every=0.5))
    model, optimizer, loader = engine.make_monitored(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-4),
        data_loader=DataLoader(data, batch_size=BATCH, shuffle=True),
        noise_std=noise_std,
        criterion=nn.CrossEntropyLoss(),
        poisson_sampling=False,
    )
    step, counted = counting_step(model, optimizer)
    loop(loader, step)
    np.testing.assert_array_equal(engine.ledger.participations.sum(axis=0), counted)
