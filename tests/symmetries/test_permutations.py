import copy

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import nn

from opacus_pi.symmetries import operation_rules
from opacus_pi.symmetries.barriers import loss_barrier
from opacus_pi.symmetries.permutations import apply_permutation, permutation_spec
from tests.symmetries.networks import (
    NETWORKS,
    attention,
    build,
    mlp,
    resnet18_bn,
    resnet18_gn,
    shared_norm_attention,
    vit,
)


def with_params(model, params):
    twin = copy.deepcopy(model)
    twin.load_state_dict(params)
    return twin.double().eval()


def as_double(inputs):
    return inputs.double() if inputs.is_floating_point() else inputs


@pytest.mark.parametrize("make", NETWORKS)
def test_a_permuted_network_is_the_same_function_on_other_inputs(make):
    model, inputs = build(make)
    spec = permutation_spec(model, inputs[:2])
    state = model.double().state_dict()
    for seed in range(3):
        permutation = spec.random(np.random.default_rng(seed))
        moved = apply_permutation(spec, permutation, state)
        changed = [name for name in state if not torch.equal(moved[name], state[name])]
        assert len(changed) >= len(state) / 3
        with torch.no_grad():
            want = model(as_double(inputs))
            got = with_params(model, moved)(as_double(inputs))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", NETWORKS)
def test_every_tensor_with_hidden_units_is_permuted(make):
    """Whatever is never moved has no hidden dimension: heads' biases, for instance."""
    model, inputs = build(make)
    spec = permutation_spec(model, inputs[:2])
    still = {
        name
        for name, axes in spec.axes.items()
        if not any(factor.symbol for dim in axes for factor in dim)
    }
    last = list(model.state_dict())[-1]
    assert still <= {last}


def sizes(spec):
    return sorted(
        (symbol.size, spec.symbols[symbol.outer].size if symbol.outer else None)
        for symbol in spec.symbols.values()
    )


def key(pair):
    return pair[0], pair[1] or 0


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (mlp, [(7, None), (9, None)]),
        # a stream for each stage and the middle of each block
        (resnet18_bn, [(8 * 2**s, None) for s in range(4) for _ in range(3)]),
        # the same, as 4 groups with channels inside
        (
            resnet18_gn,
            [p for s in range(4) for _ in range(3) for p in [(4, None), (2 * 2**s, 4)]],
        ),
        # the stream, and in each layer the heads, their insides, the hidden layer
        (vit, [(24, None)] + 2 * [(4, None), (6, 4), (32, None)]),
        # queries and keys share the inside of a head, values have their own
        (attention, [(12, None), (3, None), (4, 3), (4, 3)]),
        # a weight for all heads ties the insides of the heads of q and k
        (shared_norm_attention, [(12, None), (3, None), (4, None), (4, 3)]),
    ],
)
def test_the_symbols_found_are_those_of_the_architecture(make, wanted):
    spec = permutation_spec(*build(make))
    found = [
        (s.size, spec.symbols[s.outer].size if s.outer else None)
        for s in spec.symbols.values()
    ]
    assert sorted(found, key=key) == sorted(wanted, key=key)


def test_the_spec_of_an_mlp_written_by_hand():
    spec = permutation_spec(*build(mlp))
    a, b = ("0.weight[0]", 9), ("3.weight[0]", 7)
    fixed = {5: (None, 5), 3: (None, 3)}
    assert spec.axes == {
        "0.weight": ((a,), (fixed[5],)),
        "0.bias": ((a,),),
        "2.weight": ((a,),),
        "2.bias": ((a,),),
        "3.weight": ((b,), (a,)),
        "3.bias": ((b,),),
        "4.weight": ((fixed[3],), (b,)),
        "4.bias": ((fixed[3],),),
    }


def test_group_norm_keeps_groups_together():
    model = nn.Sequential(
        nn.Conv2d(1, 6, 1), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(6 * 4, 2)
    )
    spec = permutation_spec(model, torch.randn(2, 1, 2, 2))
    moved = apply_permutation(
        spec,
        spec.random(np.random.default_rng(1)),
        {"0.bias": torch.arange(6.0), "3.weight": torch.arange(24.0).expand(2, 24)},
    )
    groups = moved["0.bias"].reshape(2, 3) // 3
    assert (groups == groups[:, :1]).all()
    pixels = moved["3.weight"][0].reshape(6, 4)
    assert torch.equal(pixels[:, 0] // 4, moved["0.bias"])
    assert torch.equal(pixels, pixels[:, :1] + torch.arange(4.0))


def test_apply_takes_new_from_old_at_the_permutation():
    spec = permutation_spec(*build(mlp))
    permutation = spec.identity()
    permutation["0.weight[0]"] = np.array([2, 0, 1, 3, 4, 5, 6, 7, 8])
    bias = torch.arange(9.0)
    moved = apply_permutation(spec, permutation, {"0.bias": bias, "other": bias})
    assert moved["0.bias"].tolist() == [2, 0, 1, 3, 4, 5, 6, 7, 8]
    assert torch.equal(moved["other"], bias)
    same = apply_permutation(spec, spec.identity(), {"0.bias": bias})
    assert torch.equal(same["0.bias"], bias)


class Cumulative(nn.Module):
    """An operation without a rule between two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(8, 2)
        self.middle = nn.Linear(6, 8)

    def forward(self, x):
        return self.last(self.middle(self.first(x).cumsum(1)).relu())


def test_an_operation_without_a_rule_keeps_its_inputs_in_place():
    spec = permutation_spec(Cumulative(), torch.randn(3, 4))
    assert list(spec.symbols) == ["middle.weight[0]"]


def test_a_wrong_rule_would_be_noticed(monkeypatch):
    monkeypatch.setitem(operation_rules.RULES, "cumsum", operation_rules.RULES["clone"])
    with pytest.raises(ValueError, match="same function after its hidden units"):
        permutation_spec(Cumulative(), torch.randn(3, 4))


def test_a_random_network_is_refused():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.rand(2)

    with pytest.raises(ValueError, match="are random, or depend"):
        permutation_spec(Noisy(4, 2), torch.randn(3, 4))


def test_control_flow_tied_weights_and_unused_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
            self.tied = self.a
            self.unused = nn.Parameter(torch.randn(7))

        def forward(self, x):
            for _ in range(3 if x.shape[0] > 1 else 2):
                x = self.b(self.tied(x).tanh())
            return x

    model = Odd()
    spec = permutation_spec(model, torch.randn(2, 4))
    assert spec.axes["a.weight"] == spec.axes["tied.weight"]
    assert "unused" not in spec.axes
    assert [s.size for s in spec.symbols.values()] == [6]


def test_the_model_wrapped_or_training_is_left_as_it_was():
    model, inputs = build(mlp)
    want = permutation_spec(model, inputs)
    wrapped = GradSampleModule(model).train()
    state = torch.get_rng_state()
    assert permutation_spec(wrapped, inputs) == want
    assert torch.equal(torch.get_rng_state(), state)
    assert wrapped.training
    assert model[0].weight.dtype == torch.float32


def test_permuting_makes_a_barrier_where_there_is_none():
    model, inputs = build(mlp)
    spec = permutation_spec(model, inputs)
    moved = apply_permutation(
        spec, spec.random(np.random.default_rng(0)), model.state_dict()
    )
    batches = [(inputs, torch.arange(40) % 3)]
    twin = with_params(model, moved).float()
    ends = [
        nn.functional.cross_entropy(m(inputs), batches[0][1]) for m in (model, twin)
    ]
    torch.testing.assert_close(*ends)
    criterion = nn.CrossEntropyLoss()
    assert loss_barrier(model, twin, batches, criterion) > 1e-3


MODEL, INPUTS = build(mlp)
SPEC = permutation_spec(MODEL, INPUTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight[0]": np.zeros(9, dtype=int)}, "must be a permutation of shape"),
        ({"0.weight[0]": np.arange(8)}, r"must be a permutation of shape \(9,\)"),
        ({"0.weight[0]": None}, r"permutation\['0.weight\[0\]'\] must .*got None"),
    ],
)
def test_bad_permutations_are_one_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        apply_permutation(SPEC, SPEC.identity() | change, MODEL.state_dict())


def test_a_tensor_of_another_shape_is_one_clear_error():
    with pytest.raises(ValueError, match=r"0.bias.* must have shape \(9,\)"):
        apply_permutation(SPEC, SPEC.identity(), {"0.bias": torch.zeros(8)})
