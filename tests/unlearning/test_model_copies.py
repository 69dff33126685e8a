"""Where an unlearner's model comes from: wrappers are taken off a copy."""

import pytest
import torch
from opacus import GradSampleModule, PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine as PrivateEngine
from opacus_pi import Recorder
from opacus_pi.recording import Checkpoints
from opacus_pi.unlearning import Unlearner
from tests.unlearning.unlearners import (
    CRITERION,
    data,
    ledger_of,
    net,
    state_bytes,
    unlearner,
)


def dp_trained():
    train_set, engine = data(), PrivacyEngine()
    model = net()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(train_set, 10),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        if len(y):
            optimizer.zero_grad()
            CRITERION(model(x), y).backward()
            optimizer.step()
    return model, train_set


def test_an_opacus_model_is_copied_bare():
    model, train_set = dp_trained()
    model.train()
    model(train_set.tensors[0])  # leaves activations behind, as a stray forward does
    calls = []
    model._module[1].register_forward_hook(lambda *_: calls.append(1))
    hooks_before = sum(len(m._forward_hooks) for m in model._module.modules())
    mine = unlearner(model)
    twin = mine.model
    assert type(twin) is nn.Sequential and twin is not model._module
    assert state_bytes(twin) == state_bytes(model._module)
    for module in twin.modules():
        assert not module._backward_hooks
        assert not hasattr(module, "activations")
        assert not hasattr(module, "autograd_grad_sample_hooks")
    assert sum(len(m._forward_hooks) for m in twin.modules()) == 1  # the user's own
    list(mine.run(DataLoader(train_set, 10), 2))
    assert calls
    for p in twin.parameters():
        assert not hasattr(p, "grad_sample") and not hasattr(p, "_forward_counter")
    assert sum(len(m._forward_hooks) for m in model._module.modules()) == hooks_before
    assert isinstance(model, GradSampleModule)


def test_a_child_that_happens_to_be_called_module_is_no_wrapper():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self._module = self.module = net()

        def forward(self, x):
            return 2 * self._module(x)

    assert type(unlearner(Doubled()).model) is Doubled


def test_a_model_that_keeps_its_last_output_can_be_copied():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            self.last = self.layer(x)
            return self.last

    model = Keeping()
    model(torch.ones(2, 5))
    assert torch.equal(unlearner(model).model.last, model.last)


def test_inputs_may_be_tuples():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, a, b):
            return self.layer(a + b)

    batch = (torch.ones(4, 5), torch.ones(4, 5)), torch.arange(4) % 3
    assert list(unlearner(Sum()).run([batch], 2)) == [1, 2]


def test_data_parallel_and_compiled_wrappers_are_taken_off():
    assert type(unlearner(nn.DataParallel(net())).model) is nn.Sequential
    compiled = torch.compile(net(), backend="eager")
    assert type(unlearner(compiled).model) is nn.Sequential


def test_straight_from_an_engine():
    model, train_set = dp_trained()

    class Engine:
        module, ledger = model, ledger_of(train_set)

    mine = Unlearner(Engine(), criterion=CRITERION)
    assert type(mine.model) is nn.Sequential
    assert mine.ledger is Engine.ledger
    other = ledger_of(train_set, seed=1)
    assert Unlearner(Engine(), criterion=CRITERION, ledger=other).ledger is other


def test_something_else_is_refused():
    with pytest.raises(ValueError, match="model must .*got dict"):
        Unlearner({}, criterion=CRITERION)


class ReachesItself(nn.Module):
    """Its forward pass goes through a function that refers to the model."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.steps = [lambda x: self.last(torch.tanh(self.first(x)))]

    def forward(self, x):
        return self.steps[0](x)


def reaches_a_layer():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    last = model[2]
    last.forward = lambda x: nn.functional.linear(x, last.weight, last.bias)
    return model


def small_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=generator)
    return TensorDataset(x, torch.arange(12) % 3)


SHARED = "A copy of the model still computes with the parameters of the original"


@pytest.mark.parametrize("make", [ReachesItself, reaches_a_layer])
@pytest.mark.parametrize("is_private", [False, True])
def test_a_copy_that_runs_layers_of_the_original_is_refused(make, is_private):
    torch.manual_seed(0)
    train_set, model = small_data(), make()
    if is_private:
        model, optimizer, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(train_set, 6),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
    mine = Unlearner(model, criterion=CRITERION)
    before = state_bytes(mine.model)
    with pytest.raises(ValueError, match=SHARED):
        mine.unlearn(train_set, [1], num_epochs=1)
    with pytest.raises(ValueError, match=SHARED):
        list(mine.run([train_set[:6]], 1))
    assert state_bytes(mine.model) == before and not len(mine.forgotten)
    assert all(p.grad is None for p in model.parameters())
    hooks = [h for m in mine.model.modules() for h in m._forward_hooks.values()]
    assert not hooks
    if is_private:  # the training can go on
        for x, y in loader:
            optimizer.zero_grad()
            CRITERION(model(x), y).backward()
            optimizer.step()


@pytest.mark.parametrize("make", [ReachesItself, reaches_a_layer])
def test_a_rewind_of_a_copy_that_runs_layers_of_the_original_is_refused(make, tmp_path):
    torch.manual_seed(0)
    train_set, model = small_data(), make()
    states = Checkpoints(tmp_path / "s", every=1)
    engine = PrivateEngine(recorder=Recorder(checkpoints=states))
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(train_set, 12),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            CRITERION(model(x), y).backward()
            optimizer.step()
    states.flush()
    with pytest.raises(ValueError, match=SHARED):
        Unlearner(engine, criterion=CRITERION).rewind(
            train_set, [1], checkpoints=states
        )
