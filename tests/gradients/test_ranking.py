"""Norms in bfloat16: how well they rank, how far they are off, and what is checked."""

import copy

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from opacus_pi.gradients import norm_sweep, per_example_grad_norms, sweep
from opacus_pi.gradients.engine import NormEngine
from opacus_pi.gradients.layers.linear import linear_squares
from opacus_pi.gradients.products import pair_squares, squared_lengths
from opacus_pi.gradients.registry import _RULES
from opacus_pi.models.isolation import isolated
from tests.gradients.cases import CASES
from tests.gradients.models import NUM_CLASSES

CRITERION = nn.CrossEntropyLoss()
LOW = {"ranking_dtype": torch.bfloat16}
NETWORKS = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    ),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    ),
}


def digits(n):
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images[:n]).float().view(-1, 1, 8, 8) / 16
    return x, torch.from_numpy(labels[:n])


@pytest.fixture(scope="module", params=NETWORKS)
def trained(request):
    """A network that fits 400 images, which are measured, and its exact norms."""
    torch.manual_seed(0)
    model, (x, y) = NETWORKS[request.param](), digits(400)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(12):
        for rows in torch.randperm(400).split(50):
            optimizer.zero_grad()
            CRITERION(model(x[rows]), y[rows]).backward()
            optimizer.step()
    exact = norm_sweep(
        copy.deepcopy(model).double(), CRITERION, TensorDataset(x.double(), y)
    )
    assert exact.max() > 100 * exact.min()  # some are fitted, some are not
    return model, TensorDataset(x, y), exact


def test_ranks_are_those_of_float64(trained):
    model, data, exact = trained
    found = sweep(model, CRITERION, data, **LOW)
    assert found.ranking_only and not sweep(model, CRITERION, data).ranking_only
    assert spearmanr(found.grad_norms, exact)[0] > 0.999
    errors = (found.grad_norms / exact - 1).abs()
    assert 1e-3 < errors.median() < 0.05  # above: it really is bfloat16
    assert errors.quantile(0.99) < 0.25


def test_squares_are_added_up_in_float32():
    """Of numbers that are in bfloat16, as the products of matrices leave them."""
    torch.manual_seed(0)
    rows, other = torch.randn(2, 3, 50, 50).bfloat16()
    lengths = rows.double().flatten(1).square().sum(1)
    torch.testing.assert_close(squared_lengths(rows), lengths, rtol=1e-5, atol=0)
    pairs = (rows.double() * other.double()).flatten(1).sum(1).clamp(min=0)
    torch.testing.assert_close(pair_squares(rows, other), pairs, rtol=1e-4, atol=0)


def test_losses_see_float64():
    seen = []

    def losses(outputs, targets):
        seen.append(outputs.dtype)
        return outputs.square().sum(1)

    per_example_grad_norms(
        nn.Linear(3, 2), losses, torch.randn(4, 3), torch.zeros(4), **LOW
    )
    assert set(seen) == {torch.float64}


def test_the_model_is_left_alone(trained):
    model, data, _ = trained
    before = copy.deepcopy(model.state_dict())
    outputs = model(data.tensors[0][:4])
    norm_sweep(model, CRITERION, data, batch_size=200, **LOW)
    assert torch.equal(model(data.tensors[0][:4]), outputs)
    assert outputs.dtype == torch.float32
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


CHECKED = (
    *("mlp", "linear-3d", "conv-mixed", "residual-group-norm", "encoder-layer"),
    *("reused", "folded-tokens", "lstm", "embedding-tied", "bare", "dict"),
)


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_check_of_the_first_batch_finds_what_it_finds_in_float32(name):
    torch.manual_seed(0)
    make, inputs = CASES[name]
    model, x = make().eval(), inputs()
    y = torch.randint(0, NUM_CLASSES, (8,))
    engines = [NormEngine(model, CRITERION, **options) for options in ({}, LOW)]
    with isolated():
        exact, low = (engine.squares(x, y)[0].sqrt() for engine in engines)
    assert engines[0]._taps.leftover == engines[1]._taps.leftover
    assert engines[1]._together
    torch.testing.assert_close(low, exact, rtol=0.05, atol=0)


class Scaled(nn.Linear):
    """A layer whose rule is wrong by a factor."""


@pytest.mark.parametrize("factor, is_caught", [(1.1, True), (0.9, True), (1.0, False)])
def test_a_wrong_rule_is_caught(factor, is_caught, monkeypatch):
    def rule(module, x, grad, names):
        return factor * linear_squares(module, x, grad, names)

    monkeypatch.setitem(_RULES, Scaled, rule)
    torch.manual_seed(0)
    engine = NormEngine(nn.Sequential(Scaled(6, NUM_CLASSES)), CRITERION, **LOW)
    with isolated():
        engine.squares(torch.randn(8, 6), torch.arange(8) % NUM_CLASSES)
    assert bool(engine._taps.leftover) == is_caught


@pytest.mark.parametrize("kind", [torch.float16, torch.float32, "bfloat16"])
def test_other_types_are_refused(kind):
    with pytest.raises(ValueError, match="ranking_dtype=.*torch.bfloat16 or None"):
        norm_sweep(nn.Linear(2, 2), CRITERION, [], ranking_dtype=kind)
