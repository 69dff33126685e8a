"""Under autocast and loss scaling, the recorded norms are those that Opacus clips."""

import numpy as np
import opacus
import pytest
import torch
from torch import nn

from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import AccountingError
from tests.private_training import ADAPTIVE, Training, one_at_a_time

pytestmark = pytest.mark.filterwarnings(
    "ignore:This run has no ledger",
    "ignore:PrivacyEngine detected new dataset",
    "ignore:Full backward hook",
)

HALF = (torch.bfloat16, torch.float16)
MODES = ("hooks", "functorch", "ghost")
CLIPPINGS = {
    "flat": {"max_grad_norm": 0.7},
    "per_layer": {"max_grad_norm": [0.3] * 6},
    "adaptive": {"max_grad_norm": 0.7, **ADAPTIVE},
}


class Mixed(Training):
    """A training under autocast, and the norms by a loop in single precision."""

    def __init__(self, *, dtype=torch.bfloat16, scale=1.0, scaler=None, **options):
        defaults = {"batch_size": 12, "lr": 0.05, "poisson_sampling": False}
        super().__init__(**{**defaults, **options})
        self.dtype, self.scale, self.scaler = dtype, scale, scaler
        self.single, self.gradients = [], []

    def batch(self, x, y):
        self.optimizer.zero_grad()
        self.single += one_at_a_time(self.plain_copy(), x, y)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            loss = self.criterion(self.forward(x), y)
        if self.scaler is None:
            (loss * self.scale).backward()
            self.note_gradients()
            self.optimizer.step()
            return
        self.scaler.scale(loss).backward()
        self.note_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def note_gradients(self):
        """What the optimizer is about to clip, in double precision."""
        held = [p.grad_sample for p in self.optimizer.params]
        if held[0] is not None:
            rows = torch.cat([g.double().flatten(1) for g in held], dim=1)
            self.gradients += rows.norm(dim=1).tolist()
        else:  # ghost clipping: the norms that it clipped by
            hooks = self.engine._run.update().hooks
            self.gradients += hooks.per_sample_gradient_norms.tolist()

    def norms(self):
        return [norm for _, norm in self.recorder.observed]


WHOLE = [("hooks", "flat"), ("ghost", "flat"), *(("functorch", c) for c in CLIPPINGS)]


@pytest.mark.parametrize("wrap_model", [True, False])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mode,clipping", WHOLE)
def test_autocast(mode, clipping, dtype, wrap_model):
    training = Mixed(
        dtype=dtype,
        grad_sample_mode=mode,
        clipping=clipping,
        wrap_model=wrap_model,
        **CLIPPINGS[clipping],
    ).train(2)
    np.testing.assert_allclose(training.norms(), training.gradients, rtol=1e-5)
    np.testing.assert_allclose(training.norms(), training.single, rtol=0.05)
    assert np.abs(np.divide(training.norms(), training.single) - 1).max() > 1e-5
    assert training.engine.attribution["by_storage"] == 48
    assert training.engine.privacy_losses(8).shape == (24,)


@pytest.mark.parametrize("clipping", ["per_layer", "adaptive"])
def test_hooks_under_autocast_clip_flat_only(clipping):
    options = {"clipping": clipping, **CLIPPINGS[clipping]}
    for engine in (opacus.PrivacyEngine(), PrivacyEngine()):
        training = Mixed(engine=engine, grad_sample_mode="hooks", **options)
        with pytest.raises(RuntimeError, match="gradient with dtype"):
            training.train(1)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mode", (*MODES, "ew"))
def test_a_loss_scaled_by_hand_has_scaled_norms(mode, reduction, autocast):
    if mode == "ew" and autocast:
        pytest.skip("torch's expanded weights do not run under autocast")
    training = Mixed(
        dtype=torch.bfloat16 if autocast else None,
        scale=0.25,
        lr=0.0,
        grad_sample_mode=mode,
        loss_reduction=reduction,
    )
    training.train(1)
    tolerance = 0.05 if autocast else 1e-5
    np.testing.assert_allclose(training.norms(), training.gradients, rtol=1e-5)
    np.testing.assert_allclose(
        training.norms(), 0.25 * np.array(training.single), rtol=tolerance
    )


def test_expanded_weights_do_not_run_under_autocast():
    for engine in (opacus.PrivacyEngine(), PrivacyEngine()):
        training = Training(
            engine=engine, grad_sample_mode="ew", poisson_sampling=False
        )
        x, y = next(iter(training.loader))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(training.model(x), y)
        with pytest.raises(RuntimeError, match="dtype"):
            loss.backward()


# ------------------------------------------------------------------------- GradScaler
@pytest.mark.parametrize("mode,clipping", [one for one in WHOLE if one[0] != "ghost"])
def test_a_gradient_scaler_scales_the_norms(mode, clipping):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    training = Mixed(
        scaler=scaler,
        grad_sample_mode=mode,
        clipping=clipping,
        lr=0.0,
        **CLIPPINGS[clipping],
    ).train(2)
    np.testing.assert_allclose(training.norms(), training.gradients, rtol=1e-5)
    scaled = 1024 * np.array(training.single)
    np.testing.assert_allclose(training.norms(), scaled, rtol=0.05)
    assert training.engine.ledger.mechanism.num_steps == 4


def test_ghost_clipping_and_a_gradient_scaler():
    scaler = torch.amp.GradScaler("cpu")
    for engine in (opacus.PrivacyEngine(), PrivacyEngine()):
        training = Mixed(engine=engine, scaler=scaler, grad_sample_mode="ghost")
        with pytest.raises(ValueError, match="outputs must be a Tensor"):
            training.train(1)


class Overflowing(nn.Module):
    """Gradients that are infinite while the scaler's scale is too large."""

    def __init__(self, scaler):
        super().__init__()
        self.out, self.scaler, self.limit = nn.Linear(12, 3), scaler, 1e9

    def forward(self, x):
        out = self.out(x.flatten(1))
        if self.scaler.get_scale() > self.limit and out.requires_grad:
            out.register_hook(lambda gradient: gradient * float("inf"))
        return out


def test_updates_that_a_gradient_scaler_skips_are_not_recorded():
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    net = Overflowing(scaler)
    net.limit = 2048.0
    training = Training(module=net, batch_size=6, poisson_sampling=False)
    for x, y in training.loader:
        training.optimizer.zero_grad()
        scaler.scale(training.criterion(training.model(x), y)).backward()
        scaler.step(training.optimizer)
        scaler.update()
    assert len(training.recorder.updates) == 3  # the first one was left out
    assert len(training.recorder.observed) == 18
    assert training.engine.ledger.mechanism.num_steps == 3
    assert training.engine.accountant.history == [(1.0, 0.25, 3)]


def test_an_update_with_an_infinite_gradient_refuses_the_record():
    training = Mixed(dtype=torch.float16, scale=1e38, grad_sample_mode="hooks")
    training.train(1)
    with pytest.raises(AccountingError, match="not finite"):
        _ = training.engine.ledger


# ------------------------------------------------------------ what Opacus makes of it
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_training_is_opacus_own(mode, scaled):
    if mode == "ghost" and scaled:
        pytest.skip("torch refuses it")

    def train(engine):
        scaler = torch.amp.GradScaler("cpu") if scaled else None
        training = Mixed(engine=engine, scaler=scaler, grad_sample_mode=mode)
        training.note_gradients = lambda: None
        return training.train(2)

    runs = train(opacus.PrivacyEngine(accountant="rdp")), train(None)
    for one, other in zip(*(run.net.parameters() for run in runs), strict=True):
        assert torch.equal(one, other)
    assert runs[0].engine.accountant.history == runs[1].engine.accountant.history


def entered(mode, dtype, count=24):
    """Norms of what is added to the sum if every example is an update of its own."""
    training = Mixed(
        dtype=dtype, grad_sample_mode=mode, batch_size=1, noise_multiplier=0.0, lr=0.0
    )
    norms = []
    training.optimizer.attach_step_hook(
        lambda optimizer: norms.append(
            torch.cat([p.summed_grad.double().flatten() for p in optimizer.params])
            .norm()
            .item()
        )
    )
    training.train(1)
    clipped = np.array(training.norms()) > 1.0
    assert clipped.sum() > count / 2
    return np.array(norms)[clipped]


@pytest.mark.parametrize("mode", MODES)
def test_the_clip_norm_holds_up_to_rounding(mode):
    exact, half = (entered(mode, dtype) for dtype in (None, torch.bfloat16))
    assert exact.max() < 1 + 1e-5
    assert half.max() < 1.01
    if mode != "functorch":  # it has gradients in single precision
        assert half.max() > 1 + 1e-4


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_model_in_half_precision(mode, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    training = Training(
        module=net.to(dtype), grad_sample_mode=mode, poisson_sampling=False
    )
    truth = []
    for x, y in training.loader:
        training.optimizer.zero_grad()
        loss = training.criterion(training.model(x.to(dtype)), y)
        loss.backward()
        held = [p.grad_sample for p in training.optimizer.params]
        if held[0] is not None:
            rows = torch.cat([g.double().flatten(1) for g in held], dim=1)
            truth += rows.norm(dim=1).tolist()
        else:
            truth += (
                training.engine._run.update().hooks.per_sample_gradient_norms.tolist()
            )
        training.optimizer.step()
    seen = [norm for _, norm in training.recorder.observed]
    np.testing.assert_allclose(seen, truth, rtol=1e-5)
    assert len(seen) == 24 - training.engine.attribution["unattributed"] > 0
