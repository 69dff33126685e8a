"""Each mode records on an accelerator what it records on the CPU.

Both compute in float32, in other orders: weights agree to 1e-5, norms to a relative
1e-4.
"""

import io

import numpy as np
import opacus
import pytest
import torch

from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import Recorder
from tests.device.simulated import NAME
from tests.device.trainings import (
    MODES,
    DropoutNet,
    train_monitored,
    train_privately,
)

_SOMETIMES_NAN = {"equal_nan": True}


def assert_same_weights(one, other, atol=1e-5):
    for a, b in zip(one.weights, other.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def assert_same_ledgers(one, other):
    ours, theirs = one.engine.ledger, other.engine.ledger
    assert ours.mechanism == theirs.mechanism
    np.testing.assert_array_equal(ours.steps, theirs.steps)
    np.testing.assert_allclose(
        ours.grad_norms, theirs.grad_norms, rtol=1e-4, **_SOMETIMES_NAN
    )
    np.testing.assert_allclose(
        one.engine.privacy_losses(4), other.engine.privacy_losses(4), rtol=1e-3
    )


@pytest.mark.parametrize("is_there", [False, True], ids=["copied", "on the device"])
@pytest.mark.parametrize("mode", MODES)
def test_private_training_is_that_of_the_cpu(mode, is_there):
    here = train_privately("cpu", mode)
    there = train_privately(NAME, mode, is_there=is_there)
    assert_same_weights(there, here)
    assert_same_ledgers(there, here)
    counts = there.engine.attribution
    evidence = "by_storage" if is_there else "by_content"
    assert counts[evidence] == 72
    assert not counts["unattributed"]


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_training_is_bit_identical_to_opacus(mode):
    """Dropout and noise draw from the device's own generator, which no probe moves."""
    options = {"mode": mode, "net": DropoutNet, "noise_generator": None}
    ours = train_privately(NAME, **options)
    theirs = train_privately(NAME, engine=opacus.PrivacyEngine(), **options)
    for a, b in zip(ours.weights, theirs.weights, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
def test_swept_rows_are_those_of_the_cpu(mode):
    def engine():
        criterion = torch.nn.CrossEntropyLoss()
        return PrivacyEngine(recorder=Recorder("swept", criterion=criterion))

    here = train_privately("cpu", mode, engine=engine())
    there = train_privately(NAME, mode, engine=engine())
    assert_same_ledgers(there, here)
    assert there.engine.ledger.source == "swept"


@pytest.mark.parametrize("noise_std", [0.0, 0.1])
def test_monitored_training_is_that_of_the_cpu(noise_std):
    here = train_monitored("cpu", noise_std=noise_std)
    there = train_monitored(NAME, noise_std=noise_std)
    assert_same_weights(there, here)
    ours, theirs = there.engine.ledger, here.engine.ledger
    for name in ("grad_norms", "confidences", "errors", "correct"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_the_audit_compares_on_the_device():
    there = train_privately(NAME, epochs=1)
    audit = there.engine.audit(torch.nn.CrossEntropyLoss())
    np.testing.assert_allclose(audit.recorded, audit.expected, rtol=1e-4)


def test_random_states_of_the_device_are_restored():
    there = train_privately(NAME, epochs=1, noise_generator=None)
    file = io.BytesIO()
    torch.manual_seed(3)
    there.engine.save_checkpoint(
        path=file, module=there.model, optimizer=there.optimizer
    )
    drawn = torch.rand(4, device=NAME).cpu()
    file.seek(0)
    there.engine.load_checkpoint(
        path=file, module=there.model, optimizer=there.optimizer, restore_rng=True
    )
    assert torch.equal(torch.rand(4, device=NAME).cpu(), drawn)
