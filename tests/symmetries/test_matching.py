import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from opacus_pi.symmetries.barriers import loss_barrier
from opacus_pi.symmetries.matching import activation_matching, weight_matching
from opacus_pi.symmetries.permutations import apply_permutation, permutation_spec
from tests.symmetries.networks import NETWORKS, build, mlp, resnet18_gn, vgg, vit


def moved_copy(model, spec, seed):
    """A permuted copy as (parameters, model)."""
    permutation = spec.random(np.random.default_rng(seed))
    moved = apply_permutation(spec, permutation, model.state_dict())
    twin = copy.deepcopy(model)
    twin.load_state_dict(moved)
    return moved, twin


def all_equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("make", NETWORKS)
def test_a_permuted_copy_is_matched_back_exactly(make):
    model, inputs = build(make)
    spec = permutation_spec(model, inputs)
    for seed in range(2):
        moved, _ = moved_copy(model, spec, seed)
        found = weight_matching(spec, model.state_dict(), moved)
        assert all_equal(apply_permutation(spec, found, moved), model.state_dict())


@pytest.mark.parametrize("make", [mlp, vgg, resnet18_gn, vit])
def test_activations_of_a_permuted_copy_match_back(make):
    """Up to units whose activations are the same, hence by the barrier."""
    model, inputs = build(make)
    spec = permutation_spec(model, inputs[:2])
    moved, twin = moved_copy(model, spec, 5)
    found = activation_matching(spec, model, twin, inputs)
    twin.load_state_dict(apply_permutation(spec, found, moved))
    batches = [(inputs, torch.arange(len(inputs)) % 3)]
    assert loss_barrier(model, twin, batches, nn.CrossEntropyLoss()) < 1e-6


def test_the_barrier_to_a_permuted_copy_vanishes_after_matching():
    model, inputs = build(resnet18_gn)
    spec = permutation_spec(model, inputs)
    moved, twin = moved_copy(model, spec, 3)
    batches, criterion = [(inputs, torch.arange(3))], nn.CrossEntropyLoss()
    before = loss_barrier(model, twin, batches, criterion)
    found = weight_matching(spec, model.state_dict(), moved)
    twin.load_state_dict(apply_permutation(spec, found, moved))
    assert before > 1e-3
    assert loss_barrier(model, twin, batches, criterion) == 0


def product(a, b):
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def every_permutation(spec):
    """All of them, by brute force."""
    choices = []
    for name, start in spec.identity().items():
        rows = np.atleast_2d(start)
        orders = list(itertools.permutations(range(rows.shape[1])))
        arrays = [np.array(c) for c in itertools.product(orders, repeat=len(rows))]
        choices.append([(name, a.reshape(start.shape)) for a in arrays])
    return map(dict, itertools.product(*choices))


def one_hidden_layer():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(2, 3)


def two_groups():
    return nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 3, 1)
    ), torch.randn(2, 2, 2, 2)


@pytest.mark.parametrize("make", [one_hidden_layer, two_groups])
@pytest.mark.parametrize("seed", range(4))
def test_one_symbol_is_matched_optimally_by_brute_force(make, seed):
    """Between different networks; with its inner part where there are groups."""
    model, inputs = build(make, seed)
    spec = permutation_spec(model, inputs)
    a, b = model.state_dict(), build(make, seed + 50)[0].state_dict()
    found = product(a, apply_permutation(spec, weight_matching(spec, a, b), b))
    best = max(
        product(a, apply_permutation(spec, permutation, b))
        for permutation in every_permutation(spec)
    )
    assert found == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("make", NETWORKS)
def test_matching_is_never_worse_than_not_permuting(make):
    model, inputs = build(make)
    spec = permutation_spec(model, inputs)
    other = build(make, seed=1)[0]
    names = [name for name, _ in model.named_parameters()]
    a, b = ({k: m.state_dict()[k] for k in names} for m in (model, other))
    found = weight_matching(spec, a, b)
    assert product(a, apply_permutation(spec, found, b)) >= product(a, b)
    near = {k: v + 0.01 * torch.randn_like(v) for k, v in a.items()}
    kept = apply_permutation(spec, weight_matching(spec, a, near), near)
    assert product(a, kept) >= product(a, near) * (1 - 1e-9)


def square():
    """A symbol that stands in both dimensions of one matrix."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 2)
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x)
            return self.last(x + self.inner(x).tanh())

    return Residual(), torch.randn(2, 2)


@pytest.mark.parametrize("seed", range(5))
def test_a_symbol_in_both_dimensions_of_a_matrix(seed):
    model, inputs = build(square, seed)
    spec = permutation_spec(model, inputs)
    assert [s.size for s in spec.symbols.values()] == [4]
    a = model.state_dict()
    moved, _ = moved_copy(model, spec, seed)
    back = apply_permutation(spec, weight_matching(spec, a, moved), moved)
    assert all_equal(a, back)
    b = build(square, seed + 50)[0].state_dict()
    found = product(a, apply_permutation(spec, weight_matching(spec, a, b), b))
    assert found >= product(a, b)


def test_activation_matching_takes_another_batch_size_and_touches_nothing():
    model, inputs = build(mlp)
    spec = permutation_spec(model, inputs[:3])
    moved, twin = moved_copy(model, spec, 1)
    model.train()
    state = torch.get_rng_state()
    found = activation_matching(spec, model, twin, inputs)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all_equal(twin.state_dict(), moved)
    back = apply_permutation(spec, found, moved)
    assert all_equal(back, model.state_dict())


def test_bad_input_is_one_clear_error():
    model, inputs = build(mlp)
    spec = permutation_spec(model, inputs)
    params = model.state_dict()
    less = {name: params[name] for name in params if name != "0.bias"}
    with pytest.raises(ValueError, match=r"params_b must contain \['0.bias'\]"):
        weight_matching(spec, params, less)
    with pytest.raises(ValueError, match=r"0.bias.* must have shape \(9,\)"):
        weight_matching(spec, params, params | {"0.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="must run the operations that were traced"):
        activation_matching(spec, model, nn.Linear(5, 3), inputs)
