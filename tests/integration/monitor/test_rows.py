"""The record of monitored training: where rows are, and what they hold."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from opacus_pi.accounting import privacy_losses
from opacus_pi.integration.engine import PrivacyEngine as RecordingEngine
from opacus_pi.recording import Recorder
from tests.integration.monitor.training import (
    Augmented,
    N,
    autograd_norm,
    epoch,
    linear_data,
    monitored,
    net,
    small,
    train,
)


# --------------------------------------------------------------------------- the record
def test_rows_are_written_where_promised_in_the_units_of_the_mechanism():
    num_steps = 18
    recorder = Recorder.evenly_spaced(5, num_steps=num_steps, mode="swept")
    run = monitored(recorder=recorder, noise_std=0.5)
    train(run, 3)
    ledger = recorder.ledger
    assert ledger.steps.tolist() == [round(18 * (i + 1) / 5) for i in range(5)]
    assert ledger.source == "swept" and ledger.num_examples == N
    assert ledger.data_set.startswith(f"TensorDataset:{N}:")
    wanted = ledger.grad_norms.astype(np.float64) / (N / 6 * 0.5)
    np.testing.assert_allclose(ledger.ratios(), wanted, rtol=1e-15)
    for measured in (ledger.confidences, ledger.errors, ledger.correct):
        assert measured.shape == (5, N)


def test_swept_rows_are_the_norms_at_their_weights(tmp_path):
    data = Augmented(9)
    data.__class__ = type("Plain", (Augmented,), {"__getitem__": plain_item})
    model = net()
    recorder = Recorder("swept", every=[2, 5], weights_dir=tmp_path, batch_size=4)
    run = monitored(
        model,
        data,
        recorder=recorder,
        data_loader=DataLoader(data, batch_size=3, shuffle=True),
        poisson_sampling=False,
    )
    train(run, 2)
    reference = net().eval()
    for row, step in enumerate([2, 5]):
        reference.load_state_dict(
            load_file(tmp_path / f"weights-{step:08d}.safetensors")
        )
        wanted = [autograd_norm(reference, *data[i]) for i in range(len(data))]
        np.testing.assert_allclose(recorder.ledger.grad_norms[row], wanted, rtol=1e-5)


def plain_item(self, index):
    return self.images[index], self.targets[index]


def test_a_killed_run_resumes_to_the_same_ledger():
    def begun():
        return monitored(recorder=Recorder("swept", every=0.75))

    torch.manual_seed(0)
    whole = begun()
    train(whole, 3)
    torch.manual_seed(0)
    first = begun()
    train(first)
    kept = copy.deepcopy(
        {
            "model": first.module.state_dict(),
            "optimizer": first.optimizer.state_dict(),
            "recorder": first.recorder.state_dict(),
            "random": torch.get_rng_state(),
        }
    )
    second = begun()
    second.module.load_state_dict(kept["model"])
    second.optimizer.load_state_dict(kept["optimizer"])
    second.recorder.load_state_dict(kept["recorder"])
    torch.set_rng_state(kept["random"])
    train(second, 2)
    ledgers = [run.recorder.ledger for run in (whole, second)]
    assert ledgers[0].mechanism == ledgers[1].mechanism
    assert ledgers[0].steps.tolist() == ledgers[1].steps.tolist() == [5, 9, 14, 18]
    for name in ("grad_norms", "confidences", "errors", "correct"):
        assert np.array_equal(*(getattr(ledger, name) for ledger in ledgers))


def test_sweeps_use_the_loaders_collation_and_the_recorders_batch_size():
    def doubled(examples):
        x, y = torch.utils.data.default_collate(examples)
        return 2 * x, y

    sizes = []

    def criterion(outputs, targets):
        sizes.append(len(targets))
        return cross_entropy(outputs, targets, reduction="none")

    data = linear_data()
    run = monitored(
        data_set=data,
        data_loader=DataLoader(data, batch_size=4, collate_fn=doubled),
        criterion=criterion,
        recorder=Recorder("swept", every=[1], batch_size=9),
    )
    next(epoch(run))
    assert max(sizes) == 9 and sizes.count(9) >= 2
    wanted = [autograd_norm(run.module, 2 * x, y) for x, y in data]
    np.testing.assert_allclose(run.recorder.ledger.grad_norms[0], wanted, rtol=1e-5)


@pytest.mark.parametrize("poisson_sampling", [True, False])
@pytest.mark.parametrize("noise_std", [0, 2.0])
def test_through_the_engine(noise_std, poisson_sampling):
    model = small()
    engine = RecordingEngine(accountant="rdp")
    module, optimizer, loader = engine.make_monitored(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(linear_data(), batch_size=4, shuffle=True),
        noise_std=noise_std,
        criterion=nn.CrossEntropyLoss(),
        poisson_sampling=poisson_sampling,
    )
    train(SimpleNamespace(module=module, optimizer=optimizer, loader=loader), 2)
    ledger = engine.ledger
    assert (ledger.source, ledger.steps.tolist()) == ("swept", [6, 12])
    if noise_std == 0:
        with pytest.raises(ValueError, match=r"\.with_noise_std\(sigma\)"):
            engine.privacy_losses(order=8)
        ledger = ledger.with_noise_std(2.0 * 4)
    losses = privacy_losses(ledger, 8)
    assert losses.shape == (N,) and (losses > 0).all() and np.isfinite(losses).all()
    if noise_std:
        assert np.array_equal(engine.privacy_losses(order=8), losses)
