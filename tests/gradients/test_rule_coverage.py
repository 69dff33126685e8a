"""Slow ways to measure norms are announced, with the parameters and the causes."""

import warnings

import pytest
import torch
from torch import nn

from opacus_pi.gradients import norm_sweep, per_example_grad_norms, rule_coverage
from opacus_pi.gradients.clipping import example_norms
from opacus_pi.gradients.clipping.training_taps import TrainingTaps

from .oracle import loop_norms

LOSSES = nn.CrossEntropyLoss(reduction="none")


class Summed(nn.Module):
    """A weight in an operation without a rule."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.mix = nn.Linear(4, 5), nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        return torch.tensordot(self.inner(x), self.mix, 1)


class NoCell(nn.Module):
    """A layer without a rule, which torch.func cannot run."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.LSTMCell(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0])


class Saving(torch.autograd.Function):
    """Runs a function again in the backward pass, to save memory.

    It is given the parameters, and differentiates with respect to them.
    """

    @staticmethod
    def forward(ctx, function, x, *parameters):
        ctx.function, ctx.x, ctx.parameters = function, x, parameters
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.x.detach().requires_grad_(True)
        with torch.enable_grad():
            output = ctx.function(x)
        wanted = [x, *ctx.parameters]
        found = torch.autograd.grad(output, wanted, grad, allow_unused=True)
        return None, *found


class Saves(nn.Module):
    def __init__(self, operation=None, is_saving=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner = nn.Linear(4, 5), nn.Linear(5, 5)
        self.scale, self.head = nn.Parameter(torch.randn(5)), nn.Linear(5, 3)
        self.operation, self.is_saving = operation or torch.mul, is_saving

    def run(self, h):
        return torch.tanh(self.operation(self.inner(h), self.scale))

    def forward(self, x):
        h = self.first(x)
        own = (*self.inner.parameters(), self.scale)
        return self.head(
            Saving.apply(self.run, h, *own) if self.is_saving else self.run(h)
        )


def by_outer_product(x, scale):
    return torch.kron(x, scale[None])[:, ::6]


def batch_of(size=6):
    torch.manual_seed(1)
    return torch.randn(size, 4), torch.arange(size) % 3


def test_one_warning_names_parameter_and_operation():
    model, (x, y) = Summed(), batch_of()
    data = list(zip(x, y, strict=True))
    with pytest.warns(UserWarning, match="1 parameter of the model has") as caught:
        norms = per_example_grad_norms(model, LOSSES, x, y)
        norm_sweep(model, LOSSES, data, batch_size=3, progress=False)
    (message,) = [str(w.message) for w in caught]
    assert "mix (used by torch.functional.tensordot)" in message
    truth = loop_norms(model, LOSSES, x, y)
    torch.testing.assert_close(norms, truth, rtol=1e-5, atol=0)


def test_the_table_says_the_same_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rule_coverage(Summed(), LOSSES, *batch_of()) == {
            "mix": "torch.func: used by torch.functional.tensordot",
            "inner.weight": "exact rule",
            "inner.bias": "exact rule",
        }


def test_layers_that_run_one_example_after_the_other():
    ways = rule_coverage(NoCell(), LOSSES, *batch_of())
    assert ways.pop("head.weight") == ways.pop("head.bias") == "exact rule"
    assert set(ways.values()) == {"one at a time: used by LSTMCell"}
    with pytest.warns(UserWarning, match="a backward pass of its own"):
        per_example_grad_norms(NoCell(), LOSSES, *batch_of())


@pytest.mark.parametrize("operation", [torch.mul, by_outer_product])
def test_a_model_that_saves_memory_by_a_function_of_its_own(operation):
    """It fails where a parameter requires no gradient."""
    model, (x, y) = Saves(operation), batch_of()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        norms = per_example_grad_norms(model, LOSSES, x, y)
    shown = [str(w.message) for w in caught]
    if operation is torch.mul:
        assert not shown
    else:
        assert len(shown) == 1 and "torch.utils.checkpoint.checkpoint(" in shown[0]
        ways = rule_coverage(model, LOSSES, x, y)
        assert all(way.startswith("one at a time: ") for way in ways.values())
    truth = loop_norms(Saves(operation, is_saving=False), LOSSES, x, y)
    torch.testing.assert_close(norms, truth, rtol=1e-5, atol=0)


def test_such_a_model_in_training():
    model, (x, y), taps = Saves().double(), batch_of(), TrainingTaps()
    taps.attach(model)
    LOSSES(model(x.double()), y).sum().backward()
    (cache,) = taps.caches
    parameters = [p for name, p in model.named_parameters() if name != "scale"]
    found = cache.gradients(parameters, model)
    plain = Saves(is_saving=False)
    plain.scale.requires_grad_(False)
    torch.testing.assert_close(
        example_norms(found.values()), loop_norms(plain, LOSSES, x, y)
    )
