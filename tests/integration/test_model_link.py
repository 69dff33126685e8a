"""The link "model" in training: mixing models are refused, honest ones are not.

Training is compared with Opacus's own engine, and norms with one-at-a-time autograd.
"""

import gc
import warnings
import weakref

import numpy as np
import opacus
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine, Recorder
from opacus_pi.custody.model_probe import ModelProbe
from tests.custody.probed_models import HONEST, MIXING, SIZE, Calls, Counting

# What Opacus or a mode of it cannot train, for reasons of its own.
_NOT_BY_OPACUS = {
    "spectral norm",
    "plain lstm with states",
    "nested outputs",
    "transformer encoder",
    "experts",
    "cosine head",
    "batch norm",
    "time-first gru of torch",
    "time-first encoder",
    "hidden in a dict",
    "similarities",
    "images without a channel",
}
_NOT_BY_LAYER = {"position table", "weight tying", "weight norm", "checkpointing"}
_NOT_IN_MODE = {
    "hooks": {"position table", "weight tying"},
    "functorch": {"position table", "weight tying"},
    "ghost": _NOT_BY_LAYER,
    "fast": {"time-first lstm"},
    "ew": _NOT_BY_LAYER
    | {
        "lstm",
        "transposed for a time-first lstm",
        "attention",
        "transformer block",
        "instance norm",
        "frozen batch norm",
        "dropped tokens",
        "stochastic depth",
    },
}


def combinations(table, modes):
    """Pairs of a mode and a model that it can train."""
    for mode in modes:
        for name in table:
            if name not in _NOT_BY_OPACUS | _NOT_IN_MODE[mode]:
                yield mode, name


def scalar_loss(outputs, targets):
    while not isinstance(outputs, torch.Tensor):
        outputs = (
            next(iter(outputs.values())) if isinstance(outputs, dict) else outputs[0]
        )
    return outputs.flatten(1).square().sum(1)


def train(engine, table, name, mode="hooks", *, num_updates=2, **options):
    """Train a listed model on its inputs, and return it."""
    torch.manual_seed(1)
    model, inputs = table[name]()
    data = TensorDataset(*inputs, torch.zeros(SIZE))
    criterion = None
    if mode == "ghost":
        options["criterion"] = SquaredOutputs()
    wrapped, optimizer, *criterion, loader = engine.make_private(
        module=model.train(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=DataLoader(data, batch_size=SIZE),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **options,
    )
    torch.manual_seed(2)
    for _ in range(num_updates):
        for *x, y in loader:
            optimizer.zero_grad()
            outputs = wrapped(*x)
            if criterion:
                criterion[0](outputs, y).backward()
            else:
                scalar_loss(outputs, y).mean().backward()
            optimizer.step()
    return model


class SquaredOutputs(nn.Module):
    reduction = "mean"

    def forward(self, outputs, targets):
        losses = scalar_loss(outputs, targets)
        return losses if self.reduction == "none" else losses.mean()


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("mode", "name"), combinations(HONEST, _NOT_IN_MODE))
def test_honest_models_train_as_with_opacus_and_keep_their_ledger(mode, name):
    engine = PrivacyEngine()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        model = train(engine, HONEST, name, mode)
    ours = [str(w.message) for w in shown if "examples separately" in str(w.message)]
    assert not ours
    custody = engine.ledger.custody
    assert {link.name: link.state for link in custody.links}["model"] == "checked"
    if mode != "fast":
        plain = train(opacus.PrivacyEngine(), HONEST, name, mode)
        assert torch.equal(weights_of(model), weights_of(plain))


@pytest.mark.parametrize(
    ("mode", "name"), combinations(MIXING, ("hooks", "functorch", "ghost", "fast"))
)
def test_mixing_models_are_refused_while_training_goes_on(mode, name):
    engine = PrivacyEngine()
    with pytest.warns(UserWarning, match="no longer has a ledger. The model mixes"):
        train(engine, MIXING, name, mode)
    with pytest.raises(AccountingError, match="The model mixes the examples"):
        _ = engine.ledger
    with pytest.raises(AccountingError, match="no gradient belongs to one example"):
        engine.epsilons(1e-5)
    assert engine.get_epsilon(1e-5) > 0


def test_the_probe_can_be_declared_unnecessary():
    engine = PrivacyEngine(recorder=Recorder(probe_model=False))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*examples separately")
        train(engine, HONEST, "mlp")
    unchecked = {link.name: link.sentence for link in engine.ledger.custody.unchecked}
    assert "probe_model=False) was passed" in unchecked["model"]


def test_a_model_that_cannot_be_repeated_is_warned_of_once():
    table = {"counting": lambda: (Counting(), HONEST["mlp"]()[1])}
    engine = PrivacyEngine()
    with pytest.warns(UserWarning, match="other outputs when it is run again") as shown:
        train(engine, table, "counting", num_updates=4)
    assert len([w for w in shown if "run again" in str(w.message)]) == 1
    assert "model" in {link.name for link in engine.ledger.custody.unchecked}


def test_autocast_is_repeated():
    kinds = []

    def note(module, args, out):
        kinds.append(out.dtype)

    inner = nn.Linear(5, 3)
    inner.register_forward_hook(note)
    model = Calls(lambda m, x: m.layer(x), layer=inner)
    probe = ModelProbe(weakref.ref(model))
    x = HONEST["mlp"]()[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*x)
        probe.saw(x, {})
    assert probe.run().state == "checked"
    assert kinds == [torch.bfloat16] * 5


def test_batches_of_one_example_are_waited_out():
    """Poisson sampling may draw one example, or none."""
    layer = Calls(lambda m, x: m.h(x - x.mean(0)), h=nn.Linear(4, 3))
    engine = PrivacyEngine()
    data = TensorDataset(torch.randn(SIZE, 4), torch.zeros(SIZE))
    wrapped, optimizer, loader = engine.make_private(
        module=layer,
        optimizer=torch.optim.SGD(layer.parameters(), lr=0.05),
        data_loader=DataLoader(data, batch_size=1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for x, _ in loader:
        optimizer.zero_grad()
        wrapped(x).square().sum().backward()
        optimizer.step()
    unchecked = {link.name for link in engine.ledger.custody.unchecked}
    assert "model" in unchecked


@pytest.mark.parametrize("mode", ["hooks", "ew", "fast", "ghost"])
def test_the_model_is_not_kept_in_memory(mode):
    engine = PrivacyEngine()
    model = weakref.ref(train(engine, HONEST, "mlp", mode))
    gc.collect()
    assert model() is None
    assert np.isfinite(engine.ledger.grad_norms).all()


def test_a_loss_of_two_views_is_probed_once():
    """Both passes are of one kind, and the gradients of both enter the update."""
    calls = []

    def forward(m, x):
        calls.append(len(x))
        return m.layer(x)

    model = Calls(forward, layer=nn.Linear(5, 3))
    engine = PrivacyEngine()
    data = TensorDataset(torch.randn(SIZE, 5), torch.zeros(SIZE, dtype=torch.long))
    wrapped, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=DataLoader(data, batch_size=SIZE),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
    assert len(calls) == 3 + 4  # three passes of training, four of the probe
