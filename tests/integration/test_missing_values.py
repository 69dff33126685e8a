"""Missing values of ``make_private`` are named, where Opacus cannot go on either."""

import inspect
import math

import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine

PRIVATE = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
TARGET = {"target_epsilon": 3.0, "target_delta": 1e-3, "epochs": 2}


def prepare(engine, method="make_private", **options):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    data = TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
    given = {
        "module": net,
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
        "data_loader": DataLoader(data, batch_size=4),
    }
    if method == "make_private":
        given |= PRIVATE
    elif method == "make_private_with_epsilon":
        given |= {**TARGET, "max_grad_norm": 1.0}
    else:
        given |= {"noise_std": 0.0, "criterion": nn.CrossEntropyLoss()}
    return getattr(engine, method)(**{**given, **options})


def train(prepared, mode):
    model, optimizer, loader = prepared[0], prepared[1], prepared[-1]
    criterion = prepared[2] if mode == "ghost" else nn.CrossEntropyLoss()
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def trained(engine, mode="hooks", set_later=(), **options):
    prepared = prepare(engine, grad_sample_mode=mode, **options)
    for name, value in dict(set_later).items():
        setattr(prepared[1], name, value)
    return train(prepared, mode)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost", "fast"])
@pytest.mark.parametrize("name", PRIVATE)
@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        (None, TypeError, "a number, got None"),
        ("1.0", TypeError, "a number, got '1.0'"),
        ([1.0], TypeError, r"a number, got \[1.0\]"),
        (math.nan, ValueError, "a number of at least 0, got nan"),
        (-1.0, ValueError, "a number of at least 0, got -1.0"),
    ],
)
def test_a_setting_that_is_no_number(mode, name, value, error, got):
    message = rf"^{name} must be {got}\. Pass make_private\({name}=1.0\)"
    engine = PrivacyEngine(accountant="rdp")
    with pytest.raises(error, match=message):
        trained(engine, mode, **{name: value})
    if mode != "fast":
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            trained(opacus.PrivacyEngine(accountant="rdp"), mode, **{name: value})


@pytest.mark.parametrize("name", PRIVATE)
def test_a_setting_may_be_set_before_the_first_update(name):
    engines = [kind(accountant="rdp") for kind in (PrivacyEngine, opacus.PrivacyEngine)]
    ours, theirs = (trained(e, set_later={name: 1.0}, **{name: None}) for e in engines)
    assert all(map(torch.equal, ours, theirs))
    assert engines[0].ledger.mechanism.noise_std == 1.0


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_clip_norm_of_zero_trains_as_with_opacus(mode):
    engines = [kind(accountant="rdp") for kind in (PrivacyEngine, opacus.PrivacyEngine)]
    ours, theirs = (trained(e, mode, max_grad_norm=0.0) for e in engines)
    assert all(map(torch.equal, ours, theirs))
    assert engines[0].get_epsilon(1e-3) == engines[1].get_epsilon(1e-3)
    with pytest.raises(ValueError, match="max_grad_norm must be above 0"):
        engines[0].ledger  # noqa: B018


OBJECTS = ("module", "optimizer", "data_loader")


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("make_private", name) for name in OBJECTS),
        *(("make_private_with_epsilon", name) for name in (*OBJECTS, *TARGET)),
        *(("make_monitored", name) for name in OBJECTS),
    ],
)
def test_what_nothing_can_be_prepared_without(method, name):
    message = rf"^{name} must be the .*|^{name} must be a number"
    with pytest.raises(TypeError, match=message) as caught:
        prepare(PrivacyEngine(accountant="rdp"), method, **{name: None})
    assert f"got None. Pass {method}({name}=...)." in str(caught.value)


def test_monitored_training_names_a_missing_noise():
    with pytest.raises(ValueError, match="noise_std must be finite .* got None"):
        prepare(PrivacyEngine(), "make_monitored", noise_std=None)


def test_steps_may_take_the_place_of_epochs():
    engine = PrivacyEngine(accountant="rdp")
    prepared = prepare(engine, "make_private_with_epsilon", epochs=None, steps=6)
    assert prepared[1].noise_multiplier > 0


def test_the_signature_stays_that_of_opacus():
    ours, theirs = PrivacyEngine, opacus.PrivacyEngine
    for name in ("make_private", "make_private_with_epsilon"):
        one, other = (inspect.signature(getattr(e, name)) for e in (ours, theirs))
        assert one == other
