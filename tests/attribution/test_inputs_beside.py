"""Inputs that all examples share: from the batch, kept, constant, or scheduled."""

import warnings

import numpy as np
import pytest
import torch
from opacus.layers import DPGRU, DPLSTM
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine
from opacus_pi.attribution import Tracker
from opacus_pi.attribution.value_sequences import ValueSequence

NUM, WIDTH, SIZE = 48, 5, 8
SAID = "values changed from one forward pass to another"


class Scaled(nn.Module):
    """Divides the examples by what it is given beside them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x, beside=None, **more):
        for value in (beside, *more.values()):
            if isinstance(value, dict | list):
                (value,) = value.values() if isinstance(value, dict) else value
            if isinstance(value, torch.Tensor) and value.dim() > 2:
                value = value.mean()  # a mask of time steps
            x = x if value is None else x * (1 + 0.1 * value)
        return self.layers(x)


class Stateful(nn.Module):
    """A recurrent model that returns its last state."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.out = layer(WIDTH, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x, state):
        out, state = self.layer(x[:, None], state)
        return self.out(out[:, -1]), state


def train(loop, *, model=None, audit=False, epochs=2, mode="hooks", **options):
    """Train by a loop that is called with model, inputs and update; return the rest."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(NUM, WIDTH) + 2, torch.randint(0, 3, (NUM,)))
    model, engine = model or Scaled(), PrivacyEngine()
    criterion = nn.CrossEntropyLoss()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, optimizer, *ghost, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
            data_loader=DataLoader(data, batch_size=SIZE),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
            **({"criterion": criterion} if mode == "ghost" else {}),
            **options,
        )
        if audit:
            assert engine.audit(criterion).passed
        num = 0
        for _ in range(epochs):
            for x, y in loader:
                if not len(x):
                    continue
                optimizer.zero_grad()
                (ghost or [criterion])[0](loop(model, x, num), y).backward()
                optimizer.step()
                num += 1
        custody = engine.ledger.custody
    warned = [str(w.message) for w in said if SAID in str(w.message)]
    links = {link.name: link for link in custody.links}
    others = [one.name for one in custody.unchecked if one.name not in ("rows", "loss")]
    return links["rows"], warned, others


COMPUTED = {
    "scalar": lambda x: x.abs().mean(),
    "number": lambda x: float(x.abs().mean()),
    "numpy": lambda x: np.float32(x.numpy().mean()),
    "vector": lambda x: x.mean(0),
    "row": lambda x: x.mean(0, keepdim=True),
    "whole number": lambda x: int((x > 2).sum()),
    "rounded": lambda x: (x.sum() * 10).long(),
    "in a dict": lambda x: {"level": x.mean()},
    "in a list": lambda x: [x.mean()],
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_statistic_of_the_batch_beside_the_examples_is_said(kind):
    rows, warned, others = train(
        lambda m, x, _: m(x, COMPUTED[kind](x)), poisson_sampling=False
    )
    assert rows.state == "unchecked" and SAID in rows.sentence
    assert len(warned) == 1 and not others


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost", "fast"])
@pytest.mark.parametrize("by_name", [True, False])
def test_it_is_said_in_every_mode_and_after_an_audit(mode, by_name):
    def loop(model, x, _):
        level = x.abs().mean()
        return model(x, scale=level) if by_name else model(x, level)

    rows, warned, _ = train(loop, mode=mode, audit=mode != "ghost")
    assert rows.state == "unchecked" and SAID in rows.sentence and len(warned) == 1


def test_a_ledger_that_is_read_after_two_updates_says_it_too():
    rows, *_ = train(
        lambda m, x, _: m(x, x.mean()) if len(x) else m(x),
        epochs=1,
        poisson_sampling=False,
    )
    assert rows.state == "unchecked"


SHARED = {
    "constant": lambda x, n: 0.7,
    "constant tensor": lambda x, n: torch.full((1, WIDTH), 0.7),
    "step": lambda x, n: n,
    "step as a tensor": lambda x, n: torch.tensor(n),
    "step of an epoch": lambda x, n: n % 6,
    "progress": lambda x, n: n / 12,
    "progress as a tensor": lambda x, n: torch.tensor(n / 12),
    "temperature": lambda x, n: 0.9**n,
    "temperature with a limit": lambda x, n: max(0.9**n, 0.4),
    "temperature of an epoch": lambda x, n: 0.5 ** (n // 6),
    "number of steps": lambda x, n: WIDTH,
    "number of examples": lambda x, n: len(x),
    "truth value": lambda x, n: n % 2 == 0,
    "two constants": lambda x, n: float(n % 2),
    "mask": lambda x, n: torch.ones(1, WIDTH).bernoulli_(0.5),
    "causal mask": lambda x, n: torch.ones(1, 3 + n % 3, 3 + n % 3).triu(1),
    "positions": lambda x, n: torch.arange(WIDTH)[None],
}


@pytest.mark.parametrize("kind", SHARED)
def test_constants_schedules_masks_and_counters_are_not_said(kind):
    rows, warned, _ = train(
        lambda m, x, n: m(x, SHARED[kind](x, n)), poisson_sampling=False
    )
    assert not warned and rows.state == "checked"


@pytest.mark.parametrize("layer", [DPGRU, DPLSTM])
def test_a_state_that_is_kept_between_batches_is_said(layer):
    kept = []

    def loop(model, x, _):
        zeros = torch.zeros(1, len(x), 4)
        state = kept.pop() if kept else zeros
        if layer is DPLSTM and not isinstance(state, tuple):
            state = zeros, zeros
        out, state = model(x, state)
        is_pair = isinstance(state, tuple)
        kept.append(tuple(s.detach() for s in state) if is_pair else state.detach())
        return out

    rows, warned, others = train(loop, model=Stateful(layer), poisson_sampling=False)
    assert rows.state == "unchecked" and "hidden state" in rows.sentence
    assert len(warned) == 1 and not others


@pytest.mark.parametrize("layer", [DPGRU, DPLSTM])
def test_a_state_that_begins_with_zeros_in_each_batch_is_not_said(layer):
    def loop(model, x, _):
        zeros = torch.zeros(1, len(x), 4)
        return model(x, (zeros, zeros) if layer is DPLSTM else zeros)[0]

    rows, warned, _ = train(loop, model=Stateful(layer))
    assert not warned and rows.state == "checked"


OF_THIS_BATCH = {
    "state": (lambda state, x: state, "checked"),
    "mean": (
        lambda state, x: state.mean(1, keepdim=True).expand_as(state),
        "unchecked",
    ),
    "turned": (lambda state, x: state.flip(1), "unchecked"),
    "detached": (lambda state, x: state.detach(), "unchecked"),
}


@pytest.mark.parametrize("layer", [DPGRU, DPLSTM])
@pytest.mark.parametrize("name", OF_THIS_BATCH)
def test_a_state_of_the_same_batch_is_not_said_if_it_is_passed_on(layer, name):
    change, expected = OF_THIS_BATCH[name]

    def loop(model, x, _):
        zeros = torch.zeros(1, len(x), 4)
        out, state = model(x, (zeros, zeros) if layer is DPLSTM else zeros)
        if layer is DPLSTM:
            state = tuple(change(one, x) for one in state)
        else:
            state = change(state, x)
        return out + model(x, state)[0]

    model = Stateful(layer)
    rows, warned, _ = train(loop, model=model, poisson_sampling=False)
    assert rows.state == expected and len(warned) == (expected == "unchecked")


@pytest.mark.parametrize("is_copied", [True, False])
def test_delivered_samples_along_another_dimension_are_not_said(is_copied):
    tracker, said = Tracker(), []
    tracker._note = lambda cause, num: said.append(cause.name)
    for n in range(6):
        x, state = torch.randn(4, 3), torch.randn(4, 1, 2)
        tracker.delivered(list(range(4 * n, 4 * n + 4)), (x, state))
        turned = state.transpose(0, 1)
        turned = turned.clone() if is_copied else turned
        forward = tracker.bind((x, turned))
        tracker.saw_call(forward, [x, turned], (x, turned), {})
        assert not forward.notes


@pytest.mark.parametrize(
    ("values", "is_explained"),
    [
        ([1.0], True),
        ([1.0, 2.5], False),
        ([1.0, 2.0], True),
        ([1.5, 2.5] * 4, True),
        ([0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.4], True),
        ([3.0, 5.0, 4.0, 6.0], False),
        ([23.0, 19.0, 20.0, 21.0, 20.0], False),
        ([81.0, 86.0, 75.0, 80.0], False),
        ([5.0, 0.0, 1.0, 2.0, 0.0, 1.0, 3.0], True),
        ([1.0, 0.5, 0.25, 0.1], False),
        ([float("nan")] * 4, True),
    ],
)
def test_which_values_follow_a_rule(values, is_explained):
    sequence = ValueSequence()
    for value in values:
        sequence.add(np.array([value]))
    assert sequence.is_explained is is_explained
