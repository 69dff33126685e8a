import numpy as np
import pytest

from opacus_pi.difficulty.proxies import (
    c_proxy,
    el2n,
    forgetting_events,
    grad_norm_end,
    grad_norm_mean,
    grad_norm_mid,
)
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger, NoisySGD

nan = np.nan
ALL = [grad_norm_mid, grad_norm_end, grad_norm_mean, c_proxy, el2n, forgetting_events]


def ledger(steps, rows, num_steps=100, clip=np.inf, **more):
    mechanism = NoisySGD(
        num_steps=num_steps, sample_rate=0.1, noise_std=1.0, max_grad_norm=clip
    )
    return GradNormLedger(mechanism, steps, rows, **more)


def full(seed=0, num_rows=5, num_examples=8):
    random = np.random.default_rng(seed)
    shape = (num_rows, num_examples)
    return ledger(
        np.arange(1, num_rows + 1) * 20,
        random.exponential(size=shape),
        confidences=random.random(shape),
        errors=random.random(shape),
        correct=random.integers(0, 2, shape),
    )


def test_reductions_equal_their_definitions():
    run = full()
    # 100 updates, rows at 20, 40, 60, 80, 100: 40 and 60 are as near, 40 is earlier
    for j in range(run.num_examples):
        norms = [float(run.grad_norms[i, j]) for i in range(5)]
        assert grad_norm_mid(run)[j] == norms[1]
        assert grad_norm_end(run)[j] == norms[4]
        assert grad_norm_mean(run)[j] == pytest.approx(sum(norms) / 5)
        mean = sum(float(run.confidences[i, j]) for i in range(5)) / 5
        assert c_proxy(run)[j] == pytest.approx(1 - mean)
        assert el2n(run)[j] == run.errors[1, j]


def test_forgetting_events_count_falls_from_right_to_wrong():
    columns = {
        "learned at once": ([1, 1, 1, 1], 0),
        "learned late": ([0, 0, 1, 1], 0),
        "forgotten twice": ([1, 0, 1, 0], 2),
        "forgotten at the end": ([0, 1, 1, 0], 1),
        "never learned": ([0, 0, 0, 0], np.inf),
        "never seen": ([nan] * 4, np.inf),
        "seen late": ([nan, 1, 0, nan], 1),
        "gap that hides nothing": ([1, nan, 0, 1], 1),
    }
    correct = np.array([rows for rows, _ in columns.values()]).T
    run = ledger([1, 2, 3, 4], np.zeros_like(correct), correct=correct)
    wanted = [count for _, count in columns.values()]
    assert forgetting_events(run).tolist() == wanted


@pytest.mark.parametrize("score", ALL)
def test_scores_follow_a_reordering_of_the_examples(score):
    run, order = full(), np.array([3, 0, 7, 1, 5, 2, 6, 4])
    np.testing.assert_array_equal(score(run.subset(order)), score(run)[order])


@pytest.mark.parametrize("score", ALL)
def test_several_runs_are_averaged(score):
    runs = [full(seed) for seed in (1, 2, 3)]
    singles = np.array([score(run) for run in runs])
    np.testing.assert_allclose(score(runs), singles.mean(axis=0))


def test_gaps_take_the_next_observation_else_the_last():
    rows = [[nan, 1.0], [2.0, nan], [4.0, nan]]
    run = ledger([10, 50, 100], rows, confidences=np.divide(rows, 10))
    assert grad_norm_mid(run).tolist() == [2.0, 1.0]
    assert grad_norm_end(run).tolist() == [4.0, 1.0]
    np.testing.assert_allclose(grad_norm_mean(run), [8 / 3, 1.0])
    np.testing.assert_allclose(c_proxy(run), [1 - 0.8 / 3, 0.9], rtol=1e-6)


def test_an_example_never_seen_is_the_hardest():
    unseen = np.full((2, 1), nan)
    more = {"confidences": unseen, "errors": unseen, "correct": unseen}
    clipped = ledger([50, 100], unseen, clip=1.5, **more)
    assert grad_norm_mid(clipped) == 1.5
    assert grad_norm_mean(clipped) == 1.5
    assert c_proxy(clipped) == 1.0
    assert el2n(clipped) == np.sqrt(2)
    assert grad_norm_end(ledger([50, 100], unseen)) == np.inf


def test_higher_is_harder_for_every_score():
    """Column 1 is the harder example in every recorded quantity."""
    run = ledger(
        [50, 100],
        [[1, 2], [1, 2]],
        confidences=[[0.9, 0.1], [0.9, 0.2]],
        errors=[[0.1, 1.2], [0.1, 1.1]],
        correct=[[1, 1], [1, 0]],
    )
    for score in ALL:
        easy, hard = score(run)
        assert hard > easy, score.__name__


@pytest.mark.parametrize(
    ("score", "name"),
    [(c_proxy, "confidences"), (el2n, "errors"), (forgetting_events, "correct")],
)
def test_a_missing_record_is_one_clear_error(score, name):
    with pytest.raises(
        ValueError, match=f"must contain {name}, got a ledger without {name}"
    ):
        score(ledger([1], [[1.0]]))


@pytest.mark.parametrize("score", ALL)
def test_a_ledger_without_rows_is_refused(score):
    with pytest.raises(ValueError, match="a ledger without rows"):
        score(ledger(np.empty(0, int), np.empty((0, 3))))
