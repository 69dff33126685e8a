"""The kind of generator that the noise was drawn from: recorded, saved, assumed."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import GradNormLedger, PrivacyEngine, Recorder, Unlearner
from opacus_pi.accounting import privacy_statement
from opacus_pi.accounting.training_bound import unpredictable_noise
from opacus_pi.ledger.noise_generator import NOISE_GENERATORS, weakest
from tests.recording.reporting import begun, report

CRITERION = nn.CrossEntropyLoss()


def trained(*, secure=False, noise_generator=None):
    """An engine that made a few updates by DP-SGD."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    data = TensorDataset(torch.randn(20, 4), torch.arange(20) % 3)
    engine = PrivacyEngine(accountant="rdp")
    if secure:  # Opacus needs torchcsprng for it; here a seeded generator stands in
        engine.secure_mode, engine.secure_rng = True, torch.Generator().manual_seed(1)
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=5),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        noise_generator=noise_generator,
    )
    for x, y in loader:
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        optimizer.step()
    engine.kept = model, optimizer, loader
    return engine


@pytest.mark.parametrize(
    "options, kind, who",
    [
        ({}, "global", "declared"),
        ({"noise_generator": torch.Generator()}, "passed", "declared"),
        ({"secure": True}, "secure", "observed"),
    ],
)
def test_a_guarantee_says_which_generator_drew_the_noise(tmp_path, options, kind, who):
    engine = trained(**options)
    assert engine.ledger.noise_generator == kind
    engine.ledger.save(tmp_path / "run")
    read = GradNormLedger.load(tmp_path / "run")
    assert read.noise_generator == kind
    (part,) = GradNormLedger.load_chunks(tmp_path / "run")
    assert part.noise_generator == kind
    of_file = Unlearner(engine.module, criterion=CRITERION, ledger=read)
    for claim in (
        Unlearner(engine, criterion=CRITERION).plan([3]).guarantee,
        of_file.plan([3, 4]).guarantee,
        privacy_statement(read, [3], 1e-5),
    ):
        (noise,) = (
            a
            for a in claim.assumptions
            if a.statement == "the noise cannot be predicted"
        )
        assert noise.met and noise.established == who
        assert NOISE_GENERATORS[kind] in noise.evidence


def test_one_update_from_a_weaker_generator_is_enough():
    engine = trained(secure=True)
    model, optimizer, loader = engine.kept
    assert engine.ledger.noise_generator == "secure"
    optimizer.generator = None
    x, y = next(iter(loader))
    optimizer.zero_grad()
    CRITERION(model(x), y).backward()
    optimizer.step()
    assert engine.ledger.noise_generator == "global"


def recorded(*kinds, recorder=None):
    recorder = recorder or begun()
    for kind in kinds:
        report(recorder, [(0, 1.0)], noise_generator=kind)
    return recorder


@pytest.mark.parametrize(
    "kinds, found",
    [
        (("secure", "secure"), "secure"),
        (("secure", "passed", "secure"), "passed"),
        (("passed", "global", "passed"), "global"),
        (("secure", None, "secure"), None),
        ((None, "secure"), None),
    ],
)
def test_a_run_has_the_weakest_kind_of_its_updates(kinds, found):
    assert recorded(*kinds).ledger.noise_generator == found == weakest(*kinds)


@pytest.mark.parametrize("is_old", [False, True])
def test_a_resumed_run_knows_the_kind_of_its_earlier_updates(is_old):
    state = recorded("secure").state_dict()
    if is_old:
        del state["noise_generator"]
    resumed = Recorder(every=1)
    resumed.load_state_dict(state)
    recorded("secure", recorder=begun(resumed))
    assert resumed.ledger.noise_generator == (None if is_old else "secure")


@pytest.mark.parametrize("kind", ["mersenne twister", 3, ""])
def test_a_kind_that_is_not_known_is_refused(kind):
    ledger = recorded("secure").ledger
    for call in (
        lambda: replace(ledger, noise_generator=kind),
        lambda: recorded(kind),
    ):
        with pytest.raises(ValueError, match="noise_generator must be one of global"):
            call()


def test_several_runs_have_the_weakest_kind_and_new_noise_is_not_secure():
    secure, seeded = recorded("secure").ledger, recorded("passed").ledger
    assert not unpredictable_noise([secure, secure]).is_declared
    assert unpredictable_noise([secure, seeded]).is_declared
    again = unpredictable_noise([secure], has_more_noise=True)
    assert again.is_declared and "made again" in again.evidence
    (unknown,) = (unpredictable_noise([replace(secure, noise_generator=None)]),)
    assert unknown.is_declared and "does not say" in unknown.evidence
