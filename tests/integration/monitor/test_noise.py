"""Monitored with noise: the paper's SGLD exactly."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.integration.engine import PrivacyEngine as RecordingEngine
from tests.integration.monitor.training import (
    N,
    epoch,
    gradients,
    linear_data,
    monitored,
    small,
    train,
)


# ------------------------------------------------------------------ the noisy mechanism
def test_the_noise_has_its_mean_and_standard_deviation():
    model = nn.Linear(400, 300, bias=False)  # 120,000 entries
    data = TensorDataset(torch.randn(8, 400), torch.randint(300, (8,)))
    run = monitored(
        model,
        data,
        data_loader=DataLoader(data, batch_size=4),
        noise_std=0.25,
        noise_generator=torch.Generator().manual_seed(0),
        poisson_sampling=False,
    )
    for before, _ in epoch(run):
        noise = (model.weight.grad - before[0]).double()
        size = noise.numel()
        assert abs(noise.mean()) < 4 * 0.25 / size**0.5
        assert abs(noise.std() - 0.25) < 4 * 0.25 / (2 * size) ** 0.5
        assert abs((noise**4).mean() / 0.25**4 - 3) < 4 * (96 / size) ** 0.5


@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_the_update_is_the_mechanism_exactly(poisson_sampling):
    """Scaled to the expected batch size, then noise: the same numbers by hand."""
    model = small()
    groups = [
        {"params": model[0].parameters(), "lr": 0.5},
        {"params": model[2].parameters()},
    ]
    run = monitored(
        model,
        optimizer=torch.optim.SGD(groups, lr=0.1),
        poisson_sampling=poisson_sampling,
        noise_generator=torch.Generator().manual_seed(7),
    )
    by_hand = torch.Generator().manual_seed(7)
    mean_batch_size = N / 6 if poisson_sampling else 4
    sizes = []
    for _ in range(3):
        for before, size in epoch(run):
            sizes.append(size)
            for used, mean in zip(gradients(run), before, strict=True):
                noise = torch.normal(0.0, 0.5, mean.shape, generator=by_hand)
                total = torch.zeros_like(mean) if size == 0 else mean * size
                torch.testing.assert_close(used, total / mean_batch_size + noise)
    assert set(sizes) == {4, 2} if not poisson_sampling else len(set(sizes)) > 3
    mechanism = run.recorder.ledger.mechanism
    assert mechanism.num_steps == len(sizes)
    assert mechanism.noise_std == pytest.approx(0.5 * mean_batch_size)
    assert mechanism.sample_rate == pytest.approx(1 / 6)
    assert mechanism.sampling == ("poisson" if poisson_sampling else "fixed")


def test_the_noise_generator_makes_runs_repeatable_and_spares_the_global_one():
    def trained(seed):
        torch.manual_seed(0)
        run = monitored(
            poisson_sampling=False, noise_generator=torch.Generator().manual_seed(seed)
        )
        torch.manual_seed(11)
        train(run)
        return [p.detach().clone() for p in run.module.parameters()], torch.rand(())

    first, again, other = trained(1), trained(1), trained(2)
    assert all(map(torch.equal, first[0], again[0]))
    assert not any(map(torch.equal, first[0], other[0]))
    assert first[1] == other[1]  # what comes next from the global generator
    torch.manual_seed(11)
    for _ in DataLoader(linear_data(), batch_size=4, shuffle=True):
        pass
    assert torch.rand(()) == first[1]


def test_empty_batches_are_updates_of_noise_alone():
    data = linear_data(8)
    run = monitored(
        data_set=data,
        data_loader=DataLoader(data),
        noise_generator=torch.Generator().manual_seed(7),
    )
    by_hand = torch.Generator().manual_seed(7)
    torch.manual_seed(1)
    sizes = []
    for _ in range(4):
        for x, y in run.loader:
            run.optimizer.zero_grad()
            cross_entropy(run.module(x), y).backward()
            if len(y) == 0:
                for gradient in gradients(run):  # as some layers leave them
                    gradient.fill_(torch.nan)
            before = [g.clone() for g in gradients(run)]
            run.optimizer.step()
            sizes.append(len(y))
            for used, mean in zip(gradients(run), before, strict=True):
                noise = torch.normal(0.0, 0.5, mean.shape, generator=by_hand)
                wanted = mean * len(y) + noise if len(y) else noise
                torch.testing.assert_close(used, wanted)
    assert sizes.count(0) >= 3 and max(sizes) >= 2
    mechanism = run.recorder.ledger.mechanism
    assert mechanism.num_steps == len(sizes) == 32
    assert mechanism.noise_std == 0.5


def test_parameters_without_a_gradient_stay():
    model = small()
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    run = monitored(model)
    for x, y in run.loader:
        run.optimizer.zero_grad()
        cross_entropy(run.module(x), y).backward()
        run.optimizer.step()
    assert torch.equal(model.unused, torch.ones(3))
    assert run.recorder.ledger.num_rows == 1


def secure_engine(seed):
    """An engine in secure mode whose source of random numbers is a seeded one."""
    engine = RecordingEngine(accountant="rdp")
    engine.secure_mode, engine.secure_rng = True, torch.Generator().manual_seed(seed)
    return engine


def secure_run(seed, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    data_set = TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
    model, optimizer, loader = secure_engine(seed).make_monitored(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data_set, batch_size=4),
        noise_std=0.5,
        criterion=nn.CrossEntropyLoss(),
        **options,
    )
    for x, y in loader:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.weight.detach().clone()


def test_secure_mode_draws_noise_and_batches_from_the_engines_source():
    assert torch.equal(secure_run(1), secure_run(1))
    assert not torch.equal(secure_run(1), secure_run(2))


@pytest.mark.parametrize("name", ["noise_generator", "sampling_generator"])
def test_secure_mode_takes_no_other_generator(name):
    with pytest.raises(ValueError, match=f"{name}.*secure_mode"):
        secure_run(1, **{name: torch.Generator()})
