"""Unlearning and evaluation on an accelerator give what they give on the CPU.

Weights agree to 1e-5 and metrics to 1e-4: both compute in float32, in other orders.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from opacus_pi.evaluation import (
    GaussianPoison,
    evaluate,
    gaussian_unlearning_score,
)
from opacus_pi.gradients import gradient_gram, per_example_grad_norms
from opacus_pi.models.no_trace import random_state_untouched
from opacus_pi.models.predictions import predict
from opacus_pi.symmetries import loss_barrier
from opacus_pi.unlearning import FineTune, L1Sparse, Langevin, Unlearner
from tests.device.simulated import NAME
from tests.private_training import Net, data

CRITERION = nn.CrossEntropyLoss(reduction="none")
METHODS = {
    "fine-tune": FineTune(),
    "langevin": Langevin(0.05),
    "clipped langevin": Langevin(0.05, max_grad_norm=0.5, projection_radius=2.0),
    "l1": L1Sparse(1e-3),
}


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    net = Net()
    return {"cpu": net, NAME: copy.deepcopy(net).to(NAME)}


def other_net():
    torch.manual_seed(1)
    return Net()


@pytest.mark.parametrize("method", METHODS)
def test_unlearned_weights_are_those_of_the_cpu(nets, method):
    weights = {}
    for device, net in nets.items():
        mine = Unlearner(
            net,
            criterion=nn.CrossEntropyLoss(),
            method=METHODS[method],
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            generator=torch.Generator().manual_seed(7),
        )
        mine.unlearn(data(), [2, 5, 11], num_epochs=2, batch_size=7)
        assert {p.device.type for p in mine.model.parameters()} == {device}
        weights[device] = [p.detach().cpu() for p in mine.model.parameters()]
    for found, expected in zip(weights[NAME], weights["cpu"], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    start = next(nets["cpu"].parameters()).detach()
    assert not torch.equal(weights["cpu"][0], start)


def test_accuracies_and_predictions(nets):
    forget, rest = Subset(data(), range(5)), Subset(data(), range(5, 24))
    found, expected = (
        evaluate(nets[d], CRITERION, forget=forget, retain=rest, test=rest)
        for d in (NAME, "cpu")
    )
    assert found == pytest.approx(expected, rel=1e-4)
    found, expected = (predict(nets[d], data(), CRITERION) for d in (NAME, "cpu"))
    for name in ("losses", "confidences", "margins"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gaussian_unlearning_score(nets):
    generator = torch.Generator().manual_seed(3)
    poison = GaussianPoison(data(), [1, 4, 9], 0.5, generator)
    inputs, labels = poison.clean()
    found, expected = (
        gaussian_unlearning_score(nets[d], CRITERION, inputs, labels, poison.noise)
        for d in (NAME, "cpu")
    )
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("is_there", [False, True])
def test_loss_barrier(nets, is_there):
    tensors = data().tensors
    placed = TensorDataset(*(t.to(NAME) for t in tensors)) if is_there else data()
    found = loss_barrier(nets[NAME], other_net().to(NAME), placed, CRITERION)
    expected = loss_barrier(nets["cpu"], other_net(), data(), CRITERION)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_norms_of_one_batch(nets):
    x, y = data().tensors
    found = per_example_grad_norms(nets[NAME], CRITERION, x.to(NAME), y.to(NAME))
    expected = per_example_grad_norms(nets["cpu"], CRITERION, x, y)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=0)


def test_gram_matrix(nets):
    found, expected = (
        gradient_gram(nets[d], CRITERION, data(), indices=[0, 3, 8])
        for d in (NAME, "cpu")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_random_states_of_the_device_are_left_alone():
    before = torch.simulated.get_rng_state()
    with random_state_untouched():
        torch.rand(3, device=NAME)
        assert not torch.equal(torch.simulated.get_rng_state(), before)
    assert torch.equal(torch.simulated.get_rng_state(), before)
