"""Models whose outputs depend on the number of examples are found, and no others.

Which models count is decided by plain runs: in evaluation mode, an output of a batch is
compared with the output of the same example alone.
"""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from opacus_pi.custody.model_probe import probe_separability
from tests.custody import loop_list, oracle
from tests.custody.loops import Loop
from tests.custody.probed_models import HONEST, SIZE, Calls, images, vectors
from tests.custody.test_generated_loops import REFUSED, trained, verdict
from tests.custody.test_model_probe import made


def of(forward, inputs=vectors, **layers):
    return lambda: (Calls(forward, **layers), (inputs(),))


def linear():
    return nn.Linear(5, 3)


def _with_counted_width(m, x):
    return m.a(F.pad(x, (0, 1), value=float(len(x))))


def _padded_to_the_batch(m, x):
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    return m.a(padded)[:-1] + 0.1 * len(padded)


COUNTING = {
    "scaled by the size": of(lambda m, x: m.a(x) * len(x), a=linear()),
    "divided by the size": of(lambda m, x: m.a(x) / x.shape[0], a=linear()),
    "divided by the root": of(lambda m, x: m.a(x) / len(x) ** 0.5, a=linear()),
    "size as an offset": of(lambda m, x: m.a(x) + 0.01 * x.size(0), a=linear()),
    "size as a feature": of(_with_counted_width, a=nn.Linear(6, 3)),
    "size in the exponent": of(lambda m, x: m.a(x) * 0.9 ** len(x), a=linear()),
    "odd or even": of(lambda m, x: m.a(x) * (1 + len(x) % 2), a=linear()),
    "with dropout": of(lambda m, x: m.b(m.a(x)) * len(x), a=linear(), b=nn.Dropout()),
    "with functional dropout": of(
        lambda m, x: F.dropout(m.a(x), 0.5, m.training) * len(x), a=linear()
    ),
    "barely": of(lambda m, x: m.a(x) * (1 + 1e-6 * len(x)), a=linear()),
    "of images": of(
        lambda m, x: m.a(x).mean((2, 3)) * x.shape[0], images, a=nn.Conv2d(3, 4, 3)
    ),
    "sum over ones": of(lambda m, x: m.a(x) * torch.ones(len(x)).sum(), a=linear()),
    "appended rows": of(_padded_to_the_batch, a=linear()),
    "in a dict": of(lambda m, x: {"y": m.a(x), "z": m.a(x) * len(x)}, a=linear()),
    "by numel": of(lambda m, x: m.a(x) * (x.numel() / 5), a=linear()),
}


@pytest.mark.parametrize("name", COUNTING)
def test_counting_models_are_found(name):
    model, inputs = made(COUNTING, name)
    finding = probe_separability(model, inputs, {})
    assert finding.state == "broken", finding.sentence
    assert f"without one of {SIZE} examples" in finding.sentence


@pytest.mark.parametrize("name", COUNTING)
def test_the_counting_models_count(name):
    model, (x,) = made(COUNTING, name)
    model.eval()
    together, alone = model(x), model(x[:3])
    if isinstance(together, dict):
        together, alone = together["z"], alone["z"]
    assert not torch.allclose(together[:3], alone, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", HONEST)
def test_honest_models_are_not_accused(name):
    finding = probe_separability(*made(HONEST, name), {})
    assert finding.state == "checked", finding.sentence


def noise_by_numpy(m, x):
    return m.a(x) + torch.from_numpy(np.random.normal(size=(len(x), 3))).float()


def noise_by_python(m, x):
    drawn = [[random.random()] for _ in range(len(x) + 1)]
    return m.a(x) + torch.tensor(drawn[:-1])


ODD = {
    "one size only": of(lambda m, x: m.a(x).view(SIZE, 3), a=linear()),
    "noise": of(lambda m, x: m.a(x) + torch.randn(len(x), 3), a=linear()),
    "noise in training": of(
        lambda m, x: m.a(x) + m.training * torch.randn(len(x), 3), a=linear()
    ),
    "noise by numpy": of(noise_by_numpy, a=linear()),
    "noise by python": of(noise_by_python, a=linear()),
    "squeezed": of(lambda m, x: m.a(x).squeeze(), a=nn.Linear(5, 1)),
    "mean of ones": of(lambda m, x: m.a(x) * torch.ones(len(x)).mean(), a=linear()),
}


@pytest.mark.parametrize("name", ODD)
def test_models_that_draw_or_need_one_size_are_not_accused(name):
    finding = probe_separability(*made(ODD, name), {})
    assert finding.state == "checked", finding.sentence


@pytest.mark.parametrize("size", [3, 5, 64, 257])
def test_any_number_of_examples(size):
    counting, honest = made(COUNTING, "scaled by the size"), made(HONEST, "mlp")
    assert probe_separability(counting[0], (vectors(size),), {}).state == "broken"
    finding = probe_separability(honest[0], (vectors(size),), {})
    assert finding.state == "checked" and "leaving one out" in finding.sentence


def test_a_table_as_long_as_the_batch_is_no_example():
    model = Calls(lambda m, x, table: m.a(x) @ table, a=nn.Linear(5, SIZE))
    inputs = vectors(), torch.ones(SIZE, SIZE)
    finding = probe_separability(model, inputs, {})
    assert finding.state == "checked", finding.sentence


class Scaled(nn.Module):
    """Outputs times the number of examples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(24, 17)

    def forward(self, x):
        return 0.1 * self.layer(x) * len(x)


@pytest.mark.parametrize("sampling", ["poisson", "fixed"])
@pytest.mark.parametrize("mode", loop_list.MOST)
def test_a_run_of_such_a_model_is_refused(mode, sampling):
    run = trained(Loop("scaled", model=Scaled, mode=mode, sampling=sampling))
    assert oracle.true_norms(run) == "separability"
    outcome, reason = verdict(run, "separability")
    assert outcome == REFUSED and "number of examples" in reason


class Packed(nn.Module):
    """A recurrent layer that sees each sequence up to its own length."""

    def __init__(self, enforce_sorted):
        super().__init__()
        self.layer = nn.GRU(3, 4, batch_first=True)
        self.enforce_sorted = enforce_sorted

    def forward(self, x, lengths):
        packed = pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=self.enforce_sorted
        )
        return self.layer(packed)[1][-1]


@pytest.mark.parametrize("lengths", [[7, 6, 4, 3, 2], [7, 7, 7, 7, 7], [7, 7, 4, 4, 4]])
def test_packed_sequences_neither_crash_nor_get_a_false_reason(lengths):
    inputs = torch.randn(5, 7, 3), torch.tensor(lengths)
    finding = probe_separability(Packed(enforce_sorted=False), inputs, {})
    assert finding.state == "checked" and "leaving one out" in finding.sentence
    finding = probe_separability(Packed(enforce_sorted=True), inputs, {})
    assert finding.state == "checked" and "leaving one out" in finding.sentence
    is_moved = len(set(lengths)) > 1  # other examples would not be in order
    assert ("The first example stayed" in finding.sentence) is is_moved
