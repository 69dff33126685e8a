import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from opacus_pi.gradients import (
    gradient_gram,
    gram,
    held_gram,
    minibatch_gram,
    norm_sweep,
)

from .cases import make
from .oracle import call, double, row

CRITERION = nn.CrossEntropyLoss()
LOSSES = nn.CrossEntropyLoss(reduction="none")


def explicit(model, x, y):
    """Every example's whole gradient as one vector, float64, one at a time."""
    model = copy.deepcopy(model).double().eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for i in range(len(y)):
        loss = LOSSES(call(model, row(double(x), i)), y[i : i + 1]).sum()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(grads, parameters, strict=True)
        ]
        found.append(torch.cat([g.flatten() for g in flat]))
    return torch.stack(found)


@pytest.mark.parametrize(
    "name", ["mlp", "conv-mixed", "residual-batch-norm", "transformer", "lstm"]
)
@pytest.mark.parametrize("batch_size", [2, 64])
def test_against_explicit_vectors(name, batch_size):
    model, x, y = make(name)
    chosen = [3, 0, 2]
    G = explicit(model, x, y)[chosen]
    found = gradient_gram(
        model, CRITERION, TensorDataset(x, y), chosen, batch_size=batch_size
    )
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, G @ G.T, rtol=1e-4, atol=1e-5 * G.norm() ** 2)


@pytest.mark.parametrize(
    "name",
    [
        *("mlp", "conv-mixed", "conv-depthwise", "conv-transpose", "transformer"),
        *("embedding-tied", "embedding-bag", "positions", "lstm", "reused"),
        *("residual-group-norm", "outside-layers", "values-outside-layers"),
    ],
)
def test_held_in_groups_and_formed_in_rows_as_at_once(name, monkeypatch):
    model, x, y = make(name)
    data, chosen = TensorDataset(x, y), list(range(len(y)))
    G = explicit(model, x, y)
    largest = max(p.numel() for p in model.parameters())
    monkeypatch.setattr(held_gram, "_HELD_BYTES", 4 * largest * len(y))
    monkeypatch.setattr(held_gram, "_FORMED_ENTRIES", 7 * len(y))
    monkeypatch.setattr(held_gram, "_PRODUCT_ENTRIES", 3 * len(y))
    found = gradient_gram(model, CRITERION, data, chosen, batch_size=2)
    torch.testing.assert_close(found, G @ G.T, rtol=1e-4, atol=1e-5 * G.norm() ** 2)
    assert torch.equal(found, found.T)


def test_passes_over_the_examples(monkeypatch):
    class Counted(TensorDataset):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(6)))
    data = Counted(torch.randn(60, 40), torch.arange(60) % 40)
    # A layer's weight takes 80 numbers of an example, its bias 40.
    monkeypatch.setattr(held_gram, "_HELD_BYTES", 60 * 4 * 240)
    gradient_gram(model, CRITERION, data, range(60), batch_size=10)
    first = 2 * 10  # to confirm a norm and to measure the memory
    assert data.reads == first + 3 * 60


def test_what_cannot_be_held_is_computed_in_parts_and_by_the_loop(monkeypatch):
    model, x, y = make("mlp")
    data = TensorDataset(x, y)
    whole = gradient_gram(model, CRITERION, data, range(len(y)))
    monkeypatch.setattr(held_gram, "_HELD_BYTES", 4 * 10 * len(y))
    monkeypatch.setattr(gram, "_MAX_BYTES", 4 * 7 * len(y))
    parts = list(gram._parts({"a": 10, "b": 3, "c": 8}, 7))
    assert sum(c.stop - c.start for _, c in parts) == 21
    in_parts = gradient_gram(model, CRITERION, data, range(len(y)))
    torch.testing.assert_close(in_parts, whole, rtol=1e-5, atol=1e-9)

    def refuses(*args, **options):
        raise RuntimeError("no batching rule")

    monkeypatch.setattr(torch.func, "vmap", refuses)
    monkeypatch.setattr(gram, "_MAX_BYTES", 1 << 22)
    looped = gradient_gram(model, CRITERION, data, range(len(y)))
    torch.testing.assert_close(looped, whole, rtol=1e-5, atol=1e-9)


def test_a_batch_that_does_not_use_a_layer():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x):
            layer = self.first if x[0, 0] > 0 else self.second
            return layer(x)

    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.arange(6) % 4
    x[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 1.0])
    model = Gated()
    G = explicit(model, x, y)
    found = gradient_gram(model, CRITERION, TensorDataset(x, y), range(6), batch_size=2)
    torch.testing.assert_close(found, G @ G.T, rtol=1e-5, atol=1e-7)


def test_a_loader_that_reuses_its_memory():
    model, x, y = make("mlp")
    memory = torch.empty_like(x[:2])

    def into_memory(items):
        memory.copy_(torch.stack([a for a, _ in items]))
        return memory, torch.stack([b for _, b in items])

    G = explicit(model, x, y)[:4]
    found = gradient_gram(
        model,
        CRITERION,
        TensorDataset(x, y),
        range(4),
        batch_size=2,
        collate_fn=into_memory,
    )
    torch.testing.assert_close(found, G @ G.T, rtol=1e-4, atol=1e-6)


def test_the_diagonal_holds_the_squared_norms():
    model, x, y = make("conv-mixed")
    data = TensorDataset(x, y)
    found = gradient_gram(model, CRITERION, data, range(len(y)))
    norms = norm_sweep(model, CRITERION, data)
    torch.testing.assert_close(found.diagonal().sqrt(), norms, rtol=1e-5, atol=0)


def test_minibatches_are_centred_sums_of_clipped_gradients():
    model, x, y = make("mlp")
    G, data = explicit(model, x, y), TensorDataset(x, y)
    norms = G.norm(dim=1)
    factors = (float(norms.median()) / norms).clamp(max=1)
    batches, centre = [[0, 1], [], [1, 2, 3]], [2]
    clipped = factors[:, None] * G
    U = torch.stack([clipped[b].sum(0) if b else 0 * G[0] for b in batches])
    V = U - clipped[centre].sum(0)
    for batch_size in (1, 64):
        found = minibatch_gram(
            model, CRITERION, data, batches, centre,
            factors=factors.numpy(), batch_size=batch_size,
        )  # fmt: skip
        torch.testing.assert_close(found, V @ V.T, rtol=1e-4, atol=1e-6)
    plain = minibatch_gram(model, CRITERION, data, [[0]], [])
    torch.testing.assert_close(plain[0, 0].sqrt(), norms[0], rtol=1e-5, atol=0)


def test_a_common_part_of_all_batches_cancels():
    """Huge equal sums and tiny differences: the products of differences stay right."""
    model = nn.Linear(1, 1, bias=False)
    data = [(torch.tensor([v]), 0) for v in (1e6, 1e-3, 2e-3)]
    found = minibatch_gram(
        model,
        lambda outputs, y: outputs[:, 0],
        data,
        [[0, 1], [0, 2]],
        [0],
        batch_size=1,
    )
    expected = torch.tensor([[1e-6, 2e-6], [2e-6, 4e-6]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_no_trace():
    model, x, y = make("conv-mixed")
    model.train()
    data = TensorDataset(x, y)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        gradient_gram(model, CRITERION, data, [0, 1])
        minibatch_gram(model, CRITERION, data, [[0, 1]], [2])
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_bad_input():
    model, x, y = make("mlp")
    data = TensorDataset(x, y)
    with pytest.raises(ValueError, match="indices must .*got 99"):
        gradient_gram(model, CRITERION, data, [0, 99])
    with pytest.raises(ValueError, match="batch_size must .*got 0"):
        gradient_gram(model, CRITERION, data, [0], batch_size=0)
    with pytest.raises(ValueError, match="batches must .*got 99"):
        minibatch_gram(model, CRITERION, data, [[99]], [0])
    with pytest.raises(ValueError, match="factors must .*got an array of shape"):
        minibatch_gram(model, CRITERION, data, [[0]], [0], factors=np.ones(3))
    with pytest.raises(ValueError, match="one loss per example"):
        gradient_gram(model, lambda outputs, y: outputs.sum(), data, [0, 1])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameter"):
        gradient_gram(model, CRITERION, data, [0])
