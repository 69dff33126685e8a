"""Runs that a recorder gives no ledger of, and bad input to it."""

import math
from types import SimpleNamespace

import pytest
import torch

from opacus_pi import PrivacyEngine
from opacus_pi.recording import AccountingError, Checkpoints, Recorder
from tests.recording.reporting import INF, N, begun, report, sweep_of

pytestmark = pytest.mark.filterwarnings("ignore:This run has no ledger")


# --------------------------------------------------------------------------- refusals
def test_a_refusal_keeps_its_first_reason_and_stops_sweeping():
    calls = []
    recorder = begun(Recorder("swept", every=[1, 2]), sweep=sweep_of(calls))
    report(recorder)
    with pytest.warns(UserWarning, match="no longer has a ledger. first") as warned:
        recorder.refuse("first")
        recorder.refuse("second")
    assert len(warned) == 1
    report(recorder)
    assert recorder.num_steps == 2 and len(calls) == 1
    with pytest.raises(AccountingError, match="^first$"):
        _ = recorder.ledger


def test_a_strict_recorder_raises_at_once():
    recorder = begun(Recorder(strict=True))
    with pytest.raises(AccountingError, match="^why$"):
        recorder.refuse("why")


@pytest.mark.parametrize("norm", [math.nan, INF, 1e300])
def test_a_diverged_run_trains_on_without_a_ledger(norm):
    recorder = begun()
    recorder.observe(torch.tensor([0]), torch.tensor([norm], dtype=torch.float64))
    report(recorder)
    report(recorder, [(0, 1.0)])
    with pytest.raises(
        AccountingError, match="not finite at or before update 1: .*diverged"
    ):
        _ = recorder.ledger


def test_a_diverged_sweep_is_refused():
    bad = SimpleNamespace(grad_norms=torch.full((N,), math.nan))
    recorder = begun(Recorder("swept", every=[1]), sweep=lambda: bad)
    report(recorder)
    with pytest.raises(AccountingError, match="not finite at or before update 1"):
        _ = recorder.ledger


def test_nothing_recorded_yet():
    with pytest.raises(AccountingError, match="Call make_private, make_monitored or"):
        _ = Recorder().ledger
    with pytest.raises(AccountingError, match="because no update was made"):
        _ = begun().ledger
    recorder = begun(Recorder("swept"), sweep=sweep_of([]))
    report(recorder)
    with pytest.raises(
        AccountingError, match="far: 1.. Continue the training, or record"
    ):
        _ = recorder.ledger


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Recorder("sweeping"), "mode must .*got 'sweeping'"),
        (lambda: Recorder(every=0), "every must be above 0, got 0.0"),
        (lambda: Recorder(every=INF), "every must be finite and at least 0, got inf"),
        (lambda: Recorder(every=[]), "every must .* increasing"),
        (
            lambda: Recorder(every=[0, 1]),
            'every must .* above 0 if mode is "observed"',
        ),
        (lambda: Recorder("swept", every=[-1, 1]), "every must .* increasing"),
        (lambda: Recorder(every=[2, 2]), "every must .* increasing"),
        (lambda: Recorder(every=[1.5]), "every must .* whole numbers"),
        (lambda: Recorder(batch_size=0), "batch_size must be above 0, got 0.0"),
        (
            lambda: Recorder.evenly_spaced(0, num_steps=9),
            "num_checkpoints must be in .*, got 0.0",
        ),
        (
            lambda: Recorder.evenly_spaced(10, num_steps=9),
            "num_checkpoints must be in .*, got 10.0",
        ),
        (lambda: begun(sample_rate=1.5), "sample_rate must be in .*, got 1.5"),
        (lambda: begun(sample_rate=0.0), "sample_rate must be above 0, got 0.0"),
        (lambda: begun(num_examples=0), "num_examples must be above 0, got 0.0"),
        (lambda: begun(sampling="shuffled"), "sampling must .*got 'shuffled'"),
        (lambda: begun(Recorder("swept")), "sweep must .*got None.*criterion"),
        (
            lambda: begun(Recorder(weights_dir="w")),
            "weights must .*got None.*state dict",
        ),
    ],
)
def test_bad_options(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_bad_reports():
    recorder = begun()
    for index in (-1, N):
        with pytest.raises(
            ValueError, match=rf"indices must be in \[0, {N}\), got \[{index}\]"
        ):
            recorder.observe(torch.tensor([index]), torch.tensor([1.0]))
    with pytest.raises(
        ValueError, match=r"grad_norms must .*shape \(1,\), got .*shape \(2,\)"
    ):
        recorder.observe(torch.tensor([0]), torch.tensor([1.0, 2.0]))
    flat = SimpleNamespace(grad_norms=torch.zeros(N), correct=torch.zeros(N - 1))
    recorder = begun(Recorder("swept", every=[1]), sweep=lambda: flat)
    with pytest.raises(ValueError, match=r"sweep\(\).correct must .*shape \(6,\)"):
        report(recorder)


@pytest.mark.parametrize("length", [N - 1, N + 4])
def test_a_data_set_that_changed_its_length_is_refused_and_training_goes_on(length):
    other = SimpleNamespace(grad_norms=torch.zeros(length))
    recorder = begun(Recorder("swept", every=[1]), sweep=lambda: other)
    with pytest.warns(UserWarning, match=f"had {N} examples when the recording began"):
        report(recorder)
    for _ in range(2):
        with pytest.raises(AccountingError, match="now it has another length"):
            _ = recorder.ledger


def test_samples_of_a_data_set_that_grew_give_the_same_error_each_time():
    recorder = begun()
    recorder.report(torch.tensor([N + 3]), torch.tensor([1.0]))
    recorder.step(noise_std=1.0, max_grad_norm=1.0)
    with pytest.warns(UserWarning, match="no longer has a ledger"):
        for _ in range(2):
            with pytest.raises(AccountingError, match="now it has another length"):
                _ = recorder.ledger


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Recorder(checkpoints="states"), "checkpoints must be a Checkpoints"),
        (
            lambda: Checkpoints("states", deletion_policy="p"),
            "deletion_policy must be a DeletionPolicy",
        ),
        (lambda: PrivacyEngine(recorder="swept"), "recorder must be a Recorder"),
    ],
)
def test_objects_of_another_type_are_refused_at_once(make, match):
    with pytest.raises(ValueError, match=match):
        make()
