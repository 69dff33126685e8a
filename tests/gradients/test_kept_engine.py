"""Norms in a loop: one engine, as long as nothing but values has changed."""

import copy
import gc
import weakref

import pytest
import torch
from opacus import GradSampleModule
from opacus.layers import DPLSTM
from torch import nn

from opacus_pi.gradients import kept_engine, per_example_grad_norms
from opacus_pi.gradients.clipping import TrainingTaps

from .oracle import loop_norms

CRITERION = nn.CrossEntropyLoss()
LOSSES = nn.CrossEntropyLoss(reduction="none")


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


class Counts(nn.Module):
    """Behaves otherwise at every call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Accumulates(nn.Module):
    """Keeps a tensor from one call to the next."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(6)

    def forward(self, x):
        self.scale = 0.5 * self.scale + 0.5
        return x * self.scale


class StoresInLists(nn.Module):
    """Tensors that are no attributes themselves."""

    def __init__(self):
        super().__init__()
        self.values = [torch.ones(6)]

    def forward(self, x):
        return x * self.values[0]


class StoresItsLast(nn.Module):
    """Stores what it has computed, and does not use it."""

    def __init__(self, kept):
        super().__init__()
        self.kept, self.last = kept, None

    def forward(self, x):
        self.last = self.kept(x)
        return 2 * x if self.last is not None else x


class Stores(nn.Module):
    """A tensor that is neither a parameter nor a buffer."""

    def __init__(self):
        super().__init__()
        self.values = torch.ones(6)

    def forward(self, x):
        return x * self.values


def made(*layers):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), *layers, nn.Linear(6, 3)
    )


def batch(b=7):
    return torch.randn(b, 5), torch.arange(b) % 3


def check(model, x, y, criterion=CRITERION, losses=LOSSES):
    """Compare with one example after the other on a copy."""
    truth = loop_norms(copy.deepcopy(model).eval(), losses, x, y)
    found = per_example_grad_norms(model, criterion, x, y)
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=0)


@pytest.fixture
def engines(monkeypatch):
    """The engines that are made."""
    found = []

    class Counted(kept_engine.NormEngine):
        def __init__(self, *args):
            super().__init__(*args)
            found.append(self)

    monkeypatch.setattr(kept_engine, "NormEngine", Counted)
    monkeypatch.setattr(kept_engine, "_kept", [])
    return found


def test_training_in_a_loop_needs_one_engine(engines):
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(4):
        x, y = batch()
        check(model, x, y)
        model.train()
        CRITERION(model(x), y).backward()
        optimizer.step()  # changes weights; the forward pass changed running statistics
        optimizer.zero_grad()
        check(model, *batch(3))
    assert len(engines) == 1


def test_training_with_opacus_in_a_loop_needs_one_engine(engines):
    plain = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    model = GradSampleModule(plain)
    for _ in range(3):
        x, y = batch()
        CRITERION(model(x), y).backward()
        truth = loop_norms(copy.deepcopy(model.to_standard_module()), LOSSES, x, y)
        found = per_example_grad_norms(model, CRITERION, x, y)
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=0)
    assert len(engines) == 1


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, DPLSTM])
def test_recurrent_layers_need_one_engine(engines, layer):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.layer(x)[0][:, -1])

    original = Last()
    model = copy.deepcopy(original)  # recurrent layers refer to the original's weights
    check(model, torch.randn(4, 6, 4), torch.arange(4) % 3)
    del original
    gc.collect()
    for _ in range(3):
        check(model, torch.randn(4, 6, 4), torch.arange(4) % 3)
    assert len(engines) == 1


def replace_layer(model):
    model[2] = nn.ReLU()


def replace_weight(model):
    model[0].weight = nn.Parameter(torch.randn(6, 5))


def replace_data(model):
    model[0].weight.data = torch.randn(6, 5)


def change_attribute(model):
    model[3].factor = 0.5


def freeze(model):
    model[0].requires_grad_(False)


def add_hook(model):
    model[2].register_forward_hook(lambda module, args, output: 2 * output)


def replace_forward(model):
    model[2].forward = torch.sin


def change_buffer(model):
    model[1].running_mean.data += 1  # no counter sees this


def replace_buffer(model):
    model[1].running_mean = torch.randn(6)


@pytest.mark.parametrize(
    ("change", "is_new"),
    [
        (replace_layer, True),
        (replace_weight, True),
        (replace_data, True),
        (change_attribute, True),
        (freeze, True),
        (add_hook, True),
        (replace_forward, True),
        (change_buffer, False),
        (replace_buffer, False),
    ],
)
def test_a_changed_model_is_measured_as_it_is(engines, change, is_new):
    model, (x, y) = made(Scaled(2.0)), batch()
    check(model, x, y)
    before = per_example_grad_norms(model, CRITERION, x, y)
    change(model)
    check(model, x, y)
    assert not torch.equal(before, per_example_grad_norms(model, CRITERION, x, y))
    assert len(engines) == 1 + is_new


def test_a_tensor_among_the_attributes_has_its_present_values(engines):
    model = made(Stores())
    for _ in range(3):
        check(model, *batch())
        model[3].values = torch.rand(6)
    model[3].values.data += 1  # no counter sees this
    check(model, *batch())
    assert len(engines) == 1


KEPT = {
    "with its graph": lambda x: x.mean(),
    "detached": lambda x: x.detach().square().mean(),
    "number": lambda x: float(x.detach().mean()),
    "list": lambda x: [x.detach()],
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("has_trained", [False, True])
def test_a_model_that_stores_its_last_loss(engines, name, has_trained):
    """The second engine shows that what the first one wrote is not read."""
    model = made(StoresItsLast(KEPT[name]))
    for _ in range(5):
        x, y = batch()
        if has_trained:
            CRITERION(model(x), y).backward()
            model.zero_grad()
        truth = loop_norms(made(Scaled(2.0)).eval(), LOSSES, x, y)
        model[1].reset_running_stats()
        found = per_example_grad_norms(model, CRITERION, x, y)
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=0)
    assert len(engines) == 2
    assert type(engines[1]._model[3]) is StoresItsLast


@pytest.mark.parametrize("layer", [Counts, Accumulates, StoresInLists])
def test_models_that_may_change_unnoticed_get_a_new_engine(engines, layer):
    model, (x, y) = made(layer()), batch()
    found = [per_example_grad_norms(model, CRITERION, x, y) for _ in range(3)]
    assert torch.equal(found[0], found[2]) and len(engines) == 3


def test_another_criterion_kind_of_input_or_model_needs_another_engine(engines):
    model, (x, y) = made(), batch()

    def doubled(outputs, targets):
        return 2 * LOSSES(outputs, targets)

    check(model, x, y)
    check(model, x, y, nn.CrossEntropyLoss())  # an equal one
    assert len(engines) == 1
    check(model, x, y, doubled, doubled)
    check(model, x, y, doubled, doubled)
    assert len(engines) == 2
    smooth = {"label_smoothing": 0.1, "reduction": "none"}
    check(model, x, y, nn.CrossEntropyLoss(**smooth), nn.CrossEntropyLoss(**smooth))
    check(model.double(), x.double(), y)
    check(copy.deepcopy(model), x.double(), y)
    assert len(engines) == 5


def test_weights_of_a_criterion_are_those_of_the_call(engines):
    model, (x, y) = made(), batch()
    for _ in range(2):
        weight = torch.rand(3)
        criterion = nn.CrossEntropyLoss(weight, reduction="sum")
        losses = nn.CrossEntropyLoss(weight.double(), reduction="none")
        check(model, x, y, criterion, losses)
    assert len(engines) == 2


def test_an_embedding_that_rescales_its_rows_is_copied_each_time(engines):
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Flatten())
    x, y = torch.arange(4)[:, None], torch.zeros(4, dtype=torch.long)
    before = model[0].weight.clone()
    for _ in range(2):
        per_example_grad_norms(model, CRITERION, x, y)
    assert len(engines) == 2 and torch.equal(model[0].weight, before)


@pytest.mark.parametrize("is_trained_fast", [False, True])
def test_the_engine_does_not_keep_the_model(is_trained_fast):
    model, (x, y) = made(), batch()
    if is_trained_fast:  # puts hooks on parameters that hold the model
        taps = TrainingTaps()
        taps.attach(model)
        CRITERION(model.train()(x), y).backward()
        del taps
    per_example_grad_norms(model, CRITERION, x, y)
    assert len(kept_engine._kept) == 1
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None and not kept_engine._kept


def test_an_error_leaves_no_engine(engines):
    model, (x, y) = made(), batch()
    check(model, x, y)
    with pytest.raises(RuntimeError):
        per_example_grad_norms(model, CRITERION, x[:, :2], y)
    check(model, x, y)
    assert len(engines) == 2
