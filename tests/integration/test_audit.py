"""An audit passes exactly if recorded norms are those of each example's own gradient.

The oracle is one-at-a-time ``torch.autograd.grad`` in this file.
"""

import copy
import math
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import opacus_pi
from opacus_pi import AccountingError, PrivacyEngine, Recorder
from opacus_pi.accounting import RenyiFilter
from tests.custody.probed_models import MIXING, Calls, sequences, vectors

CLASSES = 3
MODES = ("hooks", "functorch", "ew", "ghost", "fast")


def data_set(num_examples=24):
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(num_examples, 5, generator=generator)
    scales = torch.linspace(0.5, 2, num_examples)[:, None]
    labels = torch.randint(0, CLASSES, (num_examples,), generator=generator)
    return TensorDataset(inputs * scales, labels)


def net(*layers):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), *layers, nn.Tanh(), nn.Linear(6, CLASSES))


def prepared(mode="hooks", model=None, criterion=None, recorder=None, **options):
    model = net() if model is None else model
    engine = PrivacyEngine(recorder=recorder)
    if mode == "ghost":
        options["criterion"] = criterion or nn.CrossEntropyLoss()
    parts = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data_set(), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        **options,
    )
    return engine, parts


def alone_norms(model, criterion, x, y):
    norms = []
    for i in range(len(y)):
        loss = criterion(model(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
    return torch.stack(norms).double()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_sound_run_passes_in_every_mode(mode, reduction):
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    options = {"loss_reduction": reduction, "criterion": criterion}
    engine, (model, *_) = prepared(mode, net(nn.Dropout(0.3)), **options)
    result = engine.audit(criterion)
    assert result.passed and all(row.passed for row in result.rows), str(result)
    assert result.num_examples == 8 and result.mode == mode
    drawn = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:8]
    x, y = data_set()[drawn]
    without_dropout = net()
    expected = alone_norms(without_dropout, criterion, x, y)
    torch.testing.assert_close(result.recorded, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.expected, expected, rtol=1e-5, atol=0)


WEIGHTS = torch.tensor([1.0, 5.0, 20.0])


def contrastive(outputs, targets):
    partners = (torch.arange(len(outputs)) + 1) % len(outputs)
    return F.cross_entropy(2 * outputs @ outputs.T, partners)


def ignoring(outputs, targets):
    return F.cross_entropy(outputs, targets.masked_fill(targets == 0, -100))


def hardest_half(outputs, targets):
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses.topk(max(1, len(losses) // 2)).values.mean()


def group_robust(outputs, targets):
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return (losses.detach().softmax(0) * losses).sum()


COUPLED = {
    "weights": nn.CrossEntropyLoss(WEIGHTS),
    "contrastive": contrastive,
    "ignored": ignoring,
    "top": hardest_half,
    "robust": group_robust,
    "centred": lambda z, y: F.cross_entropy(z - z.mean(0), y),
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("mode", ["hooks", "functorch", "fast"])
def test_losses_that_couple_examples_fail_and_break_the_ledger(mode, name):
    engine, (model, optimizer, loader) = prepared(mode, poisson_sampling=False)
    with pytest.warns(UserWarning, match="no longer has a ledger"):
        result = engine.audit(COUPLED[name])
    assert not result.passed and result["loss"].passed is False
    assert result["model"].passed
    is_weighted = name == "weights"
    remedy = 'reduction="none"' if is_weighted else "one loss for each example"
    assert "FAILED" in str(result) and remedy in " ".join(str(result).split())
    for x, y in loader:  # training goes on
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    reason = "CrossEntropyLoss with weights" if is_weighted else "The loss of the batch"
    with pytest.raises(AccountingError, match=f"engine.audit: {reason}"):
        _ = engine.ledger
    assert engine.get_epsilon(1e-5) > 0


def test_ghost_clipping_weights_each_loss_on_its_own():
    criterion = nn.CrossEntropyLoss(WEIGHTS)
    engine, _ = prepared("ghost", criterion=criterion)
    assert engine.audit(criterion).passed


def test_the_criterion_that_ghost_clipping_returns_is_audited_too():
    engine, (_, _, criterion, _) = prepared("ghost")
    assert engine.audit(criterion).passed


def test_ghost_clipping_with_a_coupled_criterion_fails():
    class Robust(nn.Module):
        reduction = "mean"

        def forward(self, outputs, targets):
            losses = F.cross_entropy(outputs, targets, reduction="none")
            losses = losses * len(losses) * losses.detach().softmax(0)
            return losses if self.reduction == "none" else losses.mean()

    engine, _ = prepared("ghost", criterion=Robust())
    with pytest.warns(UserWarning, match="ledger"):
        result = engine.audit(Robust())
    assert result["loss"].passed is False


def test_a_reduction_that_make_private_was_not_told_of():
    engine, _ = prepared()
    with pytest.warns(UserWarning, match='Pass loss_reduction="sum"'):
        result = engine.audit(nn.CrossEntropyLoss(reduction="sum"))
    assert [row.passed for row in result.rows] == [False, False, True, True]


def test_a_model_that_mixes_examples():
    x, y = sequences(), torch.randint(0, CLASSES, (6,))
    for name in ("time-first lstm", "standardised"):
        torch.manual_seed(0)
        model, inputs = MIXING[name]()
        result = opacus_pi.audit(model, nn.CrossEntropyLoss(), (inputs[0], y))
        assert result["norms"].passed is False and result["model"].passed is False
    assert len(x) == 6


def untrained_norm():
    return nn.BatchNorm1d(6, affine=False)


ALONE = {
    "trained BatchNorm": (lambda: net(nn.BatchNorm1d(6)), False, "make_compatible"),
    "BatchNorm without weights": (
        lambda: net(untrained_norm()),
        False,
        "BatchNorm in training mode ('1')",
    ),
    "statistics in forward": (
        lambda: Calls(
            lambda self, x: self.layer(F.batch_norm(x, None, None, training=True)),
            layer=nn.Linear(5, CLASSES),
        ),
        None,
        "The model runs on the batch of 6 examples but fails on one of them alone",
    ),
    "fixed number of rows": (
        lambda: Calls(
            lambda self, x: self.layer(x.view(6, 5)), layer=nn.Linear(5, CLASSES)
        ),
        None,
        "Change the model so that one example can be a batch",
    ),
    "squeezed outputs": (
        lambda: Calls(
            lambda self, x: self.layer(x).squeeze(), layer=nn.Linear(5, CLASSES)
        ),
        None,
        "Change the criterion so that one example can be a batch",
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_model_that_fails_on_one_example_is_a_result(name):
    make, passed, words = ALONE[name]
    batch = data_set()[:6]
    found = opacus_pi.audit(make(), nn.CrossEntropyLoss(), batch)
    assert found["norms"].passed is passed and words in found["norms"].sentence
    assert found.expected.isnan().all() and len(found.expected) == 6
    mixes = name not in ("fixed number of rows", "squeezed outputs")
    assert found["model"].passed is not mixes


def test_batch_norm_with_fixed_statistics_has_norms():
    model = net(untrained_norm().eval())
    assert opacus_pi.audit(model, nn.CrossEntropyLoss(), data_set()[:6]).passed


def test_a_model_that_mixes_vectors_breaks_the_ledger_of_a_run():
    engine, _ = prepared(model=net(untrained_norm()))
    assert engine.audit(nn.CrossEntropyLoss())["norms"].passed is False
    with pytest.raises(AccountingError, match="mixes the examples"):
        engine.ledger  # noqa: B018


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (nn.Linear(7, CLASSES), (6, 5), "shape (6, 5): RuntimeError: mat1 and mat2"),
        (
            nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.Flatten()),
            (6, 4, 1, 1),
            "shape (6, 4, 1, 1): ValueError: Expected more than 1 spatial element",
        ),
    ],
)
def test_a_model_that_fails_on_the_batch_is_named_with_the_shape(model, inputs, words):
    batch = torch.zeros(inputs), torch.zeros(inputs[0], dtype=torch.long)
    with pytest.raises(ValueError) as error:
        opacus_pi.audit(model, nn.CrossEntropyLoss(), batch)
    text = str(error.value)
    assert text.startswith("model(x) fails for inputs of the ") and words in text
    assert "Change the model, or what the data set and collate_fn return" in text


def test_an_order_that_matters():
    class Ranked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            return self.layer(x * torch.arange(1.0, len(x) + 1)[:, None])

    batch = vectors(), torch.randint(0, CLASSES, (6,))
    result = opacus_pi.audit(Ranked(), nn.CrossEntropyLoss(), batch)
    assert result["order"].passed is False and result["norms"].passed is False


def test_losses_without_a_reduction_are_reduced_as_training_does():
    criterion = nn.CrossEntropyLoss(reduction="none")
    engine, _ = prepared()
    assert engine.audit(criterion).passed


@pytest.mark.parametrize("wrapped", [False, True])
def test_batches_of_dicts_and_several_inputs(wrapped):
    model = Calls(lambda m, a, b: m.a(a) * m.b(b), a=nn.Linear(5, 3), b=nn.Linear(5, 3))
    y = torch.randint(0, CLASSES, (6,))
    batch = {"a": vectors(), "b": 2 * vectors(), "labels": y}
    if wrapped:
        batch = ((vectors(), 2 * vectors()), y)
    assert opacus_pi.audit(model, nn.CrossEntropyLoss(), batch).passed


def test_examples_along_the_second_dimension():
    model = Calls(lambda m, x: m.h(x).mean(0), h=nn.Linear(4, 3))
    x, y = sequences(6, 9).transpose(0, 1), torch.randint(0, CLASSES, (6,))
    criterion = nn.CrossEntropyLoss()
    assert opacus_pi.audit(model, criterion, (x, y), batch_first=False).passed


def test_several_batches_and_the_table():
    engine, _ = prepared()
    result = engine.audit(nn.CrossEntropyLoss(), batches=2)
    assert result.num_examples == 16 and result.passed
    lines = str(result).splitlines()
    assert lines[0] == "Audit of 16 examples, mode 'hooks': passed"
    assert [line.split()[:2] for line in lines[1:]] == [
        [name, "ok"] for name in ("norms", "loss", "model", "order")
    ]


def test_monitored_and_swept_runs_are_audited_as_they_are_swept():
    model = net(nn.BatchNorm1d(6))
    engine = PrivacyEngine()
    engine.make_monitored(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data_set(), batch_size=8),
        noise_std=0.01,
        criterion=nn.CrossEntropyLoss(),
    )
    result = engine.audit(nn.CrossEntropyLoss())
    assert result.passed and result.mode == "swept"
    coupled = engine.audit(nn.CrossEntropyLoss(WEIGHTS))
    assert [row.passed for row in coupled.rows] == [None, False, True, None]


def test_an_audit_leaves_no_trace():
    recorder = Recorder()
    engine, (model, optimizer, loader) = prepared(recorder=recorder)
    twin, (other, other_optimizer, other_loader) = prepared()

    def train(model, optimizer, loader, engine=None):
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if engine is not None:
                assert engine.audit(nn.CrossEntropyLoss()).passed
            loss.backward()
            if engine is not None:
                engine.audit(nn.CrossEntropyLoss())
            optimizer.step()
        return torch.rand(3), random.random(), np.random.rand()

    drawn = train(model, optimizer, loader, engine)
    expected = train(other, other_optimizer, other_loader)
    assert torch.equal(drawn[0], expected[0]) and drawn[1:] == expected[1:]
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    np.testing.assert_array_equal(engine.ledger.grad_norms, twin.ledger.grad_norms)
    assert engine.attribution == twin.attribution


class Counting(nn.CrossEntropyLoss):
    """Has a buffer, a counter and a generator, all of which each call changes."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("running_mean", torch.zeros(()))
        self.num_calls, self.draws = 0, np.random.default_rng(0)

    def forward(self, outputs, targets):
        losses = super().forward(outputs, targets)
        self.num_calls += 1
        self.running_mean.lerp_(losses.detach().mean(), 0.1)
        self.last = self.draws.random()
        return losses


class Weakening(Counting):
    """Its loss depends on the number of calls, so that a lost call changes weights."""

    def forward(self, outputs, targets):
        return super().forward(outputs, targets) / (1 + self.num_calls // 4)


@pytest.mark.parametrize("kind", [Counting, Weakening])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_an_audit_does_not_change_the_state_of_the_criterion(mode, kind):
    def trained(*, audited):
        criterion = kind()
        engine, (model, optimizer, *own, loader) = prepared(mode, criterion=criterion)
        loss = own[0] if own else lambda *batch: criterion(*batch)
        torch.manual_seed(7)
        for x, y in loader:
            if audited:
                engine.audit(own[0] if own else loss, batches=2)
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        state = criterion.num_calls, criterion.running_mean, criterion.last
        return state, list(model.parameters()), engine

    with_audit, weights, engine = trained(audited=True)
    without, expected, _ = trained(audited=False)
    assert with_audit == without
    assert all(map(torch.equal, weights, expected))
    assert kind is Weakening or engine.ledger.num_examples == 24


def test_a_criterion_that_cannot_be_copied_is_audited_too():
    class Locked(nn.CrossEntropyLoss):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    engine, _ = prepared()
    assert engine.audit(Locked()).passed


def test_what_is_not_audited_is_said():
    with pytest.raises(AccountingError, match="none was prepared"):
        PrivacyEngine().audit(nn.CrossEntropyLoss())
    engine, _ = prepared("no_op")
    with pytest.raises(ValueError, match="training loop computes them"):
        engine.audit(nn.CrossEntropyLoss())
    one = vectors(1), torch.tensor([0])
    with pytest.raises(ValueError, match="at least 2 examples"):
        opacus_pi.audit(net(), nn.CrossEntropyLoss(), one)


def test_the_loss_is_a_link_that_an_audit_checks():
    engine, (model, optimizer, loader) = prepared()

    def train():
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    train()
    unchecked = {link.name for link in engine.ledger.custody.unchecked}
    assert "loss" in unchecked and "model" not in unchecked
    before = copy.deepcopy(engine.ledger.grad_norms)
    assert engine.audit(nn.CrossEntropyLoss()).passed
    np.testing.assert_array_equal(engine.ledger.grad_norms, before)
    assert "loss" in {link.name for link in engine.ledger.custody.unchecked}
    train()
    (loss,) = [x for x in engine.ledger.custody.unchecked if x.name == "loss"]
    assert loss.sentence.startswith("The loss of the first ")  # before the audit


def reason_of_the_loss(engine, model, optimizer, loader):
    """Train an audited run, and return why its loss is unchecked."""
    assert engine.audit(nn.CrossEntropyLoss()).passed
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {k.name: k.sentence for k in engine.ledger.custody.unchecked}["loss"]


class Centred(nn.Module):
    """Subtracts a running mean of its inputs, which it keeps in Python floats."""

    def __init__(self):
        super().__init__()
        self.net, self.mean = net(), [0.0]

    def forward(self, x):
        outputs = self.net(x - self.mean[0])
        self.mean = [0.9 * self.mean[0] + 0.1 * float(x.mean())]
        return outputs


@pytest.mark.filterwarnings("ignore")
def test_a_state_of_earlier_batches_is_named_as_a_reason():
    engine, parts = prepared(model=Centred())
    loss = reason_of_the_loss(engine, *parts)
    links = engine.ledger.custody.unchecked
    (norm,) = [link.sentence for link in links if link.name == "norm"]
    for reason in (norm, loss):
        assert "such as a" in reason and "running mean" in reason
        assert "without noise" in reason


def test_norms_of_sweeps_say_nothing_about_the_loss_of_the_loop():
    recorder = Recorder("swept", criterion=nn.CrossEntropyLoss())
    engine, parts = prepared(recorder=recorder)
    assert "measured by sweeps" in reason_of_the_loss(engine, *parts)


def test_a_filter_that_chooses_samples_is_named():
    model = net()
    engine = PrivacyEngine(renyi_filter=RenyiFilter(1e6))
    parts = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data_set(), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert "RenyiFilter" in reason_of_the_loss(engine, *parts)


class Routed(nn.Module):
    """Gives each of two layers a part of the examples."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        to_one = x[:, 0] > 0
        outputs = x.new_zeros(len(x), 3)
        outputs[to_one] = self.one(x[to_one])
        outputs[~to_one] = self.other(x[~to_one])
        return outputs


@pytest.mark.parametrize(
    "mode, reason", [("hooks", "routes them"), ("ew", "An update with these examples")]
)
def test_a_model_that_routes_examples_has_a_failed_audit(mode, reason):
    x, module = torch.randn(24, 6), Routed()
    engine = PrivacyEngine()
    engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, torch.arange(24) % 3), batch_size=7),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    audit = engine.audit(nn.CrossEntropyLoss())
    assert not audit.passed and reason in audit["norms"].sentence
    assert audit["order"].passed is None
    batch = x[:7], torch.arange(7) % 3
    assert not opacus_pi.audit(module, nn.CrossEntropyLoss(), batch).passed


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_the_criterion_keep_their_gradients(mode):
    class Head(nn.Module):
        reduction = "mean"

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(CLASSES, CLASSES)

        def forward(self, outputs, targets):
            reduction = self.reduction
            return F.cross_entropy(self.layer(outputs), targets, reduction=reduction)

    criterion = Head()
    criterion.layer.bias.grad = gradient = torch.ones(CLASSES)
    engine, *_ = prepared(mode, criterion=criterion)
    assert engine.audit(criterion).passed
    assert criterion.layer.weight.grad is None
    assert criterion.layer.bias.grad is gradient and bool((gradient == 1).all())


class TwoInputs(nn.Module):
    """A parameter of its own, outside of layers, and two inputs."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Parameter(torch.ones(5)), nn.Linear(5, CLASSES)

    def forward(self, a, b):
        return self.head(a + b + self.token)


class HasBuffer(nn.Module):
    """A parameter and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.zeros(5))
        self.token, self.head = nn.Parameter(torch.ones(5)), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(x + self.offset + self.token)


@pytest.mark.parametrize("mode", MODES)
def test_two_inputs_and_a_parameter_of_the_model(mode):
    x, y = data_set(6).tensors
    batch = ((x, x.flip(0)), y)
    audit = opacus_pi.audit(
        TwoInputs(), nn.CrossEntropyLoss(), batch, grad_sample_mode=mode
    )
    assert bool(audit.passed) is (mode == "fast")
    if mode != "fast":
        assert 'try grad_sample_mode="fast"' in str(audit)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
def test_the_advice_for_what_every_mode_refuses(mode):
    audit = opacus_pi.audit(
        HasBuffer(), nn.CrossEntropyLoss(), data_set(6).tensors, grad_sample_mode=mode
    )
    assert not audit.passed
    assert "Move the parameters into a layer without buffers" in str(audit)
    assert "try grad_sample_mode" not in str(audit)


class Trimmed(nn.Module):
    """The mean over positions, up to the longest example of the batch."""

    def __init__(self, *, pools=True):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 6), nn.Linear(6, CLASSES)
        self.pools = pools

    def forward(self, x):
        hidden = self.embedding(x[:, : int((x > 0).sum(1).max())])
        return self.head(hidden.mean(1) if self.pools else hidden)


def texts():
    generator = torch.Generator().manual_seed(6)
    lengths = torch.tensor([2, 3, 5, 8, 8, 8, 8, 8])
    words = torch.randint(1, 20, (8, 12), generator=generator)
    return words * (torch.arange(12) < lengths[:, None]), torch.arange(8) % CLASSES


def test_a_model_that_cuts_a_batch_at_its_longest_example_is_the_cause():
    found = opacus_pi.audit(Trimmed(), nn.CrossEntropyLoss(), texts())
    assert found["norms"].passed is False and found["model"].passed is False
    assert "is given an example alone" in found["model"].sentence
    assert "length of the longest one" in found["model"].sentence


def test_outputs_that_are_only_longer_in_the_batch_may_be_the_cause():
    def all_positions(outputs, y):
        targets = y[:, None].expand(outputs.shape[:2])
        return F.cross_entropy(outputs.mT, targets)

    found = opacus_pi.audit(Trimmed(pools=False), all_positions, texts())
    assert found["norms"].passed is False and found["model"].passed is None
    assert "(1, 2, 3); in the batch they have (1, 8, 3)" in found["model"].sentence


def test_the_model_is_not_blamed_for_a_hook_on_gradients():
    model = net()
    model[0].register_full_backward_hook(lambda _, grads, __: (None,))
    model[2].register_full_backward_hook(
        lambda _, grads, __: (grads[0] / len(grads[0]),)
    )
    found = opacus_pi.audit(model, nn.CrossEntropyLoss(), data_set()[:8])
    assert found["norms"].passed is False and found["model"].passed is True
    assert "or a hook changes gradients" in found["norms"].sentence


class HoldsModel(nn.Module):
    """A criterion with the model: in an attribute, a list, or with its wrapper."""

    def __init__(self, held, uses):
        super().__init__()
        self.held, self.uses = held, uses

    def forward(self, outputs, y):
        model = self.held[0] if isinstance(self.held, list) else self.held
        return F.cross_entropy(outputs, y) + self.uses(model, y)


def second_pass(model, y):
    return model(torch.zeros(len(y), 5)).square().mean()


HOLDERS = {
    "module": lambda net, wrapped: HoldsModel(net, second_pass),
    "wrapped": lambda net, wrapped: HoldsModel(wrapped, second_pass),
    "in a list": lambda net, wrapped: HoldsModel([net], second_pass),
    "function": lambda net, wrapped: (
        lambda outputs, y: F.cross_entropy(outputs, y) + second_pass(net, y)
    ),
    "a layer": lambda net, wrapped: HoldsModel(net[0], second_pass),
}


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "ghost"])
@pytest.mark.parametrize("held", HOLDERS)
def test_a_criterion_that_calls_the_model_is_refused_with_one_error(mode, held):
    model = net()
    engine, (wrapped, optimizer, loader) = prepared(mode, model)
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match="criterion calls the model.*Call the model"):
        engine.audit(HOLDERS[held](model, wrapped))
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks
    x, y = next(iter(loader))
    F.cross_entropy(wrapped(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "uses",
    [
        lambda model, y: 1e-3 * sum(p.square().sum() for p in model.parameters()),
        lambda model, y: 0.0 * len(list(model.children())),
        lambda model, y: torch.no_grad()(second_pass)(model, y) * 0,
    ],
)
def test_a_criterion_that_holds_the_model_is_audited(uses):
    model = net()
    engine, _ = prepared("hooks", model)
    assert engine.audit(HoldsModel(model, uses)).passed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_example_with_a_value_that_is_not_finite_is_named(mode, bad):
    model = net()
    engine, (*_, loader) = prepared(mode, model)
    loader.dataset.tensors[0][17, 2] = bad
    found = engine.audit(nn.CrossEntropyLoss(), batches=3)
    assert found["norms"].passed is False and found["loss"].passed is not False
    assert "gradient of example 17 of the data set alone" in found["norms"].sentence
    batch = loader.dataset[12:20]
    found = opacus_pi.audit(net(), nn.CrossEntropyLoss(), batch)
    assert "gradient of example 5 of the batch alone" in found["norms"].sentence
    weights = net()
    nn.init.constant_(weights[0].bias, math.nan)
    found = opacus_pi.audit(weights, nn.CrossEntropyLoss(), batch)
    assert "of every example alone" in found["norms"].sentence
