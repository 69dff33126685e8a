"""Rows drawn at random: unbiased for the sum over all updates, and refused if not."""

import itertools
import math

import numpy as np
import pytest
import torch

from opacus_pi.accounting import (
    GradNormLedger,
    NoisySGD,
    per_step_losses,
    privacy_losses,
    worst_case_loss,
)
from opacus_pi.accounting.rules import check_rule, strata, stratum_ends
from opacus_pi.recording import Recorder
from opacus_pi.recording.schedule import evenly_spaced_steps, stratified_steps

FACTS = {"num_steps": 7, "sample_rate": 0.2, "noise_std": 1.5}


def complete(num_runs=1, seed=0, num_steps=7, **changes):
    """Runs of two examples, measured before every update."""
    rng = np.random.default_rng(seed)
    mechanism = NoisySGD(**{**FACTS, "num_steps": num_steps, **changes})
    return [
        GradNormLedger(
            mechanism, np.arange(num_steps), rng.lognormal(0, 1, (num_steps, 2))
        )
        for _ in range(num_runs)
    ]


def drawn(run, steps):
    """The same run, measured at some of its updates only."""
    return GradNormLedger(run.mechanism, steps, run.grad_norms[list(steps)])


def every_draw(num_strata, num_steps):
    ends = stratum_ends(num_strata, num_steps)
    parts = [range(a, b) for a, b in zip((0, *ends), ends, strict=False)]
    return list(itertools.product(*parts))


@pytest.mark.parametrize("sampling", ["poisson", "fixed"])
@pytest.mark.parametrize("num_runs", [1, 3])
@pytest.mark.parametrize(("num_strata", "num_steps"), [(1, 7), (3, 7), (7, 7), (4, 10)])
def test_unbiased_for_the_sum_over_all_updates(
    num_strata, num_steps, num_runs, sampling
):
    runs = complete(num_runs, num_steps=num_steps, sampling=sampling)
    draws = every_draw(num_strata, num_steps)
    sizes = np.diff([0, *stratum_ends(num_strata, num_steps)])
    assert len(draws) == np.prod(sizes)
    for p in (None, 4.0, math.inf):
        mean = np.mean(
            [
                privacy_losses(
                    [drawn(run, steps) for run in runs],
                    5.0,
                    rule="stratified",
                    hoelder_p=p,
                )
                for steps in draws
            ],
            axis=0,
        )
        truth = privacy_losses(runs, 5.0, rule="left", hoelder_p=p)
        np.testing.assert_allclose(mean, truth, rtol=1e-12)


def test_other_rules_are_biased_for_falling_norms():
    mechanism = NoisySGD(**FACTS)
    norms = np.geomspace(4, 0.5, 7)[:, None]
    full = GradNormLedger(mechanism, np.arange(7), norms)
    truth = privacy_losses(full, 4.0, rule="left")
    ends = evenly_spaced_steps(3, 7)
    at_ends = GradNormLedger(mechanism, ends, norms[np.minimum(ends, 6)])
    assert privacy_losses(at_ends, 4.0, rule="right") < truth


def test_constant_norms_have_the_same_loss_wherever_the_rows_are():
    mechanism = NoisySGD(**FACTS, max_grad_norm=1.0)
    worst = worst_case_loss(mechanism, 4.0)
    for steps in every_draw(3, 7):
        run = GradNormLedger(mechanism, steps, np.full((3, 1), 1.0))
        loss = privacy_losses(run, 4.0, rule="stratified", hoelder_p=math.inf)
        assert loss == pytest.approx(worst, 1e-12)
        assert privacy_losses(run, 4.0, rule="stratified") <= worst


def test_published_conventions_multiply_by_the_length_of_the_part():
    run = drawn(complete()[0], (1, 3, 6))
    for convention in ("icml2025", "thudi2024_code"):
        per_step = per_step_losses(run, 4, convention=convention)
        total = privacy_losses(run, 4, convention=convention, rule="stratified")
        np.testing.assert_allclose(total, [2, 3, 2] @ per_step, rtol=1e-12)


def test_scheduled_values_are_those_of_the_sampled_update():
    """The sampled update has row i+1's values: row i's hold from row i-1 to row i."""
    noise = np.array([1.0, 2.0, 4.0])
    run = GradNormLedger(NoisySGD(6, 1.0, noise), [0, 3, 5], np.ones((3, 1)))
    loss = privacy_losses(run, 2.0, rule="stratified", hoelder_p=math.inf)
    assert loss == pytest.approx(2 * (2 / 2) * (1 / 4 + 1 / 16 + 1 / 16))


def test_missing_norms_take_the_next_one():
    mechanism = NoisySGD(**FACTS, max_grad_norm=1.0)
    gaps = GradNormLedger(
        mechanism, [0, 3, 6], [[math.nan] * 2, [0.5, math.nan], [2, 2]]
    )
    filled = GradNormLedger(mechanism, [0, 3, 6], [[0.5, 1.0], [0.5, 1.0], [2, 2]])
    for run in (gaps, filled):
        assert run.source == "swept"
    np.testing.assert_array_equal(
        privacy_losses(gaps, 4, rule="stratified"),
        privacy_losses(filled, 4, rule="stratified"),
    )


def test_ends_are_those_of_evenly_spaced_rows():
    for n, t in [(1, 1), (3, 7), (35, 58650), (7, 7)]:
        assert stratum_ends(n, t) == evenly_spaced_steps(n, t)
        assert sum(size for size, _ in strata(stratified_steps(n, t, seeded()), t)) == t


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_update_of_a_stratum_is_sampled_equally_often():
    generator = seeded()
    draws = np.array([stratified_steps(3, 10, generator) for _ in range(6000)])
    for column, (start, end) in zip(draws.T, [(0, 3), (3, 7), (7, 10)], strict=True):
        values, counts = np.unique(column, return_counts=True)
        assert values.tolist() == list(range(start, end))
        expected = 6000 / (end - start)
        assert ((counts - expected) ** 2 / expected).sum() < 16  # 3 degrees: p > 1e-3


def record(generator, num_steps=9, total=9, noise=lambda t: 2.0):
    """A run whose norms are the number of updates done."""
    recorder = Recorder.stratified(3, num_steps=num_steps, generator=generator)
    done = [0]

    class Sweep:
        @property
        def grad_norms(self):
            return torch.tensor([1.0 + done[0], 1.0])

    recorder.begin(
        num_examples=2, sample_rate=0.5, sampling="poisson", data_set="x", sweep=Sweep
    )
    for t in range(1, total + 1):
        done[0] = t
        recorder.step(noise_std=noise(t), max_grad_norm=1e9)
    return recorder


@pytest.mark.parametrize("seed", range(12))
def test_the_recorder_writes_the_sampled_rows(seed):
    steps = stratified_steps(3, 9, seeded(seed))
    ledger = record(seeded(seed)).ledger
    assert tuple(ledger.steps) == steps
    assert ledger.grad_norms[:, 0].tolist() == [1.0 + s for s in steps]
    assert np.isfinite(privacy_losses(ledger, 4, rule="stratified")).all()


def test_a_row_before_the_first_update_survives_a_checkpoint():
    seed = next(s for s in range(99) if stratified_steps(3, 9, seeded(s))[0] == 0)
    first = record(seeded(seed), total=4)
    resumed = Recorder("swept", first.every)
    resumed.load_state_dict(first.state_dict())
    resumed.begin(
        num_examples=2,
        sample_rate=0.5,
        sampling="poisson",
        data_set="x",
        sweep=lambda: pytest.fail("nothing is due"),
    )
    assert resumed.ledger.steps.tolist() == first.ledger.steps.tolist()


def test_a_row_before_the_first_update_has_the_next_row_s_facts():
    seed = next(s for s in range(99) if stratified_steps(3, 9, seeded(s))[0] == 0)
    ledger = record(seeded(seed), noise=float).ledger
    rows = [0, *ledger.steps[1:].tolist()]
    expected = [1.0, 1.0, float(rows[1] + 1)]  # the least noise since the row before
    assert ledger.mechanism.noise_std.tolist() == expected


def test_before_the_first_update_there_is_no_ledger():
    seed = next(s for s in range(99) if stratified_steps(3, 9, seeded(s))[0] == 0)
    from opacus_pi.recording import AccountingError

    with pytest.raises(AccountingError, match="because no update was made"):
        _ = record(seeded(seed), total=0).ledger
    assert len(record(seeded(seed), total=1).ledger.steps) == 1


def test_rows_that_are_not_stratified_are_refused():
    run = complete()[0]
    for steps in [(0, 1, 6), (2, 4, 6), (0, 3)]:
        with pytest.raises(ValueError, match="steps must have one row in each of"):
            privacy_losses(drawn(run, steps), 4, rule="stratified")
    observed = GradNormLedger(
        run.mechanism, run.steps, run.grad_norms, source="observed"
    )
    with pytest.raises(
        ValueError,
        match="rule='stratified' cannot be used for an observed ledger",
    ):
        privacy_losses(observed, 4, rule="stratified")
    short = record(seeded(), total=5).ledger
    with pytest.raises(ValueError, match="equal parts of 5 updates"):
        privacy_losses(short, 4, rule="stratified")


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="num_checkpoints must .*got 10"):
        Recorder.stratified(10, num_steps=9, generator=seeded())
    with pytest.raises(
        ValueError, match=r"every must be above 0 if mode .*, got \[0, 3\]"
    ):
        Recorder("observed", every=[0, 3])


def test_a_group_s_checkpoints_have_no_such_rule():
    with pytest.raises(ValueError, match="^rule must be in .*, got 'stratified'"):
        check_rule("stratified")
