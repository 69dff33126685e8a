"""Which parameters the taps measure, and which are left to per-example gradients."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from opacus_pi.gradients import register_layer_rule
from opacus_pi.gradients.layers import registry
from opacus_pi.gradients.norm_engine import NormEngine
from opacus_pi.models.no_trace import isolated

from .cases import CASES, make
from .oracle import loop_norms

LOSSES = nn.CrossEntropyLoss(reduction="none")
LEFTOVER = {
    "transformer-sequence-first": {"attention", "norms", "feed"},
    "sequence-first-as-long-as-the-batch": {"attention", "norms", "feed"},
    "attention-with-weights": {"attention"},
    "attention-across": {"attention"},
    "attention-with-bias": {"attention"},
    "positions-as-many-as-the-batch": {"places"},
    "folded-tokens": {"inner"},
}


def measured(model, x, y):
    with isolated():
        engine = NormEngine(model, LOSSES)
        squares, _ = engine.squares(x, y)
    return engine, squares.sqrt()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_taps_measure_all_but_the_named(name):
    model, x, y = make(name)
    engine, _ = measured(model, x, y)
    expected = LEFTOVER.get(name, set())
    for parameter in engine._trainable:
        left = any(parameter.startswith(part) for part in expected)
        assert (parameter in engine._taps.leftover) == left, parameter
    assert engine._together and engine._vectorised


class InPlace(nn.Module):
    """Linear layers on sequences, whose outputs are views, one changed in place."""

    def __init__(self, *, is_in_place):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 4)
        self.activation = nn.ReLU(inplace=is_in_place)
        self.functions = []  # of the graph of each pass, at the first layer's output

    def forward(self, x):
        hidden = self.first(x)
        function = hidden.grad_fn
        earlier = function.next_functions[0][0] if function else None
        self.functions.append([f and f.name() for f in (function, earlier)])
        return self.second(self.activation(hidden)).mean(1)


@pytest.mark.parametrize("is_in_place", [True, False])
def test_views_are_tapped_at_the_viewed_tensor(is_in_place):
    """Autograd would copy the gradient if the view was tapped in place."""
    torch.manual_seed(0)
    model = InPlace(is_in_place=is_in_place)
    x, y = torch.randn(6, 7, 3), torch.randint(4, (6,))
    engine, norms = measured(model, x, y)
    assert ["ViewBackward0", "_TapBackward"] in engine._model.functions
    assert not engine._taps.leftover
    torch.testing.assert_close(norms, loop_norms(model, LOSSES, x, y))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.factor * x


@pytest.fixture
def scale_rule(request):
    """A user's rule, unregistered afterwards."""
    factor = getattr(request, "param", 1.0)

    @register_layer_rule(Scale)
    def rule(module, x, grad, names):
        assert names == ["factor"]
        return None if factor is None else {"factor": factor * (x * grad).sum(1)}

    yield
    del registry._RULES[Scale]


def scaled_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Scale(), nn.Tanh(), nn.Linear(4, 5))
    return model, torch.randn(6, 3), torch.randint(0, 5, (6,))


def test_user_rule_is_used(scale_rule):
    model, x, y = scaled_model()
    engine, norms = measured(model, x, y)
    assert not engine._taps.leftover
    torch.testing.assert_close(
        norms, loop_norms(model, LOSSES, x, y), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("scale_rule", [None], indirect=True)
def test_rule_may_decline(scale_rule):
    model, x, y = scaled_model()
    engine, norms = measured(model, x, y)
    assert engine._taps.leftover == {"1.factor"}
    torch.testing.assert_close(
        norms, loop_norms(model, LOSSES, x, y), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("scale_rule", [2.0], indirect=True)
def test_wrong_rule_is_found_out(scale_rule):
    model, x, y = scaled_model()
    engine, norms = measured(model, x, y)
    assert len(engine._taps.leftover) == 5
    torch.testing.assert_close(
        norms, loop_norms(model, LOSSES, x, y), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    "scale_rule, is_caught",
    [(1.1, True), (0.9, True), (1.0, False)],
    indirect=["scale_rule"],
)
def test_a_rule_that_is_wrong_by_a_tenth_is_caught(scale_rule, is_caught):
    torch.manual_seed(0)
    model, x, y = Scale(), torch.randn(6, 5), torch.randint(0, 5, (6,))
    engine, norms = measured(model, x, y)
    assert bool(engine._taps.leftover) == is_caught
    torch.testing.assert_close(
        norms, loop_norms(model, LOSSES, x, y), rtol=1e-5, atol=0
    )


def test_losses_see_float64():
    seen = []

    def losses(outputs, targets):
        seen.append(outputs.dtype)
        return outputs.square().sum(1)

    with isolated():
        engine = NormEngine(nn.Linear(3, 2), losses)
        engine.squares(torch.randn(4, 3), torch.zeros(4))
    assert set(seen) == {torch.float64}


def test_subclass_with_its_own_forward_has_no_rule():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Named(nn.Linear):
        pass

    assert registry.layer_rule(Doubled(2, 2)) is None
    assert registry.layer_rule(Named(2, 2)) is registry.layer_rule(nn.Linear(2, 2))


class Overwrites(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 5)

    def forward(self, x):
        h = self.first(x)
        out = self.second(h)
        h.zero_()
        return out


def test_overwritten_input_is_an_error_as_in_autograd():
    torch.manual_seed(0)
    model, x, y = Overwrites(), torch.randn(4, 3), torch.randint(0, 5, (4,))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        LOSSES(model(x), y).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        measured(model, x, y)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(3, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            h = torch.utils.checkpoint.checkpoint(
                self.inner, torch.tanh(self.first(x)), use_reentrant=use_reentrant
            )
            return self.head(torch.tanh(h))

    torch.manual_seed(0)
    model, x, y = Checkpointed(), torch.randn(4, 3), torch.randint(0, 5, (4,))
    engine, norms = measured(model, x, y)
    assert not engine._taps.leftover
    plain = nn.Sequential(model.first, nn.Tanh(), model.inner, nn.Tanh(), model.head)
    truth = loop_norms(plain, LOSSES, x, y)
    torch.testing.assert_close(norms, truth, rtol=1e-5, atol=0)


def test_compiled_models_are_measured_uncompiled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
    x, y = torch.randn(4, 3), torch.randint(0, 5, (4,))

    def refuse(*_):
        raise AssertionError("compiled")

    expected = measured(model, x, y)[1]
    whole = torch.compile(model, backend=refuse)
    part = nn.Sequential(torch.compile(model[0], backend=refuse), *model[1:])
    for kind in (whole, part):
        assert torch.equal(measured(kind, x, y)[1], expected)
    model[0].compile(backend=refuse)
    assert torch.equal(measured(model, x, y)[1], expected)


@pytest.mark.parametrize(
    "name", ["mlp", "linear-3d", "residual-group-norm", "outside-layers"]
)
def test_bfloat16_model(name):
    model, x, y = make(name)
    model = model.bfloat16()
    engine, norms = measured(model, x.bfloat16(), y)
    assert not engine._taps.leftover
    truth = loop_norms(model, LOSSES, x.bfloat16(), y)  # of the rounded weights
    torch.testing.assert_close(norms, truth, rtol=0.1, atol=0)


def test_autocast_around_it_changes_nothing():
    model, x, y = make("conv-mixed")
    _, expected = measured(model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        _, norms = measured(model, x, y)
    assert torch.equal(norms, expected)
