"""Functions of Opacus that a program replaces while a run is under way."""

import opacus.optimizers.optimizer as optimizer_module
import pytest
import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.integration.drawn_noise import missing_noise
from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import AccountingError

MODES = ("hooks", "ghost", "fast")
INPUTS, LABELS = torch.randn(16, 4), torch.arange(16) % 3


def without_noise(self):
    for p in self.params:
        p.grad = p.summed_grad.clone().view_as(p)


def unclipped(self):
    for p in self.params:
        p.summed_grad = 10 * p.grad


def unscaled(self):
    for p in self.params:
        p.grad = p.summed_grad.clone().view_as(p)


def logging(self):
    type(self).seen = True


IN_CLASSES = [
    (DPOptimizer, "add_noise", without_noise, MODES),
    (DPOptimizer, "clip_and_accumulate", unclipped, ("hooks",)),
    (DPOptimizer, "scale_grad", unscaled, MODES),
    (DPOptimizerFastGradientClipping, "accumulate", unclipped, ("ghost",)),
    (
        GradSampleModuleFastGradientClipping,
        "get_norm_sample",
        lambda self: torch.zeros(4),
        ("ghost",),
    ),
    (
        DPTensorFastGradientClipping,
        "backward",
        lambda self: self.loss_per_sample.mean().backward(),
        ("ghost",),
    ),
    (
        optimizer_module,
        "_generate_noise",
        lambda **options: torch.zeros_like(options["reference"]),
        MODES,
    ),
]


def train(mode, change, *, updates=4):
    """Train, with a change before the third update; return the engine."""
    torch.manual_seed(0)
    model, engine = nn.Linear(4, 3), PrivacyEngine()
    model, optimizer, *rest = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(INPUTS, LABELS), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **({"criterion": nn.CrossEntropyLoss()} if mode == "ghost" else {}),
    )
    criterion = rest[0] if mode == "ghost" else nn.CrossEntropyLoss()
    for update, (x, y) in zip(range(updates), rest[-1], strict=False):
        if update == 2:
            change(optimizer)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return engine


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("owner", "name", "function", "mode"),
    [(*case, mode) for *case, modes in IN_CLASSES for mode in modes],
)
def test_replaced_in_a_class(owner, name, function, mode, monkeypatch):
    engine = train(mode, lambda _: monkeypatch.setattr(owner, name, function))
    with pytest.raises(AccountingError, match=rf"{name} of \S+ was replaced after"):
        _ = engine.ledger


class NoNoise:
    def add_noise(self):
        super().add_noise()
        without_noise(self)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
def test_replaced_by_a_mixin(mode):
    def change(optimizer):
        optimizer.__class__ = type("Mixed", (NoNoise, type(optimizer)), {})

    with pytest.raises(AccountingError, match="add_noise of Mixed was replaced"):
        _ = train(mode, change).ledger


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
def test_replaced_in_torch(mode, monkeypatch):
    def change(_):
        monkeypatch.setattr(torch, "normal", lambda **o: torch.zeros(o["size"]))

    with pytest.raises(AccountingError, match="add_noise changed the gradients by 0 "):
        _ = train(mode, change).ledger


@pytest.mark.parametrize("mode", MODES)
def test_nothing_replaced_or_something_added(mode):
    def change(optimizer):
        optimizer.noise_multiplier = 0.5
        optimizer.__class__ = type("Mixed", (type(optimizer),), {"log": logging})

    engine = train(mode, change)
    assert {link.name for link in engine.ledger.custody.unchecked} <= {"loss"}


@pytest.mark.parametrize("size", [1, 20, 10_000])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_noise_of_another_size(size, scale):
    draws = torch.Generator().manual_seed(0)
    total = 5 * torch.randn(size, generator=draws)
    noised = total + 2.0 * scale * torch.randn(size, generator=draws)
    reason = missing_noise([(total, noised), (None, None)], 2.0)
    assert (reason is not None) == (scale == 0.0)


def test_noise_that_rounding_hides_is_not_judged():
    total = torch.full((100,), 1e8)
    assert missing_noise([(total, total.clone())], 1.0) is None
