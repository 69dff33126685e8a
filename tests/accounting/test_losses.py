"""Privacy losses against a loop over every update, and the laws they obey."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opacus_pi.accounting import (
    GradNormLedger,
    NoisySGD,
    per_step_losses,
    privacy_losses,
    renyi_divergence,
    trajectory_losses,
    worst_case_loss,
)
from opacus_pi.accounting.group.worst_case import group_worst_case_loss
from tests.accounting import oracles

LAWS = settings(max_examples=25, deadline=None)
NAN = math.nan
RULES = ("right", "left", "trapezoid", "max")


def one_run(**changes):
    """A short run with two examples, gaps, and updates outside its rows."""
    facts = {
        "num_steps": 12,
        "sample_rate": 0.2,
        "noise_std": 2.0,
        "max_grad_norm": 1.5,
    }
    sampling = changes.pop("sampling", "poisson")
    steps = changes.pop("steps", [3, 4, 9])
    norms = changes.pop("norms", [[0.5, NAN], [2.0, 1.0], [0.125, NAN]])
    mechanism = NoisySGD(**{**facts, **changes}, sampling=sampling)
    return GradNormLedger(mechanism, steps, norms)


def several_runs():
    """Three runs of one training."""
    rng = np.random.default_rng(3)
    return [one_run(norms=rng.uniform(0.1, 2, (3, 2))) for _ in range(3)]


SCHEDULE = {
    "sample_rate": [0.1, 0.2, 0.05],
    "noise_std": [2.0, 1.0, 3.0],
    "max_grad_norm": [1.5, 0.75, 4.0],
}
RUNS = {
    "poisson": [one_run()],
    "fixed": [one_run(sampling="fixed")],
    "full batch": [one_run(sample_rate=1.0)],
    "schedule": [one_run(**SCHEDULE)],
    "row at 0": [one_run(steps=[0, 5, 12])],
    "one row": [one_run(steps=[5], norms=[[0.5, NAN]])],
    "several": several_runs(),
    "no clipping": [one_run(max_grad_norm=math.inf, norms=[[1, 0], [2, 1], [3, NAN]])],
}


def expected_losses(runs, order, convention, rule, p, mode):
    losses = [
        oracles.privacy_loss(runs, j, order, convention, rule, p, mode) for j in (0, 1)
    ]
    if convention != "corrected":
        return losses
    steps = runs[0].steps
    return np.minimum(losses, worst_case_loss(runs[0].mechanism, order, steps=steps))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("mode", ["exact", "chord", "ceil"])
def test_corrected_equals_the_loop_over_updates(name, mode):
    runs = RUNS[name]
    for rule, order, p in itertools.product(RULES, (1.3, 8.0), (None, 5.0, math.inf)):
        fast = privacy_losses(runs, order, rule=rule, hoelder_p=p, mode=mode)
        slow = expected_losses(runs, order, "corrected", rule, p, mode)
        np.testing.assert_allclose(fast, slow, rtol=1e-9, err_msg=f"{rule} {order} {p}")


@pytest.mark.parametrize("name", [n for n in RUNS if n != "no clipping"])
@pytest.mark.parametrize("convention", ["icml2025", "thudi2024_code"])
def test_published_equal_the_loop_over_updates(name, convention):
    runs = RUNS[name]
    for rule, p in itertools.product(RULES, (None, 7.5)):
        fast = privacy_losses(runs, 4, convention=convention, rule=rule, hoelder_p=p)
        slow = expected_losses(runs, 4, convention, rule, p, "exact")
        np.testing.assert_allclose(fast, slow, rtol=1e-9, err_msg=f"{rule} {p}")


@pytest.mark.parametrize("convention", ["corrected", "icml2025", "thudi2024_code"])
@pytest.mark.parametrize(
    "name", ["poisson", "fixed", "schedule", "row at 0", "several"]
)
def test_per_step_losses_equal_single_updates(name, convention):
    runs = RUNS[name]
    losses = per_step_losses(runs, 8, convention=convention)
    assert losses.shape == (3, 2)
    how = (8, convention, 36, "exact")
    for row, example in itertools.product(range(3), range(2)):
        update = max(int(runs[0].steps[row]), 1)
        slow = oracles.step_loss(runs, example, row, row, update, how)
        assert losses[row, example] == pytest.approx(slow, 1e-9)


def test_a_row_after_the_last_update_of_an_interval_is_summed_by_its_per_step_loss():
    run = one_run(steps=[3, 4, 12], norms=[[0.5, 1.0], [2.0, 1.0], [0.125, 1.0]])
    for convention in ("icml2025", "thudi2024_code"):
        per_step = per_step_losses(run, 8, convention=convention)
        total = privacy_losses(run, 8, convention=convention)
        np.testing.assert_allclose(total, [3, 1, 8] @ per_step, rtol=1e-12)


def test_never_seen_counts_as_the_clip_norm():
    seen = one_run(norms=[[1.5, 1.5]] * 3)
    unseen = one_run(norms=[[NAN, 1.5]] * 3)
    np.testing.assert_array_equal(privacy_losses(unseen, 4), privacy_losses(seen, 4))
    unclipped = one_run(max_grad_norm=math.inf, norms=[[NAN, 1.5]] * 3)
    for convention in ("corrected", "icml2025", "thudi2024_code"):
        losses = privacy_losses(unclipped, 4, convention=convention)
        assert losses[0] == math.inf
        assert np.isfinite(losses[1])


def test_no_update_means_no_loss():
    run = one_run(num_steps=0, steps=[], norms=np.empty((0, 2)))
    np.testing.assert_array_equal(privacy_losses(run, 4), [0, 0])
    assert worst_case_loss(run.mechanism, 4) == 0


def test_fixed_schedules_are_not_amplified():
    run = one_run(sampling="fixed", norms=[[0.5, 1.0]] * 3)
    ratio = np.array([0.5, 1.0]) / 2
    plain = 12 * 0.2 * 4 * ratio**2 / 2  # 2.4 participations at order 4
    np.testing.assert_allclose(privacy_losses(run, 4, hoelder_p=math.inf), plain)
    worst = 3 * 4 * 0.75**2 / 2  # who is in the epoch that was broken off is not known
    assert worst_case_loss(run.mechanism, 4) == pytest.approx(worst)


def test_an_example_of_an_only_batch_is_covered():
    mechanism = one_run(sampling="fixed", num_steps=1, steps=[1], norms=[[1, 1]])
    loss = worst_case_loss(mechanism.mechanism, 4)
    assert loss == pytest.approx(float(renyi_divergence(0.75, 1.0, 4)))


@pytest.mark.parametrize("seed", range(20))
def test_worst_case_of_any_order_of_examples_in_each_epoch(seed):
    """A noise schedule: in every epoch the example is in the most expensive update."""
    rng = np.random.default_rng(seed)
    length, num_steps = int(rng.integers(1, 50)), int(rng.integers(1, 300))
    cuts = rng.choice(num_steps, min(num_steps, 6), replace=False)
    steps = np.unique(np.append(cuts + 1, num_steps))
    noise = rng.uniform(0.5, 3, len(steps))
    mechanism = NoisySGD(num_steps, 1 / length, noise, 1.0, "fixed")
    costs = 3 / 2 / noise[np.searchsorted(steps, np.arange(1, num_steps + 1))] ** 2
    epochs = [costs[i : i + length].max() for i in range(0, num_steps, length)]
    found = worst_case_loss(mechanism, 3, steps=steps)
    assert found == pytest.approx(sum(epochs), rel=1e-12)
    group = group_worst_case_loss(mechanism, 2, 3, steps=steps)
    assert group == pytest.approx(4 * sum(epochs), rel=1e-12)


def test_worst_case():
    mechanism = one_run().mechanism
    expected = 12 * renyi_divergence(0.75, 0.2, 4.5)
    assert worst_case_loss(mechanism, 4.5) == pytest.approx(float(expected), 1e-13)
    scheduled = one_run(**SCHEDULE)
    parts = [
        count * float(renyi_divergence(c / s, q, 4.5))
        for count, q, s, c in zip([3, 1, 8], *SCHEDULE.values(), strict=True)
    ]
    value = worst_case_loss(scheduled.mechanism, 4.5, steps=scheduled.steps)
    assert value == pytest.approx(sum(parts), 1e-13)
    assert worst_case_loss(NoisySGD(12, 0.2, 2.0), 4.5) == math.inf


def test_corrected_never_exceeds_the_worst_case():
    run = one_run(norms=[[9.0, 9.0]] * 3)
    worst = worst_case_loss(run.mechanism, 16)
    np.testing.assert_allclose(privacy_losses(run, 16), worst, rtol=1e-13)
    plain = [oracles.privacy_loss([run], 0, 16, "corrected", "right", None, "exact")]
    assert plain[0] > 1.05 * worst


def test_trajectory_form():
    runs = several_runs()
    order, kappa = 4.0, 3.0
    inner = 1 + kappa / (kappa - 1) * (order - 1)
    for j, value in enumerate(trajectory_losses(runs, order, kappa)):
        sums = [
            oracles.privacy_loss(
                [run], j, inner, "corrected", "right", math.inf, "exact"
            )
            for run in runs
        ]
        slow = oracles.mean_over_runs(sums, kappa * (order - 1))
        assert value == pytest.approx(slow, 1e-10)
    largest = trajectory_losses(runs, order, math.inf)
    plain = [privacy_losses(run, order, hoelder_p=math.inf) for run in runs]
    np.testing.assert_allclose(largest, np.max(plain, axis=0), rtol=1e-12)


norm_tables = st.lists(
    st.tuples(*[st.floats(0, 5, width=32)] * 3), min_size=3, max_size=3
)
any_order = st.floats(1.01, 40)


@LAWS
@given(norms=norm_tables, order=any_order, factor=st.floats(1, 3))
def test_larger_norms_have_larger_losses(norms, order, factor):
    small, large = (one_run(norms=np.array(norms) * f) for f in (1, factor))
    for rule in RULES:
        before = privacy_losses(small, order, rule=rule)
        after = privacy_losses(large, order, rule=rule)
        assert (before <= after * (1 + 1e-10)).all()


@LAWS
@given(norms=norm_tables, order=any_order, factor=st.floats(1, 3))
def test_larger_orders_and_longer_runs_have_larger_losses(norms, order, factor):
    run = one_run(norms=norms)
    value = privacy_losses(run, order)
    assert (value <= privacy_losses(run, order * factor) * (1 + 1e-10)).all()
    longer = one_run(norms=norms, num_steps=13)
    for p in (36.0, math.inf):
        short = privacy_losses(run, order, hoelder_p=p)
        long = privacy_losses(longer, order, hoelder_p=p)
        assert (short <= long * (1 + 1e-10)).all()


@LAWS
@given(norms=norm_tables, order=any_order, permutation=st.permutations(range(3)))
def test_reordering_examples_reorders_losses(norms, order, permutation):
    run = one_run(norms=norms)
    np.testing.assert_allclose(
        privacy_losses(run.subset(permutation), order),
        privacy_losses(run, order)[list(permutation)],
        rtol=1e-12,
    )


@LAWS
@given(norms=norm_tables, order=any_order, cut=st.sampled_from([5, 6, 7, 8]))
def test_splitting_an_interval_changes_nothing(norms, order, cut):
    whole = one_run(norms=norms)
    split = one_run(norms=[*norms[:2], norms[2], norms[2]], steps=[3, 4, cut, 9])
    np.testing.assert_allclose(
        privacy_losses(split, order), privacy_losses(whole, order), rtol=1e-11
    )


@LAWS
@given(norms=norm_tables, order=any_order)
def test_bound_covers_the_exact_divergence_of_fixed_full_batch_norms(norms, order):
    run = one_run(norms=norms, sample_rate=1.0)
    squares = np.minimum(np.array(norms, np.float32), 1.5).astype(float) ** 2 / 4
    exact = order / 2 * np.array([3, 1, 8]) @ squares
    value = privacy_losses(run, order)
    assert (exact * (1 - 1e-12) <= value).all()
    assert (value <= 1.5 * exact + 1e-300).all()


@pytest.mark.parametrize("order", [1.5, 3.0, 6.0])
@pytest.mark.parametrize("share", [1, 4, 8])
def test_bound_covers_an_adaptive_pair_of_steps(order, share):
    """Step 2 has ratio r2 if the first output exceeds a threshold, else 0.

    The threshold leaves a share of exactly share/10 of the runs above it, so ten runs
    give the expectation exactly. D is computed by quadrature over the first output.
    """
    from scipy.stats import norm

    r1, r2 = 0.6, 0.9
    threshold = r1 + norm.isf(share / 10)
    above = order * (order - 1) * r2**2 / 2
    # E_Q[L^a; z > c] of the first step: Q tilted to N(a·r1, 1).
    first = order * (order - 1) * r1**2 / 2
    tail = norm.sf(threshold - order * r1)
    exact = (first + math.log1p(tail * math.expm1(above))) / (order - 1)
    mechanism = NoisySGD(num_steps=2, sample_rate=1.0, noise_std=1.0)
    second = [r2] * share + [0.0] * (10 - share)
    runs = [GradNormLedger(mechanism, [1, 2], [[r1], [r]]) for r in second]
    for p in (1.5, 3.0, 6.0, 50.0, math.inf):
        assert privacy_losses(runs, order, hoelder_p=p)[0] >= exact * (1 - 1e-6)
    for kappa in (1.2, 2.0, 8.0, math.inf):
        assert trajectory_losses(runs, order, kappa)[0] >= exact * (1 - 1e-6)


def test_a_single_run_can_be_below_the_exact_divergence():
    mechanism = NoisySGD(num_steps=1, sample_rate=1.0, noise_std=1.0)
    runs = [GradNormLedger(mechanism, [1], [[r]]) for r in (0.1, 2.0)]
    assert privacy_losses(runs[0], 4)[0] < privacy_losses(runs, 4)[0]


@pytest.mark.parametrize("order", [1.0, 0.5, -2, math.nan, math.inf])
def test_order_of_one_or_less_is_refused(order):
    run = one_run()
    for call in (
        lambda: privacy_losses(run, order),
        lambda: per_step_losses(run, order),
        lambda: worst_case_loss(run.mechanism, order),
    ):
        with pytest.raises(ValueError, match=r"^order must be finite and above 1"):
            call()


def test_unknown_words_are_refused():
    run = one_run()
    with pytest.raises(ValueError, match="^convention must .*got 'icml2024'"):
        privacy_losses(run, 4, convention="icml2024")
    with pytest.raises(ValueError, match="^rule must .*got 'middle'"):
        privacy_losses(run, 4, rule="middle")
    with pytest.raises(ValueError, match="^mode must .*got 'floor'"):
        privacy_losses(run, 4, mode="floor")


@pytest.mark.parametrize("p", [1.0, 0.2, math.nan, "optimal"])
def test_a_p_that_is_no_number_above_one_is_refused(p):
    with pytest.raises(ValueError, match=r"^hoelder_p must .*Leave it out"):
        privacy_losses(one_run(), 4, hoelder_p=p)


def test_a_p_that_lets_orders_explode_is_refused():
    run = one_run(num_steps=900, steps=[300, 600, 900])
    with pytest.raises(ValueError, match="hoelder_p=3, order 4 grows to"):
        privacy_losses(run, 4, hoelder_p=3.0)


def test_published_conventions_need_a_finite_p():
    with pytest.raises(ValueError, match="must be finite under icml2025"):
        privacy_losses(one_run(), 4, convention="icml2025", hoelder_p=math.inf)


def test_no_noise_is_refused_with_its_remedy():
    run = one_run(noise_std=0.0)
    for call in (
        lambda: privacy_losses(run, 4),
        lambda: per_step_losses(run, 4),
        lambda: worst_case_loss(run.mechanism, 4),
    ):
        with pytest.raises(ValueError, match=r"noise_std must .*got 0.*with_noise_std"):
            call()
    assumed = privacy_losses(run.with_noise_std(2.0), 4)
    np.testing.assert_array_equal(assumed, privacy_losses(one_run(), 4))


def test_a_ledger_without_rows_is_refused():
    run = one_run(steps=[], norms=np.empty((0, 2)))
    with pytest.raises(ValueError, match="^ledger must .*got 0 rows"):
        privacy_losses(run, 4)


def test_a_schedule_needs_its_steps():
    run = one_run(**SCHEDULE)
    with pytest.raises(
        ValueError, match="^steps must be given, because training changed .*, got None"
    ):
        worst_case_loss(run.mechanism, 4)


@pytest.mark.parametrize("kappa", [1.0, 0.0, math.nan])
def test_kappa_of_one_is_refused(kappa):
    with pytest.raises(ValueError, match="^kappa must"):
        trajectory_losses(one_run(), 4, kappa)


def test_runs_that_do_not_belong_together_are_refused():
    run = one_run()
    for other, word in [
        (one_run(noise_std=3.0), "mechanism"),
        (one_run(steps=[3, 4, 8]), "steps"),
        (one_run(norms=[[1.0]] * 3), "number of examples"),
        (run.subset([1, 0]), "example_ids"),
    ]:
        with pytest.raises(
            ValueError, match=f"must have the same .*{word}.* run 1 differs from run 0"
        ):
            privacy_losses([run, other], 4)
    with pytest.raises(ValueError, match="at least one ledger"):
        privacy_losses([], 4)


# ------------------------------------------------------------------ very long runs


def long_run(num_steps, sampling, rows=2):
    mechanism = NoisySGD(
        num_steps=num_steps,
        sample_rate=1e-3,
        noise_std=1.0,
        max_grad_norm=1.0,
        sampling=sampling,
    )
    steps = [num_steps * (i + 1) // rows for i in range(rows)]
    return GradNormLedger(mechanism, steps, [[0.1, 0.5, 2.0]] * rows)


@pytest.mark.parametrize("sampling", ["poisson", "fixed"])
@pytest.mark.parametrize("mode", ["exact", "chord", "ceil"])
def test_a_long_run_loses_in_proportion_to_its_length(sampling, mode):
    """p grows with the run, so that the orders are those of any other long run."""
    short, long = (long_run(t, sampling) for t in (10**6, 10**12))
    one = privacy_losses(short, 8.0, mode=mode)
    tracemalloc.start()
    other = privacy_losses(long, 8.0, mode=mode)
    worst = worst_case_loss(long.mechanism, 8.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_allclose(other / 1e6, one, rtol=1e-5)
    assert worst == pytest.approx(1e6 * worst_case_loss(short.mechanism, 8.0), 1e-9)
    assert peak < 1 << 24
