"""Checkpoints go both ways between Opacus and us: every mode, every accountant."""

import io

import opacus
import pytest
import torch

from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import AccountingError
from tests.private_training import ADAPTIVE, Training

pytestmark = pytest.mark.filterwarnings(
    "ignore:This run has no ledger",
    "ignore:PrivacyEngine detected new dataset",
    "ignore:GDP accounting",
    "ignore:Full backward hook",
)
CASES = {
    **{mode: {"grad_sample_mode": mode} for mode in ("hooks", "functorch", "ghost")},
    "ew": {"grad_sample_mode": "ew", "poisson_sampling": False},
    "per_layer": {"clipping": "per_layer", "max_grad_norm": [0.3] * 6},
    "adaptive": {"clipping": "adaptive", **ADAPTIVE},
    **{name: {"accountant": name} for name in ("prv", "gdp", "per_instance")},
}


def prepared(library, *, accountant="rdp", **options):
    """A training prepared by one of the two engines."""
    engine = library(accountant=accountant)
    return Training(engine=engine, batch_size=12, **options)


def saved(training):
    file = io.BytesIO()
    training.engine.save_checkpoint(
        path=file, module=training.model, optimizer=training.optimizer
    )
    return file


def resumed(library, file, **options):
    """A fresh training that goes on from a checkpoint for an epoch."""
    file.seek(0)
    training = prepared(library, **options)
    training.engine.load_checkpoint(
        path=file, module=training.model, optimizer=training.optimizer
    )
    torch.manual_seed(5)
    return training.train(1)


def assert_same(one, other):
    for a, b in zip(one.net.parameters(), other.net.parameters(), strict=True):
        assert torch.equal(a, b)
    pairs = [t.engine.accountant.state_dict() for t in (one, other)]
    assert pairs[0]["history"] == pairs[1]["history"]
    states = [t.optimizer.state_dict()["state"] for t in (one, other)]
    for key, value in states[0].items():
        assert torch.equal(value["momentum_buffer"], states[1][key]["momentum_buffer"])


@pytest.mark.parametrize("case", CASES)
def test_both_engines_go_on_alike_from_either_checkpoint(case):
    options = CASES[case]
    ours, theirs = (
        saved(prepared(library, **options).train(1))
        for library in (PrivacyEngine, opacus.PrivacyEngine)
    )
    wanted = resumed(opacus.PrivacyEngine, theirs, **options)
    for library, file in (
        (opacus.PrivacyEngine, ours),
        (PrivacyEngine, ours),
        (PrivacyEngine, theirs),
    ):
        assert_same(resumed(library, file, **options), wanted)


def test_what_opacus_trained_before_is_not_on_record():
    theirs = saved(prepared(opacus.PrivacyEngine).train(1))
    training = resumed(PrivacyEngine, theirs)
    assert training.engine.recorder.num_steps == 2
    with pytest.raises(AccountingError, match="2 were counted by the accountant"):
        training.engine.epsilons(1e-3)


def test_what_we_trained_before_is_on_record():
    ours = saved(prepared(PrivacyEngine).train(1))
    training = resumed(PrivacyEngine, ours)
    assert training.engine.ledger.mechanism.num_steps == 4
    assert training.engine.privacy_losses(3).shape == (24,)
