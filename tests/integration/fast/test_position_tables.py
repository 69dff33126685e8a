"""Position tables with as many rows as examples are not mistaken for examples."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from opacus_pi.gradients import norm_sweep, per_example_grad_norms
from opacus_pi.gradients.clipping import TrainingTaps, example_norms
from tests.integration.fast.training import SLOW

LENGTH = 5
SIZES = [2, LENGTH - 1, LENGTH, LENGTH + 1]
pytestmark = pytest.mark.filterwarnings(f"ignore:.*{SLOW}")


class Places(nn.Module):
    """An embedding of positions, which all examples share."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.places, self.head = nn.Embedding(LENGTH, 4), nn.Linear(4, 2)

    def forward(self, ids):
        h = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(torch.tanh(5 * h).mean(1))


class Anchors(nn.Module):
    """A layer that is given a parameter, and scales of its rows."""

    def __init__(self):
        super().__init__()
        self.words, self.inner = nn.Embedding(10, 4), nn.Linear(4, 4)
        self.anchors = nn.Parameter(torch.randn(LENGTH, 4))
        self.scale, self.head = nn.Parameter(torch.randn(4)), nn.Linear(LENGTH, 2)

    def forward(self, ids):
        keys = self.inner(self.anchors) * self.scale
        return self.head(torch.tanh(self.words(ids).mean(1) @ keys.T))


def made(kind):
    torch.manual_seed(0)
    return kind()


def batch(size):
    generator = torch.Generator().manual_seed(size)
    return torch.randint(10, (size, LENGTH), generator=generator), torch.arange(
        size
    ) % 2


def one_at_a_time(model, x, y):
    norms = []
    for i in range(len(y)):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(torch.cat([g.flatten() for g in grads]).norm())
    return torch.stack(norms).double()


def norms_from_cache(taps, model, x, y):
    """The norms of one batch, from the cache that its backward pass has filled."""
    taps.clear()
    nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    found = taps.caches[0].gradients(list(model.parameters()), model)
    return example_norms(found.values())


@pytest.mark.parametrize("kind", [Places, Anchors])
@pytest.mark.parametrize("size", SIZES)
def test_the_first_batch(kind, size):
    model, taps = made(kind), TrainingTaps()
    x, y = batch(size)
    wanted = one_at_a_time(model, x, y)
    torch.testing.assert_close(
        per_example_grad_norms(model, nn.CrossEntropyLoss(), x, y),
        wanted,
        rtol=1e-5,
        atol=0,
    )
    taps.attach(model)
    torch.testing.assert_close(
        norms_from_cache(taps, model, x, y), wanted, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("kind", [Places, Anchors])
def test_later_batches(kind):
    """The first batch has one example, which reveals nothing."""
    model, taps = made(kind), TrainingTaps()
    wanted = [one_at_a_time(model, *batch(size)) for size in (1, *SIZES)]
    taps.attach(model)
    for size, norms in zip((1, *SIZES), wanted, strict=True):
        ours = norms_from_cache(taps, model, *batch(size))
        torch.testing.assert_close(ours, norms, rtol=1e-5, atol=0)


class Once(Places):
    """A model that cannot run on one example fewer."""

    def forward(self, ids):
        if len(ids) == LENGTH - 1:
            raise KeyError("too few")
        return super().forward(ids)


def test_a_model_that_cannot_be_probed_is_known_by_its_later_batches():
    model, taps = made(Once), TrainingTaps()
    taps.attach(model)
    norms_from_cache(taps, model, *batch(LENGTH))
    for size in (LENGTH + 1, LENGTH):
        wanted = one_at_a_time(made(Once), *batch(size))
        torch.testing.assert_close(
            norms_from_cache(taps, model, *batch(size)), wanted, rtol=1e-5, atol=0
        )


def test_looking_leaves_no_trace():
    model, taps, seen = nn.Sequential(made(Places), nn.Dropout(0.5)), TrainingTaps(), []
    model.register_forward_hook(lambda module, x, y: seen.append(y.detach()))
    x, _ = batch(4)
    for attach in (lambda: None, lambda: taps.attach(model)):
        attach()
        torch.manual_seed(3)
        model(x)
        seen.append(torch.rand(3))
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


def test_a_sweep_in_batches_of_that_size():
    model = made(Places)
    x, y = batch(2 * LENGTH + 1)
    swept = norm_sweep(
        model, nn.CrossEntropyLoss(), TensorDataset(x, y), batch_size=LENGTH
    )
    wanted = one_at_a_time(model, x, y)
    torch.testing.assert_close(torch.as_tensor(swept), wanted, rtol=1e-5, atol=0)
