"""Layers that run again in the backward pass are tapped in that run too."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from opacus_pi.gradients.clipping import example_norms
from opacus_pi.integration.fast import FastGradSampleModule

KINDS = [False, True]  # values of use_reentrant
CHECKPOINTED = [
    (kind, False) for kind in KINDS
]  # and whether losses are added up first


class Checkpointed(nn.Module):
    """A model with checkpointed segments; ``use_reentrant=None``: without."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3))
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        if self.use_reentrant is None:
            return self.head(self.inner(self.first(x)))
        # of reentrant segments, the inputs must require gradients
        first = checkpoint(
            self.first, x.clone().requires_grad_(), use_reentrant=self.use_reentrant
        )
        return self.head(
            checkpoint(self.inner, first, use_reentrant=self.use_reentrant)
        )


def norms_and_sums(use_reentrant):
    """Norms and weighted sums of one backward pass, all from taps on layers."""
    torch.manual_seed(0)
    model = FastGradSampleModule(Checkpointed(use_reentrant), loss_reduction="sum")
    torch.manual_seed(1)  # of dropout
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # such as that of forming gradients through the whole model
        model(torch.randn(5, 4)).square().sum().backward()
        (batch,) = model.taps.caches
        found = batch.gradients(list(model.parameters()), model._module)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    sums = [gradients.weighted_sum(torch.arange(5.0)) for gradients in found.values()]
    return example_norms(found.values()), sums


@pytest.mark.parametrize("use_reentrant", KINDS)
def test_equals_the_model_that_keeps_its_activations(use_reentrant):
    norms, sums = norms_and_sums(use_reentrant)
    expected_norms, expected = norms_and_sums(None)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-6, atol=0)
    for ours, theirs in zip(sums, expected, strict=True):
        torch.testing.assert_close(ours.flatten(), theirs.flatten())


@pytest.mark.parametrize("use_reentrant", KINDS)
def test_passes_in_evaluation_mode_stay_plain(use_reentrant):
    """Even while a training pass waits for its backward pass."""

    torch.manual_seed(0)
    model = FastGradSampleModule(Checkpointed(use_reentrant), loss_reduction="sum")
    model(torch.randn(5, 4))
    model.eval()
    model(torch.randn(5, 4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not model.taps.caches


@pytest.mark.parametrize("use_reentrant", KINDS)
def test_a_failure_while_layers_run_again_leaves_them_live(use_reentrant):
    torch.manual_seed(0)
    model = FastGradSampleModule(Checkpointed(use_reentrant), loss_reduction="sum")
    loss = model(torch.randn(5, 4)).sum()

    def fail(module, args):
        raise KeyError("again")

    handle = model._module.inner[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="again"):
        loss.backward()
    handle.remove()
    assert all(p.requires_grad for p in model.parameters())


def accumulated(use_reentrant, sizes, *, joined=False):
    """Norms by batch of several passes, all forward ones first."""
    torch.manual_seed(0)
    model = FastGradSampleModule(Checkpointed(use_reentrant), loss_reduction="sum")
    torch.manual_seed(1)  # of dropout
    losses = [model(torch.randn(size, 4)).square().sum() for size in sizes]
    for loss in [sum(losses)] if joined else losses:
        loss.backward()
    parameters = list(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {
            batch.size: example_norms(
                batch.gradients(parameters, model._module).values()
            )
            for batch in model.taps.caches
        }


@pytest.mark.parametrize("sizes", [(5, 3), (3, 5)], ids=str)
@pytest.mark.parametrize(("use_reentrant", "joined"), [*CHECKPOINTED, (False, True)])
def test_batches_of_several_sizes_before_a_backward_pass(use_reentrant, joined, sizes):
    ours = accumulated(use_reentrant, sizes, joined=joined)
    plain = accumulated(None, sizes, joined=joined)
    assert ours.keys() == plain.keys() == set(sizes)
    for size in sizes:
        torch.testing.assert_close(ours[size], plain[size], rtol=1e-6, atol=0)


def test_layers_tapped_only_when_they_run_again_must_belong_to_one_batch():
    with pytest.raises(RuntimeError, match="Use use_reentrant=False, or call backward"):
        accumulated(True, (5, 3), joined=True)
