"""Samples of unknown examples, and what is declared where they are charged."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine, Recorder, Unlearner

NUM, CLASSES = 40, 3
ROWS, DRAW = "no example had two samples in an update", "batches of another loader"


def _trained(loop, *, told=True, two_views=False):
    """Train one epoch by a loop, with all warnings silenced; return the engine."""
    torch.manual_seed(0)
    x, y = torch.randn(NUM, 6), torch.randint(0, CLASSES, (NUM,))
    tensors = (x, x + 0.1 * torch.randn(NUM, 6), y) if two_views else (x, y)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    engine = PrivacyEngine(
        recorder=Recorder(unattributed="worst_case") if told else None
    )
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(*tensors), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in loader:
            optimizer.zero_grad()
            loop(model, *batch).backward()
            optimizer.step()
    return engine


def _loss(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def two_views_in_one_batch(model, x, view, y):
    return _loss(model, torch.cat([x, view]), torch.cat([y, y]))


def windows(model, x, y):
    parts = torch.cat([x, x.roll(1, 1), x.roll(2, 1)])
    return _loss(model, parts, y.repeat(3))


def another_loader(model, x, y):
    return _loss(model, x, y) + _loss(model, torch.randn(len(x) + 1, 6), _zeros(x))


def generated(model, x, y):
    both = torch.cat([x, torch.randn(len(x), 6)])
    return _loss(model, both, torch.cat([y, torch.zeros_like(y)]))


def _zeros(x):
    return torch.zeros(len(x) + 1, dtype=torch.int64)


@pytest.mark.parametrize("loop", [windows, another_loader])
def test_several_rows_of_an_example_are_an_assumption(loop):
    engine = _trained(loop)
    links = {link.name: link for link in engine.ledger.custody.links}
    assert links["rows"].state == links["draw"].state == "unchecked"
    assert ROWS in links["rows"].sentence and DRAW in links["draw"].sentence
    plan = Unlearner(engine, criterion=nn.CrossEntropyLoss()).plan([3])
    declared = " ".join(a.evidence for a in plan.guarantee.assumptions)
    assert ROWS in declared and DRAW in declared


@pytest.mark.parametrize("told", [True, False])
def test_two_tensors_of_the_items_in_one_input_are_named(told):
    engine = _trained(two_views_in_one_batch, told=told, two_views=True)
    with pytest.raises(AccountingError, match="samples of two tensors of the deliver"):
        engine.ledger.num_examples  # noqa: B018


@pytest.mark.parametrize("told", [True, False])
def test_passes_with_different_examples_in_one_position_are_named(told):
    def pairs(model, x, y):
        other = torch.randperm(len(x))
        return (model(x) - model(x[other])).square().mean()

    with pytest.raises(AccountingError, match="passes that entered one loss had diff"):
        _trained(pairs, told=told).ledger.num_examples  # noqa: B018


def test_two_views_in_passes_of_their_own_are_fine():
    def siamese(model, x, view, y):
        return _loss(model, x, y) + (model(x) - model(view)).square().mean()

    links = {k.name: k for k in _trained(siamese, two_views=True).ledger.custody.links}
    assert links["rows"].state == links["draw"].state == "checked"


def test_the_model_of_another_engine_is_a_reason():
    torch.manual_seed(0)
    model = nn.Linear(6, CLASSES)
    data_set = TensorDataset(torch.randn(NUM, 6), torch.randint(0, CLASSES, (NUM,)))
    engines, prepared = [PrivacyEngine(), PrivacyEngine()], []
    for engine in engines:
        prepared += [
            engine.make_private(
                module=prepared[0][0] if prepared else model,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                data_loader=DataLoader(data_set, batch_size=8),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
            )
        ]
    first, optimizer, loader = prepared[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x, y in loader:
            optimizer.zero_grad()
            _loss(first, x, y).backward()
            optimizer.step()
    with pytest.raises(AccountingError, match="prepared again by a later make_private"):
        engines[0].ledger.num_examples  # noqa: B018


def test_generated_samples_keep_their_numbers():
    engine = _trained(generated)
    assert engine.epsilons(1e-3).max() <= engine.get_epsilon(1e-3)
    assert ROWS in str(engine.ledger.custody).replace("\n" + " " * 21, " ")


@pytest.mark.parametrize("loop", [windows, another_loader])
def test_the_advice_has_its_condition(loop):
    engine = _trained(loop, told=False)
    with pytest.raises(AccountingError, match="Only if you know that no example has"):
        engine.ledger.num_examples  # noqa: B018


def test_layers_called_one_by_one_leave_the_model_unchecked():
    def by_layers(model, x, y):
        first, activation, last = model._module
        hidden = activation(first(x))
        return nn.functional.cross_entropy(last(0.5 * (hidden + hidden.flip(0))), y)

    engine = _trained(by_layers)
    links = {link.name: link for link in engine.ledger.custody.links}
    assert links["model"].state == "unchecked"
    assert "no forward pass of the model in training mode" in links["model"].sentence


def test_a_plain_loop_has_none_of_these_assumptions():
    links = {link.name: link for link in _trained(_loss).ledger.custody.links}
    assert links["rows"].state == links["draw"].state == "checked"
