"""Warnings are ignored for a while, and shown ones stay shown."""

import sys
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine
from opacus_pi._quiet import quiet


def told():
    warnings.warn("a place in the loop", UserWarning, stacklevel=2)


def loop(between, times=3):
    """Warn at one place in each round, and look at something between."""
    for _ in range(times):
        told()
        between()


def look(context):
    with context():
        warnings.simplefilter("ignore")
        told()


@pytest.mark.parametrize(
    ("between", "action", "number"),
    [
        (lambda: look(quiet), "default", 1),
        (lambda: look(quiet), "always", 3),
        (lambda: look(warnings.catch_warnings), "default", 3),  # what Python does
        (lambda: None, "default", 1),
        (lambda: look(lambda: quiet()), "module", 1),
    ],
)
def test_a_warning_is_shown_once(between, action, number):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        globals().pop("__warningregistry__", None)
        loop(between)
    assert [str(one.message) for one in caught] == ["a place in the loop"] * number


def test_errors_pass_and_filters_come_back():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = warnings.filters[:]
        with pytest.raises(KeyError), quiet():
            told()
            raise KeyError
        assert warnings.filters == before
        with pytest.raises(UserWarning):
            told()


def test_a_warning_that_was_not_shown_before_is_shown_afterwards():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        globals().pop("__warningregistry__", None)
        look(quiet)
        assert not caught
        told()
    assert len(caught) == 1


def test_a_training_loop_shows_the_warnings_of_opacus_once():
    """The checks of the first updates and the audit are between its updates."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    data = TensorDataset(torch.randn(60, 4), torch.arange(60) % 2)
    criterion = torch.nn.CrossEntropyLoss()
    engine = PrivacyEngine()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        vars(torch.utils.hooks).pop("__warningregistry__", None)
        vars(sys.modules["torch.nn.modules.module"]).pop("__warningregistry__", None)
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=10),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        engine.audit(criterion)
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()
        engine.epsilons(delta=1e-3)
    places = [
        (one.filename, one.lineno)
        for one in caught
        if "Full backward hook" in str(one.message)
    ]
    assert len(places) == len(set(places))
