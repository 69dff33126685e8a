"""Norms are taken once, by us, and Opacus clips by them as if it had taken them."""

import copy

import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine
from opacus_pi.integration.grad_sample import grad_sample_norms
from opacus_pi.integration.methods_in_use import MethodsInUse
from opacus_pi.integration.optimizers import report_updates

SHAPES = [(5,), (5, 1), (5, 7), (5, 3, 4, 2), (5, 1, 1)]


@pytest.mark.parametrize("scale", [1e-44, 1e-25, 1e-3, 1.0, 1e18, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_column_of_norms_has_the_norms_that_opacus_takes(scale, dtype):
    generator = torch.Generator().manual_seed(0)
    held = [torch.randn(s, generator=generator).to(dtype) * scale for s in SHAPES]

    def as_opacus_does(held):
        norms = [g.reshape(len(g), -1).norm(2, dim=-1) for g in held]
        return torch.stack(norms, dim=1).norm(2, dim=1)

    norms = grad_sample_norms(held)
    assert torch.equal(norms, as_opacus_does(held))
    assert torch.equal(norms, as_opacus_does([norms.unsqueeze(1)]))


def made_private(engine, *, num_examples=12, batch_size=6, **options):
    """A small model, its optimizer and its loader."""
    torch.manual_seed(0)
    x, y = torch.randn(num_examples, 4), torch.randint(0, 3, (num_examples,))
    data = TensorDataset(x, y)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=batch_size),
        max_grad_norm=0.5,
        poisson_sampling=False,
        **{"noise_multiplier": 0.0, **options},
    )


def prepared(engine, **options):
    """A model whose per-example gradients of one batch wait for the optimizer."""
    model, optimizer, loader = made_private(engine, **options)
    for x, y in loader:
        nn.functional.cross_entropy(model(x), y).backward()
        return optimizer


def gradients_after_clipping(engine, dtype):
    """Summed clipped gradients, of per-example gradients in some precision."""
    optimizer = prepared(engine)
    for p in optimizer.params:
        p.grad_sample = p.grad_sample.to(dtype)
    optimizer.clip_and_accumulate()
    return [p.summed_grad for p in optimizer.params]


@pytest.mark.filterwarnings("ignore:This run has no ledger")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_clipping_is_opacus_own_to_the_bit_in_every_precision(dtype):
    engines = opacus.PrivacyEngine(), PrivacyEngine()
    theirs, ours = (gradients_after_clipping(e, dtype) for e in engines)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_per_example_gradients_are_themselves_before_and_after():
    optimizer = prepared(PrivacyEngine())
    before = copy.copy(optimizer.grad_samples)
    assert [g.shape[1:] for g in before] == [p.shape for p in optimizer.params]
    optimizer.clip_and_accumulate()
    with pytest.raises(ValueError, match="Gradients haven"):
        optimizer.clip_and_accumulate()  # and not after an error either
    pairs = zip(before, optimizer.grad_samples, strict=True)
    assert all(a is b for a, b in pairs)


def test_norms_are_taken_once(monkeypatch):
    optimizer = prepared(PrivacyEngine())
    base = opacus.optimizers.DPOptimizer
    read, original = [], base._get_flat_grad_sample

    def counted(self, p):
        read.append(p)
        return original(self, p)

    monkeypatch.setattr(base, "_get_flat_grad_sample", counted)
    # which gives Opacus the gradients themselves, as any replaced method of Opacus does
    monkeypatch.setattr(MethodsInUse, "are_replaced", lambda *_: False)
    optimizer.step()
    assert len(read) == 2 * len(optimizer.params)  # for the norms and for the sums


@pytest.mark.parametrize("method", ["pre_step", "clip_and_accumulate"])
def test_gradients_that_a_subclass_changes_are_those_that_opacus_clips(method):
    def halve_first(self, *args):
        for p in self.params:
            p.grad_sample = p.grad_sample / 2
        return getattr(super(Halving, self), method)(*args)

    base = opacus.optimizers.DPOptimizer
    Halving = type("Halving", (base,), {method: halve_first})
    theirs, ours = prepared(opacus.PrivacyEngine()), prepared(PrivacyEngine())
    update = ours._pi_update
    theirs.__class__ = ours.__class__ = Halving
    report_updates(ours, update)
    for optimizer in (theirs, ours):
        optimizer.step()
    pairs = zip(theirs.params, ours.params, strict=True)
    assert all(torch.equal(a.summed_grad, b.summed_grad) for a, b in pairs)
    assert all(p.summed_grad.any() for p in ours.params)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_number_of_accumulated_passes_is_that_of_each_update(reduction):
    def weights_and_counts(engine):
        model, optimizer, loader = made_private(
            engine,
            num_examples=24,
            batch_size=4,
            noise_multiplier=1.0,
            loss_reduction=reduction,
            noise_generator=torch.Generator().manual_seed(0),
        )
        counts, loss = [], nn.CrossEntropyLoss(reduction=reduction)
        for i, (x, y) in enumerate(loader):
            loss(model(x), y).backward()
            counts.append(optimizer.accumulated_iterations)
            if i in (0, 3, 5):
                optimizer.step()
                counts.append(optimizer.accumulated_iterations)
                optimizer.zero_grad()
        return [*model.parameters()], counts

    theirs, expected = weights_and_counts(opacus.PrivacyEngine())
    ours, counts = weights_and_counts(PrivacyEngine())
    assert counts == expected == [1, 1, 1, 2, 3, 3, 1, 2, 2]
    assert all(map(torch.equal, ours, theirs))
