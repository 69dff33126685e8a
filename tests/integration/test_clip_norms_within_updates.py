"""Schedulers of the clip norm that are stepped inside an update."""

import math
import warnings

import numpy as np
import pytest
from opacus.accountants import RDPAccountant
from opacus.schedulers import ExponentialGradClip
from opacus.utils.batch_memory_manager import BatchMemoryManager

from opacus_pi import PrivacyEngine, accounting
from tests.private_training import Training

DELTA = 1e-5
TOO_SMALL = "get_epsilon returns Opacus's number, which is too small"


def _trained(gamma, accountant="rdp", **options):
    """Train with a scheduler that is stepped after each physical batch."""
    training = Training(
        accountant=accountant, batch_size=12, noise_multiplier=1.5, **options
    )
    scheduler = ExponentialGradClip(training.optimizer, gamma=gamma)
    true, clips, optimizer = RDPAccountant(), [], training.optimizer
    for _ in range(3):
        with BatchMemoryManager(
            data_loader=training.loader, max_physical_batch_size=4, optimizer=optimizer
        ) as loader:
            for x, y in loader:
                clips.append(optimizer.max_grad_norm)
                counted = training.recorder.num_steps
                training.batch(x, y)
                if training.recorder.num_steps > counted:
                    noise_std = optimizer.noise_multiplier * optimizer.max_grad_norm
                    true.step(noise_multiplier=noise_std / max(clips), sample_rate=0.5)
                    clips = []
                scheduler.step()
    return training, true.get_epsilon(DELTA)


@pytest.mark.parametrize("accountant", ["rdp", "per_instance"])
@pytest.mark.parametrize("mode", ["hooks", "fast"])
def test_epsilons_are_not_cut_to_a_number_that_is_too_small(accountant, mode):
    training, true = _trained(0.8, accountant, grad_sample_mode=mode)
    engine = training.engine
    with pytest.warns(UserWarning, match=TOO_SMALL):
        opacus = engine.get_epsilon(DELTA)
    assert opacus < 0.8 * true
    expected = accounting.epsilons(engine.ledger, DELTA)
    np.testing.assert_allclose(engine.epsilons(DELTA), expected)
    assert expected.max() > opacus
    if accountant == "per_instance":
        np.testing.assert_allclose(engine.accountant.epsilons(DELTA), expected)


def test_a_resumed_run_remembers_it(tmp_path):
    training, _ = _trained(0.8)
    path = tmp_path / "checkpoint.pt"
    training.engine.save_checkpoint(
        path=path, module=training.model, optimizer=training.optimizer
    )
    again = Training(batch_size=12, noise_multiplier=1.5)
    again.engine.load_checkpoint(
        path=path, module=again.model, optimizer=again.optimizer
    )
    with pytest.warns(UserWarning, match=TOO_SMALL):
        again.engine.get_epsilon(DELTA)


def test_growing_norms_and_steps_after_updates_are_charged_in_full():
    training, true = _trained(1.1)
    later = Training(noise_multiplier=1.5)
    scheduler = ExponentialGradClip(later.optimizer, gamma=0.8)
    for _ in range(3):
        later.train(1)
        scheduler.step()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=TOO_SMALL)
        assert math.isclose(training.engine.get_epsilon(DELTA), true, rel_tol=1e-6)
        assert later.engine.epsilons(DELTA).max() <= later.engine.get_epsilon(DELTA)
    assert isinstance(later.engine, PrivacyEngine)
