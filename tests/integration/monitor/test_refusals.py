"""What monitoring cannot account for, and what it does not begin with."""

import pytest
import torch
from opacus import PrivacyEngine
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)

from opacus_pi.recording import AccountingError, Recorder
from tests.integration.monitor.training import (
    N,
    gradients,
    linear_data,
    monitored,
    refused,
    small,
    train,
)


def test_a_part_of_a_batch_is_refused():
    run = monitored(poisson_sampling=False)
    x, y = next(iter(run.loader))
    cross_entropy(run.module(x[::2]), y[::2]).backward()
    run.optimizer.step()
    refused(run, "examples update 1 averaged")


def test_accumulated_gradients_are_refused_and_left_as_they_are():
    run = monitored(
        poisson_sampling=False, noise_generator=torch.Generator().manual_seed(7)
    )
    batches = iter(run.loader)
    for _ in range(2):
        x, y = next(batches)
        cross_entropy(run.module(x), y).backward()
    before = [p.grad.clone() for p in run.module.parameters()]
    with pytest.warns(UserWarning, match="not known over how many examples update 1"):
        run.optimizer.step()
    by_hand = torch.Generator().manual_seed(7)
    for used, total in zip(gradients(run), before, strict=True):
        noise = torch.normal(0.0, 0.5, total.shape, generator=by_hand)
        torch.testing.assert_close(used, total + noise)
    assert run.recorder.num_steps == 1
    refused(run, "update 1 .*larger batch size")


def test_batches_from_elsewhere_are_refused():
    run = monitored()
    train(run)
    run.optimizer.zero_grad()
    x, y = next(iter(DataLoader(linear_data(), batch_size=4)))
    cross_entropy(run.module(x + 1), y).backward()
    run.optimizer.step()
    refused(run, "examples update 7 averaged")


def test_a_model_in_evaluation_mode_is_refused():
    run = monitored()
    run.module.eval()
    x, y = next(iter(run.loader))
    cross_entropy(run.module(x), y).backward()
    run.optimizer.step()
    refused(run, "in training mode")


def test_a_step_without_gradients_is_refused():
    run = monitored()
    run.optimizer.step()
    refused(run, "Update 1 had no gradients to which noise")


def test_strict_raises_at_the_step():
    run = monitored(recorder=Recorder("swept", strict=True))
    with pytest.raises(AccountingError, match="Update 1 had no gradients"):
        run.optimizer.step()


@pytest.mark.parametrize("noise_std", [0, 0.5])
@pytest.mark.parametrize(
    "sampler", [WeightedRandomSampler([1.0] * N, N), RandomSampler(range(N), True)]
)
def test_a_sampler_with_replacement_is_refused_unless_replaced(sampler, noise_std):
    loader = DataLoader(linear_data(), batch_size=4, sampler=sampler)
    options = {"data_loader": loader, "noise_std": noise_std}
    run = monitored(**options, poisson_sampling=False)
    train(run)
    refused(run, f"How often {type(sampler).__name__} draws")
    run = monitored(**options, poisson_sampling=True)
    train(run)
    assert run.recorder.ledger.num_rows == 1


# ---------------------------------------------------------------------------- bad input
def test_a_closure_would_overwrite_the_noise():
    run = monitored()
    for call in (
        lambda: run.optimizer.step(lambda: 0.0),
        lambda: run.optimizer.step(closure=lambda: 0.0),
    ):
        with pytest.raises(ValueError, match="without a closure.*noise_std=0"):
            call()
    assert run.recorder.num_steps == 0


def test_scaled_gradients_are_refused():
    run = monitored()
    run.optimizer.grad_scale = torch.tensor(1024.0)
    with pytest.raises(ValueError, match=r"scaler\.unscale_\(optimizer\) first"):
        run.optimizer.step()


class Stream(IterableDataset):
    def __len__(self):
        return N

    def __iter__(self):
        return iter(linear_data())


class Endless(Dataset):
    def __getitem__(self, index):
        return torch.zeros(4), 0


def scalar_criterion(outputs, targets):
    return cross_entropy(outputs, targets)


def wrapped(model):
    engine = PrivacyEngine()
    return engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(linear_data(), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda m: {"noise_std": -0.1},
            "noise_std must be finite and at least 0, got -0.1",
        ),
        (lambda m: {"noise_std": float("nan")}, "noise_std must .*got nan"),
        (lambda m: {"noise_std": float("inf")}, "noise_std must .*got inf"),
        (
            lambda m: {"recorder": Recorder()},
            r"mode must .*got 'observed'.*Recorder\(mode=",
        ),
        (lambda m: {"criterion": scalar_criterion}, 'criterion.*reduction="none"'),
        (
            lambda m: {"data_loader": DataLoader(Stream())},
            "must be a map-style data set with __len__.*, got Stream",
        ),
        (
            lambda m: {"data_loader": DataLoader(Endless(), sampler=[0, 1])},
            "must be a map-style data set with __len__.*, got Endless",
        ),
        (
            lambda m: {"data_loader": DataLoader(linear_data(2), 4, drop_last=True)},
            "has no batch",
        ),
        (lambda m: {"module": wrapped(m)[0]}, r"module must .*to_standard_module\(\)"),
        (
            lambda m: {"optimizer": wrapped(m)[1]},
            "optimizer must .*got DP.*original_optimizer",
        ),
        (
            lambda m: {"optimizer": torch.optim.SGD(small().parameters(), lr=1)},
            "optimizer must have only parameters of module, got SGD with other param",
        ),
        (
            lambda m: {"module": nn.Module()},
            "optimizer must have only parameters .*, got SGD",
        ),
    ],
)
def test_bad_input_changes_nothing(change, match):
    model = small()
    changes = change(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder("swept")
    options = {"optimizer": optimizer, "recorder": recorder, **changes}
    with pytest.raises(ValueError, match=match):
        monitored(model, **options)
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(AccountingError, match="Nothing is being recorded"):
        _ = recorder.ledger


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (
            nn.parallel.DistributedDataParallel,
            "noise_std must be 0 under Distr.*, got 0.5",
        ),
        (DPDDP, "trained by one process or under DistributedDataParallel, got Spread"),
    ],
)
def test_a_distributed_module_is_refused(kind, match):
    class Spread(kind):
        def __init__(self):
            nn.Module.__init__(self)

    optimizer = torch.optim.SGD(small().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=match):
        monitored(module=Spread(), optimizer=optimizer)
