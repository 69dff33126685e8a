"""Per-layer clipping: ``max_grad_norms`` clips, ``max_grad_norm`` scales the noise."""

import math
import warnings

import numpy as np
import pytest
from opacus.accountants import RDPAccountant
from opacus.schedulers import ExponentialGradClip

from opacus_pi.accounting import RenyiFilter
from opacus_pi.integration import PrivacyEngine
from tests.private_training import Log, Training

DELTA = 1e-5
TOO_SMALL = "get_epsilon returns Opacus's number, which is too small"
NUM_PARAMETERS = 6


def prepared(**options):
    """A run with per-layer clipping to a joint norm of 1."""
    limits = [NUM_PARAMETERS**-0.5] * NUM_PARAMETERS
    return Training(
        clipping="per_layer", max_grad_norm=limits, noise_multiplier=2.0, **options
    )


def noise_only(training):
    """Step Opacus's scheduler after each epoch: it halves ``max_grad_norm``."""
    scheduler = ExponentialGradClip(training.optimizer, gamma=0.5)
    return lambda: scheduler.step()


def one_entry(training):
    def change():
        training.optimizer.max_grad_norms[2] *= 3.0

    return change


def another_list(training):
    def change():
        limits = training.optimizer.max_grad_norms
        training.optimizer.max_grad_norms = [2 * c for c in limits]

    return change


def smaller(training):
    def change():
        limits = training.optimizer.max_grad_norms
        training.optimizer.max_grad_norms = [c / 2 for c in limits]

    return change


def both(training):
    def change():
        optimizer = training.optimizer
        optimizer.max_grad_norm *= 0.7
        optimizer.max_grad_norms = [0.7 * c for c in optimizer.max_grad_norms]

    return change


def trained(changing, **options):
    """Train three epochs; return the run, its clip norms and the true accountant."""
    training = prepared(**options)
    change, clips, true = changing(training), [], RDPAccountant()
    optimizer = training.optimizer
    for _ in range(3):
        for x, y in training.loader:
            training.batch(x, y)
            clips.append(math.hypot(*optimizer.max_grad_norms))
            noise_std = optimizer.noise_multiplier * optimizer.max_grad_norm
            true.step(
                noise_multiplier=noise_std / clips[-1],
                sample_rate=1 / len(training.loader),
            )
        change()
    return training, clips, true.get_epsilon(DELTA)


@pytest.mark.parametrize("changing", [noise_only, one_entry, another_list, smaller])
def test_updates_are_charged_for_the_norms_that_clip(changing):
    training, clips, true = trained(changing)
    recorded = [u["max_grad_norm"] for u in training.recorder.updates]
    np.testing.assert_allclose(recorded, clips, rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opacus = training.engine.get_epsilon(DELTA)
        largest = training.engine.epsilons(DELTA).max()
    if changing is smaller:
        assert true < opacus and largest <= true * 1.01
    else:
        assert opacus < 0.8 * true
        assert largest > opacus
        with pytest.warns(UserWarning, match=TOO_SMALL) as found:
            training.engine.get_epsilon(DELTA)
        assert "by the same factor" in str(found[0].message)


@pytest.mark.parametrize("changing", [both, lambda training: lambda: None])
def test_norms_that_change_with_the_noise_are_charged_as_by_opacus(changing):
    training, _, true = trained(changing)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=TOO_SMALL)
        assert math.isclose(training.engine.get_epsilon(DELTA), true, rel_tol=1e-6)


def test_budgets_are_charged_for_the_norms_that_clip():
    budgets = RenyiFilter(1e6, order=8)
    recorder = Log()
    engine = PrivacyEngine(recorder=recorder, renyi_filter=budgets)
    training = prepared(engine=engine, recorder=recorder)
    training.train(1)
    before = budgets.spent.max()
    training.optimizer.max_grad_norms = [50.0] * NUM_PARAMETERS
    training.train(1)
    assert budgets.spent.max() > 2.1 * before
