"""Combinations of what Opacus offers: norms are those of one-at-a-time autograd."""

import numpy as np
import opacus
import pytest
import torch
from opacus.schedulers import (
    ExponentialNoise,
    LambdaGradClip,
    LambdaNoise,
    StepGradClip,
    StepNoise,
)
from torch import nn
from torch.utils.data import DataLoader

from opacus_pi.integration.engine import PrivacyEngine
from tests.private_training import ADAPTIVE, Net, Training, data, one_at_a_time

pytestmark = pytest.mark.filterwarnings(
    "ignore:This run has no ledger",
    "ignore:PrivacyEngine detected new dataset",
    "ignore:Full backward hook",
)

MODES = ("hooks", "functorch", "ew", "ghost")
CLIPPINGS = {
    "flat": {"max_grad_norm": 0.7},
    "per_layer": {"max_grad_norm": [0.3] * 6},
    "adaptive": {"max_grad_norm": 0.7, **ADAPTIVE},
}


class Watched(Training):
    """A training that notes the true norms before every batch, for comparison."""

    def __init__(self, **options):
        super().__init__(**{"batch_size": 12, "lr": 0.05, **options})
        self.truth = []

    def note(self, x, y):
        self.truth += one_at_a_time(self.fresh(), x, y)

    def fresh(self):
        fresh = self.plain_copy()
        pairs = zip(fresh.parameters(), self.net.parameters(), strict=True)
        for one, own in pairs:
            one.requires_grad_(own.requires_grad)
        return fresh

    def train(self, num_epochs=2, before_batch=None):
        return super().train(num_epochs, before_batch or self.note)

    def check(self, evidence="by_storage"):
        seen = [norm for _, norm in self.recorder.observed]
        np.testing.assert_allclose(seen, self.truth, rtol=1e-5)
        assert len(seen) > 12
        counts = self.engine.attribution
        assert counts[evidence] == len(seen) == sum(counts.values())
        assert self.engine.ledger.mechanism.num_steps == len(self.recorder.updates)
        return self


# ------------------------------------------------------- the model is not wrapped, ew
UNWRAPPED = [
    (mode, clipping, reduction, poisson, managed)
    for mode in ("hooks", "functorch", "ghost")
    for clipping in CLIPPINGS
    for reduction, poisson, managed in (
        ("mean", True, True),
        ("mean", False, False),
        ("sum", True, False),
        ("sum", False, True),
    )
    if clipping == "flat" or mode != "ghost"
]


@pytest.mark.parametrize("mode,clipping,reduction,poisson,managed", UNWRAPPED)
def test_without_wrapping(mode, clipping, reduction, poisson, managed):
    training = Watched(
        wrap_model=False,
        grad_sample_mode=mode,
        clipping=clipping,
        loss_reduction=reduction,
        poisson_sampling=poisson,
        **CLIPPINGS[clipping],
    )
    for _ in training.memory_managed(5) if managed else [0]:
        training.train(2)
    assert len(training.check().recorder.updates) == 4


def fails_alike(error, match, train):
    """What Opacus cannot do fails in the same way."""
    messages = []
    for engine in (opacus.PrivacyEngine(accountant="rdp"), None):
        with pytest.raises(error, match=match) as caught:
            train(engine)
        messages.append(str(caught.value)[:60])
    assert messages[0] == messages[1]


@pytest.mark.parametrize("managed", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_expanded_weights_clipped_by_layer(reduction, managed):
    training = Watched(
        grad_sample_mode="ew",
        clipping="per_layer",
        loss_reduction=reduction,
        poisson_sampling=False,  # Opacus fails on an empty batch
        **CLIPPINGS["per_layer"],
    )
    for _ in training.memory_managed(5) if managed else [0]:
        training.train(2)
    training.check()


def test_expanded_weights_cannot_be_clipped_adaptively():
    def train(engine):
        options = {"clipping": "adaptive", "poisson_sampling": False}
        options |= {"grad_sample_mode": "ew", **CLIPPINGS["adaptive"]}
        Training(engine=engine, batch_size=12, **options).train(1)

    fails_alike(RuntimeError, "view size is not compatible", train)


@pytest.mark.parametrize("clipping", ["per_layer", "adaptive"])
def test_ghost_clipping_is_flat(clipping):
    def train(engine):
        options = {"grad_sample_mode": "ghost", "clipping": clipping}
        Training(engine=engine, **options, **CLIPPINGS[clipping])

    fails_alike(ValueError, "Unsupported combination", train)


# --------------------------------------------------------------------- frozen weights
@pytest.mark.parametrize("wrap_model", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", ["conv", "norm", "out"])
def test_frozen_weights(mode, frozen, wrap_model):
    if mode == "ew" and not wrap_model:
        pytest.skip("Opacus wraps the model for expanded weights")
    net = Net()
    getattr(net, frozen).requires_grad_(False)
    training = Watched(
        module=net,
        grad_sample_mode=mode,
        wrap_model=wrap_model,
        poisson_sampling=mode != "ew",
    )
    training.train(1).check()


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
def test_an_optimizer_of_some_of_the_weights(mode):
    torch.manual_seed(0)
    net, engine = Net(), PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.out.parameters(), lr=0.0),
        data_loader=DataLoader(data(), batch_size=24),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    for x, y in loader:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    fresh = Net()
    fresh.load_state_dict(net.state_dict())
    for part in (fresh.conv, fresh.norm):
        part.requires_grad_(False)
    truth = one_at_a_time(fresh, *data().tensors)
    np.testing.assert_allclose(engine.ledger.grad_norms[0], truth, rtol=1e-5)


# ------------------------------------- accumulation, skipped steps, closures, emptiness
@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_accumulated_batches(mode, clipping):
    training = Watched(
        grad_sample_mode=mode,
        clipping=clipping,
        batch_size=6,
        poisson_sampling=False,
        **CLIPPINGS[clipping],
    )
    for _ in range(2):
        for i, (x, y) in enumerate(training.loader):
            if i % 2 == 0:
                training.optimizer.zero_grad()
            training.note(x, y)
            training.criterion(training.model(x), y).backward()
            if i % 2:
                training.optimizer.step()
    # per-example gradients of several passes come in the order of the passes
    updates = training.check().recorder.updates
    assert [u["sample_rate"] for u in updates] == [0.5] * 4


def test_expanded_weights_take_one_batch_at_a_time():
    def train(engine):
        training = Training(
            engine=engine, grad_sample_mode="ew", poisson_sampling=False
        )
        for x, y in training.loader:
            training.criterion(training.model(x), y).backward()

    fails_alike(RuntimeError, "accumulates the gradients", train)


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_steps_skipped_by_hand(mode, poisson):
    if mode == "ew" and poisson:
        pytest.skip("Opacus's expanded weights fail on empty Poisson batches")
    training = Watched(grad_sample_mode=mode, poisson_sampling=poisson, batch_size=6)
    for _ in range(3):
        for i, (x, y) in enumerate(training.loader):
            training.optimizer.signal_skip_step(do_skip=i % 2 == 0)
            training.note(x, y)
            training.batch(x, y)
    assert len(training.recorder.updates) == 6
    # two Poisson batches in one update: somebody is drawn twice
    if not poisson:
        training.check()
    np.testing.assert_allclose(
        [norm for _, norm in training.recorder.observed], training.truth, rtol=1e-5
    )


@pytest.mark.parametrize("mode", MODES)
def test_closures(mode):
    training = Watched(grad_sample_mode=mode, poisson_sampling=False)
    for _ in range(2):
        for x, y in training.loader:

            def closure(x=x, y=y):
                training.optimizer.zero_grad()
                training.note(x, y)
                loss = training.criterion(training.model(x), y)
                loss.backward()
                return loss

            training.optimizer.step(closure)
    assert len(training.check().recorder.updates) == 4


class Plain(nn.Module):
    """Layers that Opacus's functorch mode can give an empty batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Linear(12, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.conv(x.flatten(1))))


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("mode", MODES)
def test_empty_batches(mode, clipping):
    def train(engine=None):
        training = Training(
            engine=engine,
            module=Plain(),
            grad_sample_mode=mode,
            clipping=clipping,
            batch_size=1,
            **{**CLIPPINGS[clipping], "max_grad_norm": limit},
        )
        return training.train(1)

    limit = [0.3] * 4 if clipping == "per_layer" else 0.7
    try:
        train(opacus.PrivacyEngine())
    except Exception as theirs:  # whatever Opacus cannot do fails alike
        with pytest.raises(type(theirs)) as ours:
            train()
        assert str(ours.value) == str(theirs)
        return
    training = train()
    assert len(training.recorder.updates) == 24
    counts = training.engine.attribution
    assert 0 < len(training.recorder.observed) == counts["by_storage"] < 45
    assert training.engine.ledger.mechanism.num_steps == 24


# -------------------------------------------------------------------------- schedulers
SCHEDULES = {
    "step noise": (lambda o: StepNoise(o, step_size=1, gamma=0.5), 1.0, True),
    "lambda noise": (lambda o: LambdaNoise(o, noise_lambda=_half), 1.0, True),
    "exponential noise": (lambda o: ExponentialNoise(o, gamma=0.5), 1.0, True),
    "step clip": (lambda o: StepGradClip(o, step_size=1, gamma=0.5), 0.5, False),
    "lambda clip": (lambda o: LambdaGradClip(o, scheduler_function=_half), 0.5, False),
}


def _half(epoch):
    return 0.5**epoch


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name, mode):
    make, clip, reaches_ghost = SCHEDULES[name]
    if mode == "ghost" and not reaches_ghost:
        pytest.skip("refused, with its own test")
    training = Watched(grad_sample_mode=mode, poisson_sampling=False)
    schedule = make(training.optimizer)
    for _ in range(3):
        training.train(1)
        schedule.step()
    used = [
        (u["noise_std"], u["max_grad_norm"]) for u in training.check().recorder.updates
    ]
    expected = [(0.5**k, clip**k) for k in (0, 0, 1, 1, 2, 2)]
    np.testing.assert_allclose(used, expected, rtol=1e-12)
    mechanism = training.engine.ledger.mechanism
    np.testing.assert_allclose(mechanism.noise_std, [1, 0.5, 0.25])


# ------------------------------------------------------------------- a target epsilon
@pytest.mark.parametrize("mode", MODES)
def test_a_target_epsilon(mode):
    torch.manual_seed(0)
    net, engine = Net(), PrivacyEngine(accountant="gdp")  # quick
    model, optimizer, *middle, loader = engine.make_private_with_epsilon(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=12),
        criterion=nn.CrossEntropyLoss(),
        target_epsilon=6.0,
        target_delta=1e-3,
        epsilon_tolerance=0.5,
        epochs=1,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    criterion = middle[0] if middle else nn.functional.cross_entropy
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    assert engine.ledger.mechanism.noise_std == optimizer.noise_multiplier
    assert engine.get_epsilon(1e-3) == pytest.approx(6.0, abs=0.5)
    assert 0 < engine.epsilons(1e-3).max() < 12
