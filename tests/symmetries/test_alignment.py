import copy

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.utils.data import TensorDataset

from opacus_pi.symmetries.barriers import aligned, loss_barrier, pairwise_barriers
from opacus_pi.symmetries.permutations import apply_permutation, permutation_spec

CE = nn.CrossEntropyLoss()


def circles(n=300):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=generator)
    return TensorDataset(x, (x.norm(dim=1) > 1.2).long())


def trained(seed, data):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        CE(model(data.tensors[0]), data.tensors[1]).backward()
        optimizer.step()
    return model


def test_matching_lowers_the_barrier_between_independent_models():
    data = circles()
    models = [trained(seed, data) for seed in range(3)]
    spec = permutation_spec(models[0], data.tensors[0][:4])
    plain = pairwise_barriers(models, data, CE)
    matched = pairwise_barriers(models, data, CE, spec=spec)
    pairs = [(0, 1), (0, 2), (1, 2)]
    want = [loss_barrier(models[i], models[j], data, CE) for i, j in pairs]
    np.testing.assert_array_equal(plain, want)
    assert matched.mean() < plain.mean() / 2
    x = data.tensors[0]
    torch.testing.assert_close(aligned(models[0], models[1], spec)(x), models[1](x))


def test_a_permuted_copy_is_the_model_again():
    data = circles(20)
    model = trained(0, data)
    spec = permutation_spec(model, data.tensors[0])
    twin = copy.deepcopy(model)
    random = spec.random(np.random.default_rng(0))
    twin.load_state_dict(apply_permutation(spec, random, model.state_dict()))
    back = aligned(GradSampleModule(copy.deepcopy(model)), twin, spec).state_dict()
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())


def test_one_model_has_no_pair():
    with pytest.raises(ValueError, match="at least 2 models, got 1"):
        pairwise_barriers([nn.Linear(2, 2)], circles(4), CE)
