"""Monitored loops as people write them."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine
from opacus.data_loader import DPDataLoader
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from tests.integration.monitor.training import (
    N,
    epoch,
    gradients,
    linear_data,
    monitored,
    small,
    train,
)


# ----------------------------------------------------------- loops as people write them
def test_looking_at_batches_without_training_on_them_changes_nothing():
    run = monitored()
    next(iter(run.loader))
    for _ in range(2):
        train(run)
        run.module.eval()
        with torch.no_grad():
            for x, _ in run.loader:
                run.module(x)
    assert run.recorder.ledger.mechanism.num_steps == 12


def test_copies_of_batches_are_recognised():
    run = monitored(noise_generator=torch.Generator().manual_seed(7))
    by_hand = torch.Generator().manual_seed(7)
    for x, y in run.loader:
        run.optimizer.zero_grad()
        cross_entropy(run.module(x.clone()), y).backward()
        before = [p.grad.clone() for p in run.module.parameters()]
        run.optimizer.step()
        for used, mean in zip(gradients(run), before, strict=True):
            noise = torch.normal(0.0, 0.5, mean.shape, generator=by_hand)
            torch.testing.assert_close(used, mean * len(y) / (N / 6) + noise)
    assert run.recorder.ledger.num_rows == 1


def test_a_second_call_replaces_the_first():
    run = monitored()
    train(run)
    again = monitored(
        run.module,
        optimizer=run.optimizer,
        noise_generator=torch.Generator().manual_seed(7),
    )
    by_hand = torch.Generator().manual_seed(7)
    for before, size in epoch(again):
        for used, mean in zip(gradients(again), before, strict=True):
            noise = torch.normal(0.0, 0.5, mean.shape, generator=by_hand)
            torch.testing.assert_close(used, mean * size / (N / 6) + noise)
    assert run.recorder.num_steps == again.recorder.num_steps == 6
    silent = monitored(run.module, optimizer=run.optimizer, noise_std=0)
    assert len(run.module._forward_hooks) == 1  # that counts batches
    train(silent)
    assert silent.recorder.num_steps == 6 and again.recorder.num_steps == 6


def test_the_model_can_be_copied_and_saved():
    run = monitored()
    train(run)
    for twin in (copy.deepcopy(run.module), pickle.loads(pickle.dumps(run.module))):
        x = torch.randn(2, 4)
        assert torch.equal(twin(x), run.module(x))
    assert set(run.module.state_dict()) == set(small().state_dict())


def test_poisson_sampling_is_opacus_own():
    data = linear_data()
    user = DataLoader(data, batch_size=5, shuffle=True)
    run = monitored(data_set=data, data_loader=user)
    assert type(user) is DataLoader and isinstance(run.loader, DPDataLoader)
    model = small()
    _, _, theirs = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=user,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    drawn = []
    for loader in (run.loader, theirs):
        torch.manual_seed(4)
        drawn.append([y for _, y in loader])
    assert len(drawn[0]) == len(drawn[1]) == 5
    assert all(map(torch.equal, *drawn))


def test_poisson_sampling_can_have_its_own_generator():
    runs = [
        monitored(sampling_generator=torch.Generator().manual_seed(9)) for _ in range(2)
    ]
    drawn = [[y for _, y in run.loader] for run in runs]
    assert all(map(torch.equal, *drawn))


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_a_prefetcher_that_looks_ahead_changes_nothing(poisson_sampling, copies):
    def train_on(run, batches):
        for x, y in batches:
            run.optimizer.zero_grad()
            cross_entropy(run.module(x), y).backward()
            run.optimizer.step()

    def two_ahead(loader):
        held = []
        for x, y in loader:
            held.append((x.clone(), y) if copies else (x, y))
            if len(held) > 2:
                yield held.pop(0)
        yield from held

    runs = [
        monitored(
            poisson_sampling=poisson_sampling,
            noise_generator=torch.Generator().manual_seed(7),
            sampling_generator=torch.Generator().manual_seed(8),
        )
        for _ in range(2)
    ]
    for run, ahead in zip(runs, (lambda loader: loader, two_ahead), strict=True):
        torch.manual_seed(9), np.random.seed(9), random.seed(9)
        train_on(run, ahead(run.loader))
        assert run.recorder.ledger.mechanism.num_steps == len(run.loader)
    # of a last batch that is smaller, too
    pairs = zip(*(run.module.parameters() for run in runs), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
