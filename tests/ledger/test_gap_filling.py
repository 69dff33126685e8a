"""Gaps filled by rank, against a slow oracle; laws; and what it is good for."""

import numpy as np
import pytest

from opacus_pi.accounting import (
    GradNormLedger,
    NoisySGD,
    filled_by_rank,
    privacy_losses,
)
from opacus_pi.ledger.gap_filling import fill_by_rank

NAN = np.nan


def one_by_one(rows):
    """The definition, entry by entry, with numpy's Hazen quantile."""
    rows = np.array(rows, dtype=np.float64)
    filled = rows.copy()
    for i, j in np.argwhere(np.isnan(rows)):
        drawn = np.flatnonzero(~np.isnan(rows[:, j]))
        seen = rows[i][~np.isnan(rows[i])]
        if not len(drawn) or not len(seen):
            continue
        later = drawn[drawn > i]
        k = later[0] if len(later) else drawn[-1]
        there = rows[k][~np.isnan(rows[k])]
        below = (there < rows[k, j]).sum()
        equal = (there == rows[k, j]).sum()
        rank = (below + equal / 2) / len(there)
        filled[i, j] = np.quantile(seen, rank, method="hazen")
    return filled


def gappy(seed=0, shape=(7, 30), ties=False):
    generator = np.random.default_rng(seed)
    rows = generator.lognormal(size=shape)
    rows = np.round(rows, 0 if ties else 12)
    return np.where(generator.random(shape) < 0.4, NAN, rows)


def ledger_of(rows, **options):
    mechanism = NoisySGD(10 * len(rows), 0.1, noise_std=1.0, max_grad_norm=4.0)
    steps = 10 * (np.arange(len(rows)) + 1)
    return GradNormLedger(mechanism, steps, rows, source="observed", **options)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_definition(seed, ties):
    rows = gappy(seed, ties=ties)
    rows[3] = NAN  # a row in which no example was drawn
    rows[:, 5] = NAN  # an example that never was
    filled = fill_by_rank(rows)
    np.testing.assert_allclose(filled, one_by_one(rows), rtol=1e-12)
    assert np.isnan(filled[3]).sum() == 30 and np.isnan(filled[:, 5]).all()


def test_observed_norms_stay_and_all_gaps_go():
    rows = gappy()
    filled = fill_by_rank(rows)
    seen = ~np.isnan(rows)
    np.testing.assert_array_equal(filled[seen], rows[seen])
    assert not np.isnan(filled).any()
    whole = np.random.default_rng(1).random((3, 4))
    np.testing.assert_array_equal(fill_by_rank(whole), whole)


def test_within_what_was_observed_in_the_row():
    rows = gappy()
    filled = fill_by_rank(rows)
    assert (filled.min(axis=1) == np.nanmin(rows, axis=1)).all()
    assert (filled.max(axis=1) == np.nanmax(rows, axis=1)).all()


def test_examples_in_another_order():
    rows, order = gappy(), np.random.default_rng(2).permutation(30)
    np.testing.assert_array_equal(
        fill_by_rank(rows[:, order]), fill_by_rank(rows)[:, order]
    )


def test_a_ledger_keeps_everything_else():
    ledger = ledger_of(gappy(), data_set="toy", example_ids=np.arange(30)[::-1])
    filled = filled_by_rank(ledger)
    np.testing.assert_allclose(
        filled.grad_norms, fill_by_rank(ledger.grad_norms), rtol=1e-6
    )
    assert filled.mechanism == ledger.mechanism and filled.source == "observed"
    assert filled.data_set == "toy"
    np.testing.assert_array_equal(filled.example_ids, ledger.example_ids)
    assert np.isnan(ledger.grad_norms).any()  # the ledger itself is unchanged


def test_shrinking_gradients_are_charged_as_they_were():
    generator = np.random.default_rng(0)
    own = generator.lognormal(size=200)
    rows = own * 4.0 * 0.2 ** np.arange(6)[:, None]  # all ranks stay
    drawn = generator.random(rows.shape) < 1 - np.exp(-1)
    observed = ledger_of(np.where(drawn, rows, NAN))
    truth = privacy_losses(ledger_of(rows), 8)
    never = ~drawn.any(axis=0)
    late = ~drawn[0] & ~never
    of_next, by_rank, smoothed = (
        (privacy_losses(observed, 8, gaps=gaps) / truth)[late]
        for gaps in ("next", "rank", "smoothed")
    )
    assert of_next.min() < 0.01  # what the next norm may undercharge
    assert by_rank.min() > 0.3  # ranks of a sample are rough, and a loss is steep
    assert np.abs(np.log(by_rank)).mean() < 0.2 * np.abs(np.log(of_next)).mean()
    assert smoothed.min() > 0.5
    filled = privacy_losses(filled_by_rank(observed), 8)
    np.testing.assert_array_equal(filled, privacy_losses(observed, 8, gaps="rank"))
