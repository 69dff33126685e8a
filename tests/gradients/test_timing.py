"""Formulas chosen by the clock: which one, how often, and that all are right."""

import pytest
import torch
from torch import nn

from opacus_pi.gradients import norm_sweep, per_example_grad_norms, timing
from opacus_pi.gradients.layers import conv
from opacus_pi.gradients.layers.conv import conv_formulas, conv_squares
from opacus_pi.gradients.layers.linear import linear_formulas, linear_squares
from opacus_pi.gradients.timing import Fastest
from tests.gradients.cases import CASES
from tests.gradients.models import NUM_CLASSES
from tests.gradients.test_routes import CONVOLUTIONS

CRITERION = nn.CrossEntropyLoss()


class Clock:
    """A clock that stands still but while a formula runs."""

    def __init__(self, *seconds):
        self.now = 0.0
        self.calls = [0] * len(seconds)
        self.formulas = [self._formula(i, of) for i, of in enumerate(seconds)]

    def _formula(self, i, seconds):
        def formula(module, x, grad, names):
            self.now += seconds[min(self.calls[i], len(seconds) - 1)]
            self.calls[i] += 1
            return x + i

        return formula

    def __call__(self):
        return self.now


def chosen(clock, num_batches=1):
    rule = Fastest(lambda module, x, grad: clock.formulas, clock)
    batch = torch.zeros(1)
    found = [int(rule(None, batch, batch, [])) for _ in range(num_batches)]
    assert len(set(found)) == 1
    return found[0]


@pytest.mark.parametrize(
    "seconds, fastest",
    [
        (([3.0], [1.0], [2.0]), 1),
        (([1.0], [1.0]), 0),
        (([0.5, 9.0], [1.0]), 1),  # the first run is not counted
        (([9.0, 1.0], [2.0]), 0),
        (([1.0, 1.0, 50.0, 1.0], [2.0]), 0),  # one slow run is forgiven
    ],
)
def test_the_clock_decides(seconds, fastest):
    assert chosen(Clock(*seconds)) == fastest


def test_timed_once():
    clock = Clock([2.0], [1.0])
    assert chosen(clock, num_batches=4) == 1
    assert clock.calls[1] - clock.calls[0] == 4


def test_one_formula_is_not_timed():
    clock = Clock([1.0])
    assert chosen(clock) == 0
    assert clock.calls == [1]


def never(*args):
    raise AssertionError("timed")


def test_the_default_never_times(monkeypatch):
    monkeypatch.setattr(Fastest, "__call__", never)
    model, data = network(), list(zip(*batch(), strict=True))
    assert (norm_sweep(model, CRITERION, data) > 0).all()
    assert (per_example_grad_norms(model, CRITERION, *batch()) > 0).all()
    with pytest.raises(AssertionError, match="timed"):
        norm_sweep(model, CRITERION, data, formulas="timed")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Flatten(2),
        nn.Linear(4, 12),
        nn.Flatten(),
        nn.Linear(96, NUM_CLASSES),
    )


def batch(b=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(b, 3, 6, 6, generator=generator)
    return x, torch.arange(b) % NUM_CLASSES


def test_layers_follow_the_clock(monkeypatch):
    """With a clock that dislikes all but one route, that route measures the layer."""
    taken = []
    clock = Clock()

    def timed_route(window, x, grad):
        taken.append(x.shape[1])
        return conv._looped(window, x, grad)

    def disliked(window, x, grad):
        clock.now += 1.0
        return conv._grouped(window, x, grad)

    routes = [disliked, timed_route]
    monkeypatch.setattr(conv, "_routes_worth_timing", lambda *of: routes)
    monkeypatch.setattr(Fastest.__init__, "__defaults__", (clock,))
    wanted = per_example_grad_norms(network(), CRITERION, *batch())
    found = per_example_grad_norms(network(), CRITERION, *batch(), formulas="timed")
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    rounds = 1 + timing._ROUNDS
    assert taken == [8] * (rounds + 1) + [3] * (rounds + 1)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_candidate_of_a_convolution(name):
    layer, sizes = CONVOLUTIONS[name]
    torch.manual_seed(0)
    x = torch.randn(4, layer.in_channels, *sizes, dtype=torch.float64)
    grad = torch.randn_like(layer.double()(x))
    wanted = conv_squares(layer, x, grad, ["weight", "bias"])
    candidates = conv_formulas(layer, x, grad)
    assert len(candidates) > 1 or name.startswith("point")  # far from its Gram
    for formula in candidates:
        found = formula(layer, x, grad, ["weight", "bias"])
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("t, num_candidates", [(1, 1), (4, 2), (3000, 1)])
def test_every_candidate_of_a_linear_layer(t, num_candidates):
    torch.manual_seed(0)
    layer = nn.Linear(5, 6).double()
    x = torch.randn(3, t, 5, dtype=torch.float64)
    grad = torch.randn(3, t, 6, dtype=torch.float64)
    wanted = linear_squares(layer, x, grad, ["weight", "bias"])
    candidates = linear_formulas(layer, x, grad)
    assert len(candidates) == num_candidates  # none of thousands of operations more
    for formula in candidates:
        found = formula(layer, x, grad, ["weight", "bias"])
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)


TIMED = ("conv-mixed", "conv-wide-small", "linear-3d", "encoder-layer", "mlp")


@pytest.mark.parametrize("name", TIMED)
def test_timed_norms_are_the_norms(name):
    torch.manual_seed(0)
    make, inputs = CASES[name]
    model, x = make(), inputs()
    y = torch.randint(0, NUM_CLASSES, (8,))
    wanted = per_example_grad_norms(model, CRITERION, x, y)
    found = per_example_grad_norms(model, CRITERION, x, y, formulas="timed")
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_other_words_are_refused():
    with pytest.raises(ValueError, match='formulas=\'fastest\'.*"flops" or "timed"'):
        norm_sweep(network(), CRITERION, [], formulas="fastest")
