"""Everything that takes a model takes one in the middle of private training."""

import pytest
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.evaluation import (
    activation_matching,
    aligned,
    evaluate,
    gaussian_unlearning_score,
    loss_barrier,
    permutation_spec,
)

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 3
DATA = TensorDataset(X, Y)
CRITERION = nn.CrossEntropyLoss()


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def in_training(mode):
    """A wrapped model after some steps, with a forward pass that left activations."""
    model = net(0)
    extra = {"criterion": nn.CrossEntropyLoss()} if mode == "ghost" else {}
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(DATA, batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        **extra,
    )
    private, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if mode == "ghost" else CRITERION
    for x, y in loader:
        optimizer.zero_grad()
        criterion(private(x), y).backward()
        optimizer.step()
    private(X)
    return private, model


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_private_model_in_training_counts_as_its_weights(mode):
    private, inner = in_training(mode)
    plain, other = net(0), net(1)
    plain.load_state_dict(inner.state_dict())
    noise, spec = torch.randn_like(X), permutation_spec(plain, X)
    assert permutation_spec(private, X) == spec

    def numbers(model):
        return [
            loss_barrier(model, other, DATA, CRITERION),
            loss_barrier(other, model, DATA, CRITERION),
            loss_barrier(other, aligned(other, model, spec), DATA, CRITERION),
            gaussian_unlearning_score(model, CRITERION, X, Y, noise),
            evaluate(model, CRITERION, forget=DATA, retain=DATA, test=DATA),
            [p.tolist() for p in activation_matching(spec, model, other, X).values()],
        ]

    want = numbers(plain.eval())
    before = {k: v.clone() for k, v in private.state_dict().items()}
    assert numbers(private) == want
    assert private.training
    assert all(torch.equal(v, before[k]) for k, v in private.state_dict().items())
    aligned(other, private, spec).train()(X)  # no hook of the wrapper came along
