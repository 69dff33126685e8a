"""Copies of models: what they share, what they leave behind."""

import opacus
import pytest
import torch
from torch import nn

from opacus_pi.models.copies import evaluation_copy, training_copy
from opacus_pi.models.structure import structure_of

COPIES = (training_copy, evaluation_copy)


class Counting(nn.Module):
    """Hooks a method of its own into its layer; keeps a list by a name of Opacus's."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.activations = []
        self.layer.register_forward_hook(self.count)
        self.calls = 0

    def count(self, *_):
        self.calls += 1

    def forward(self, x):
        self.activations.append(len(x))
        return self.layer(x)


@pytest.mark.parametrize("copied", COPIES)
def test_hooks_that_are_methods_belong_to_the_copy(copied):
    live = Counting()
    copy = copied(live)
    copy(torch.ones(1, 3))
    assert (copy.calls, live.calls) == (1, 0)
    assert (copy.activations, live.activations) == ([1], [])


@pytest.mark.parametrize("copied", COPIES)
def test_nothing_of_opacus_comes_along(copied):
    live = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    live[1].register_forward_hook(lambda *_: None)
    live[1].register_full_backward_hook(lambda *_: None)
    wrapped = opacus.GradSampleModule(live)
    wrapped(torch.ones(5, 3)).sum().backward()
    wrapped(torch.ones(5, 3))  # leaves activations behind
    copy = copied(wrapped)
    assert type(copy) is nn.Sequential
    for module in copy.modules():
        kept = (len(module._forward_hooks), len(module._backward_hooks))
        backward = int(copied is training_copy)
        assert kept == ((1, backward) if isinstance(module, nn.ReLU) else (0, 0))
        assert not hasattr(module, "activations")
        assert not hasattr(module, "autograd_grad_sample_hooks")
    for p in copy.parameters():
        assert p.grad is None and not hasattr(p, "grad_sample")
    assert len(live[0].activations) == 1 and live[0]._forward_hooks


class Named(nn.Module):
    """Has attributes by names of Opacus's, in a layer that Opacus may hook."""

    def __init__(self, *, has_weights):
        super().__init__()
        self.activations = [nn.Identity(), nn.Tanh()]
        self.max_batch_len, self._forward_counter = 3, 4
        if has_weights:
            self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x):
        parts = zip(self.activations, x.chunk(2, 1), strict=False)
        x = torch.cat([activation(part) for activation, part in parts], 1)
        return x * self.scale if hasattr(self, "scale") else x


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("has_weights", [False, True])
def test_attributes_of_the_user_by_names_of_opacus_are_copied(copied, has_weights):
    live = nn.Sequential(nn.Linear(3, 2), Named(has_weights=has_weights))
    expected = live(torch.ones(5, 3))
    wrapped = opacus.GradSampleModule(live)
    if not has_weights:  # otherwise Opacus itself takes the length for its own
        wrapped(torch.ones(5, 3)).sum().backward()
    copy = copied(wrapped)
    assert torch.equal(copy(torch.ones(5, 3)), expected)
    if not has_weights:
        assert (copy[1].max_batch_len, copy[1]._forward_counter) == (3, 4)
    assert not hasattr(copy[0], "activations")
    assert [type(a) for a in live[1].activations] == [nn.Identity, nn.Tanh]
    described = structure_of(live)
    live[1].activations.pop()
    assert structure_of(live) != described


def test_a_training_copy_owns_its_weights_and_keeps_the_mode():
    live = nn.Sequential(nn.Linear(3, 2), nn.Dropout()).train()
    live[1].eval()
    copy = training_copy(live)
    assert (copy[0].training, copy[1].training) == (True, False)
    assert torch.equal(copy[0].weight, live[0].weight)
    assert copy[0].weight.data_ptr() != live[0].weight.data_ptr()


def test_an_evaluation_copy_shares_its_weights():
    live = nn.Sequential(nn.Linear(3, 2), nn.Dropout()).train()
    copy = evaluation_copy(live)
    assert not any(module.training for module in copy.modules())
    assert copy[0].weight.data_ptr() == live[0].weight.data_ptr()
