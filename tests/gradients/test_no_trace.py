"""A sweep in the middle of training changes nothing that training can see."""

import copy
import random

import numpy as np
import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from opacus_pi.gradients import norm_sweep, per_example_grad_norms

CRITERION = nn.CrossEntropyLoss()


class Augmented(Dataset):
    """Draws from every generator in ``__getitem__``."""

    def __init__(self, n=12):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 3, 8, 8, generator=generator)
        self.y = torch.randint(0, 5, (n,), generator=generator)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        shift = torch.rand(()) + np.random.rand() + random.random()
        return (self.x[i] + 0.01 * float(shift)), self.y[i]


class CountsCalls(nn.Module):
    """Changes a buffer and an attribute whenever it is called."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.history = []

    def forward(self, x):
        self.calls += 1
        self.history.append(x.shape)
        return x


def make_model(norm=lambda: nn.GroupNorm(2, 4), inplace=True):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        norm(),
        nn.ReLU(inplace=inplace),
        CountsCalls(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )


def seed():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)


def train(sweep_at, mode):
    """Three epochs, sweeping at one place of the loop; everything training can see."""
    seed()
    data_set = Augmented()
    if mode == "plain":
        model = make_model(lambda: nn.BatchNorm2d(4))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        loader, criterion = DataLoader(data_set, 4, shuffle=True), CRITERION
    else:
        model = make_model(inplace=False)  # Opacus cannot do it in place
        made = opacus.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.Adam(model.parameters(), 0.01),
            data_loader=DataLoader(data_set, 4),
            noise_multiplier=0.5,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
            criterion=CRITERION,
        )
        model, optimizer, *rest = made
        criterion, loader = rest if len(rest) == 2 else (CRITERION, rest[0])

    def look(place):
        if place == sweep_at:
            norm_sweep(model, criterion, data_set, batch_size=5)

    for _ in range(3):
        for x, y in loader:
            if len(y) == 0:
                continue
            look("next")
            optimizer.zero_grad()
            outputs = model(x)
            look("forward")
            criterion(outputs, y).backward()
            look("backward")
            optimizer.step()
            look("step")
    states = {f"state.{k}": v for k, v in model.state_dict().items()}
    states |= {f"grad.{k}": p.grad for k, p in model.named_parameters()}
    states["torch"] = torch.get_rng_state()
    states["numpy"] = torch.tensor(np.random.get_state()[1].astype(np.int64))
    states["random"] = torch.tensor(random.getstate()[1])
    return states


@pytest.mark.parametrize("mode", ["plain", "hooks", "ghost"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_is_bit_equal_with_sweeps(mode):
    reference = train(None, mode)
    for place in ("next", "forward", "backward", "step"):
        found = train(place, mode)
        assert found.keys() == reference.keys()
        for key, value in reference.items():
            assert (value is None) == (found[key] is None), (place, key)
            assert value is None or torch.equal(value, found[key]), (place, key)


def snapshot(model):
    """Flags, hooks, attributes and gradients of every module and parameter."""
    modules = {
        name: {
            key: copy.copy(value) if isinstance(value, (dict, list)) else value
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }
    parameters = {
        name: (id(p), p.requires_grad, p._version, dict(vars(p)))
        for name, p in model.named_parameters()
    }
    return modules, parameters


def test_module_attributes_stay():
    model = make_model(lambda: nn.BatchNorm2d(4))
    model[1].eval()  # a mixture of flags
    model[0].bias.requires_grad_(False)
    model[6].register_forward_hook(lambda *_: None)
    data_set = Augmented()
    before = snapshot(model)
    norm_sweep(model, CRITERION, data_set)
    per_example_grad_norms(model, CRITERION, data_set.x, data_set.y)
    assert snapshot(model) == before
    assert model[3].history == [] and model[3].calls == 0
    assert all(p.grad is None for p in model.parameters())


def test_gradients_stay_bit_equal():
    model = make_model()
    data_set = Augmented()
    CRITERION(model(data_set.x), data_set.y).backward()
    kept = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    norm_sweep(model, CRITERION, data_set)
    for name, p in model.named_parameters():
        assert p.grad is kept[name][0] and torch.equal(p.grad, kept[name][1])


def test_works_under_no_grad_and_leaves_it():
    model, data_set = make_model(), Augmented()
    inside = []
    with torch.no_grad():
        inside.append(per_example_grad_norms(model, CRITERION, data_set.x, data_set.y))
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        inside.append(per_example_grad_norms(model, CRITERION, data_set.x, data_set.y))
    outside = per_example_grad_norms(model, CRITERION, data_set.x, data_set.y)
    assert all(torch.equal(norms, outside) for norms in inside)


def test_repeats_bit_for_bit():
    model, data_set = make_model(), Augmented()
    norms = [
        per_example_grad_norms(model, CRITERION, data_set.x, data_set.y)
        for _ in range(2)
    ]
    assert torch.equal(*norms)


def test_embedding_that_rescales_its_rows_stays():
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Flatten())
    before = model[0].weight.clone()
    data = [(torch.tensor([i]), 0) for i in range(5)]
    assert (norm_sweep(model, CRITERION, data) > 0).all()
    assert torch.equal(model[0].weight, before)
