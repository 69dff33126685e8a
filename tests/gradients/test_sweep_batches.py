"""The batch size of a sweep follows from memory; the norms do not depend on it."""

import types

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from opacus_pi.gradients import norm_sweep, sweep
from opacus_pi.gradients.norm_engine import NormEngine
from opacus_pi.gradients.sweep_batches import examples_at_once, in_halves
from opacus_pi.models.no_trace import isolated

from .oracle import loop_norms

CRITERION = nn.CrossEntropyLoss()
LOSSES = nn.CrossEntropyLoss(reduction="none")
BUDGET = "opacus_pi.gradients.sweep_batches._CPU_BUDGET"


class Counted(Dataset):
    """Counts how often each item is read."""

    def __init__(self, num_examples, shape=(6,)):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(num_examples, *shape, generator=generator)
        self.y = torch.arange(num_examples) % 3
        self.reads = [0] * num_examples

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.x[index], self.y[index]


class Batches:
    """A ``collate_fn`` that keeps the sizes of its batches."""

    def __init__(self):
        self.sizes = []

    def __call__(self, items):
        self.sizes.append(len(items))
        return torch.utils.data.default_collate(items)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def test_small_models_get_large_batches_and_each_example_is_read_once():
    data, batches = Counted(64 + 1024 + 30), Batches()
    found = sweep(network(), CRITERION, data, collate_fn=batches)
    assert batches.sizes == [64, 1024, 30]
    assert set(data.reads) == {1}
    before = sweep(network(), CRITERION, data, batch_size=64)
    assert torch.equal(found.correct, before.correct)
    for name in ("grad_norms", "confidences", "errors"):
        torch.testing.assert_close(
            getattr(found, name), getattr(before, name), rtol=1e-5, atol=1e-9
        )
    expected = loop_norms(network(), LOSSES, data.x, data.y)
    torch.testing.assert_close(found.grad_norms, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("num_examples", "sizes"), [(0, []), (9, [9]), (64, [64])])
def test_one_batch_needs_no_choice(num_examples, sizes):
    batches = Batches()
    norms = norm_sweep(network(), CRITERION, Counted(num_examples), collate_fn=batches)
    assert len(norms) == num_examples and batches.sizes == sizes


def test_the_number_follows_from_the_bytes_that_autograd_keeps(monkeypatch):
    """The input and the output of ReLU, which is the input of the last layer, too."""
    x, kept = torch.randn(64, 6), 64 * (6 + 8) * 4
    for batches in (1, 2, 5, 16):
        monkeypatch.setattr(BUDGET, batches * kept)
        assert examples_at_once(network(), x) == 64 * batches
        monkeypatch.setattr(BUDGET, batches * kept - 1)
        assert examples_at_once(network(), x) == 64 * max(1, batches - 1)
    monkeypatch.setattr(BUDGET, 10**12)
    assert examples_at_once(network(), x) == 1024


def test_a_model_that_cannot_be_counted_keeps_the_smallest():
    class Own(nn.Module):
        """Takes gradients by torch.func, which saved-tensor hooks forbid."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return self.layer(x + torch.func.grad(lambda v: (v**2).sum())(x))

    x = torch.randn(64, 6)
    Own()(x)
    assert examples_at_once(Own(), x) == 64


def test_counting_leaves_no_trace():
    model, x = network(), torch.randn(64, 6)
    model.add_module("norm", nn.BatchNorm1d(3))
    buffers = [b.clone() for b in model.buffers()]
    examples_at_once(model, x)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, buffers, model.buffers()))


def limited(engine, most):
    """Squared norms with memory for some examples only; and the sizes that it saw."""
    sizes = []

    def squares(x, y):
        sizes.append(len(y))
        if len(y) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return engine.squares(x, y)

    return types.SimpleNamespace(squares=squares, sizes=sizes)


def test_a_batch_that_does_not_fit_is_halved():
    data = Counted(300)
    with isolated():
        engine = NormEngine(network(), CRITERION)
        some = limited(engine, 100)
        found, outputs = in_halves(some.squares, data.x, data.y)
        exact, all_outputs = engine.squares(data.x, data.y)
    assert some.sizes == [300, 150, 75, 75, 150, 75, 75]
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(outputs, all_outputs)


def test_the_smallest_batch_must_fit():
    data = Counted(300)
    with isolated():
        some = limited(NormEngine(network(), CRITERION), 10)
        with pytest.raises(torch.OutOfMemoryError):
            in_halves(some.squares, data.x, data.y)
    assert min(some.sizes) <= 64
