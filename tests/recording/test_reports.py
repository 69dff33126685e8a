"""Reports are added together, which makes no difference to the recorded run."""

import math

import pytest
import torch

from opacus_pi.recording import AccountingError, Recorder

N = 6


def begun(**options):
    recorder = Recorder(**options)
    recorder.begin(num_examples=N, sample_rate=0.5, sampling="poisson", data_set="toy")
    return recorder


def observe(recorder, index, norm):
    recorder.observe(torch.tensor([index]), torch.tensor([norm]))


def step(recorder):
    recorder.step(noise_std=1.0, max_grad_norm=1.0)


def test_readers_see_what_waits():
    recorder = begun(every=[9])
    observe(recorder, 2, 0.5)
    step(recorder)
    assert recorder.ledger.grad_norms[0, 2] == 0.5
    observe(recorder, 3, 0.25)
    assert recorder.state_dict()["observed"][3] == 0.25


def test_what_the_caller_gave_stays_the_callers():
    recorder = begun()
    indices, norms = torch.tensor([1, 4]), torch.tensor([0.5, 0.75])
    recorder.observe(indices, norms)
    indices.fill_(0), norms.fill_(9.0)
    step(recorder)
    assert recorder.ledger.grad_norms[0, [1, 4]].tolist() == [0.5, 0.75]


def test_positions_may_be_listed():
    recorder = begun()
    recorder.report([4, 1], torch.tensor([0.5, 0.75], dtype=torch.float64))
    step(recorder)
    assert recorder.ledger.grad_norms[0, [1, 4]].tolist() == [0.75, 0.5]


def test_a_long_run_does_not_keep_its_reports():
    recorder = begun(every=[10_000])
    for _ in range(1000):
        observe(recorder, 0, 0.5)
        step(recorder)
    assert len(recorder._waiting._reports) < 300


def test_the_update_that_diverged_is_named():
    recorder = begun(every=[10])
    for norm in (1.0, float("nan"), 1.0):
        observe(recorder, 0, norm)
        step(recorder)
    with (
        pytest.warns(UserWarning, match="not finite at or before update 2"),
        pytest.raises(
            AccountingError, match="not finite at or before update 2: .*diverged"
        ),
    ):
        _ = recorder.ledger


@pytest.mark.parametrize(
    ("reports", "words"),
    [
        (
            [(0, 1.0), (4, math.nan)],
            "that of example 4 of .*, while 1 other .* was fin",
        ),
        (
            [(0, 1.0), (4, math.inf), (1, 2.0), (3, math.nan)],
            "those of examples 3, 4 of the data set, while 2 others .* were finite",
        ),
        ([(4, math.nan)], "diverged"),
        ([(0, math.inf), (4, math.nan)], "diverged"),
    ],
)
def test_the_examples_that_are_not_finite_are_named(reports, words):
    recorder = begun(every=[10])
    step(recorder)
    for index, norm in reports:
        observe(recorder, index, norm)
    step(recorder)
    for index in range(N):  # then all weights are NaN
        observe(recorder, index, math.nan)
    step(recorder)
    with (
        pytest.warns(UserWarning, match="no longer has a ledger"),
        pytest.raises(AccountingError, match=f"update 2: .*{words}") as found,
    ):
        _ = recorder.ledger
    assert ("Lower the learning rate" in str(found.value)) is (words == "diverged")


def test_a_strict_recorder_does_not_wait():
    recorder = begun(strict=True)
    with pytest.raises(AccountingError, match="not finite at or before update 1"):
        observe(recorder, 0, float("inf"))
