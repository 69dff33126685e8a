"""The page of layers lists every layer of ``torch.nn``, and says what each one does."""

import copy
import warnings

import pytest
import torch

from . import layer_table as table
from .oracle import loop_norms

ROWS = table.written()
LAYERS = [
    name
    for name in table.names_of_layers()
    if name not in table.NOT_LAYERS and table.becomes(name) is None
]


def test_every_module_of_torch_is_on_the_page():
    missing = [
        name
        for name in table.names_of_layers()
        if (table.becomes(name) or name) not in ROWS
    ]
    assert not missing, (
        "give them a case, and run python -m tests.gradients.layer_table"
    )
    assert {"Linear", "LSTM", "Transformer"} < set(LAYERS) and len(LAYERS) > 30


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", [table.in_sweeps, table.in_fast_mode])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_layer_does_what_the_page_says_and_its_norms_are_right(kind, name):
    way, norms, net = kind(name)
    column = 2 if kind is table.in_sweeps else 3
    assert ROWS[name].split("|")[column].strip() == way
    if norms is not None:
        x, y = table.batch_of(net)
        truth = loop_norms(copy.deepcopy(net).eval(), table.LOSSES, x, y)
        torch.testing.assert_close(norms, truth, rtol=1e-5, atol=0)


def test_a_new_layer_is_noticed(monkeypatch):
    class Later(torch.nn.Module):
        def __init__(self, size):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(size))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkeypatch.setattr(torch.nn, "Later", Later, raising=False)
        assert "Later" in table.names_of_layers()
