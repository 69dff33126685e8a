"""What is learnt of the ranks of norms, against direct conditioning of normal laws."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import ndtri

from opacus_pi import GradNormLedger, NoisySGD
from opacus_pi.ledger import smoothed_ranks
from opacus_pi.ledger.smoothed_ranks import SmoothedRanks

NAN = np.nan


def trajectories(num_rows=30, num_examples=400, seed=0, share_drawn=0.3, noise=0.3):
    """Norms that shrink, of examples whose ranks change slowly; and who was drawn."""
    generator = np.random.default_rng(seed)
    slow = generator.normal(size=num_examples)
    scores = np.empty((num_rows, num_examples))
    kept = np.exp(-1 / num_rows / 0.5)
    for row in scores:
        fresh = generator.normal(size=num_examples)
        slow = kept * slow + np.sqrt(1 - kept**2) * fresh
        row[:] = np.sqrt(1 - noise) * slow
        row += np.sqrt(noise) * generator.normal(size=num_examples)
    norms = np.exp(1.2 * scores - 3 * np.arange(num_rows)[:, None] / num_rows)
    drawn = generator.random(norms.shape) < share_drawn
    return norms, drawn


def learnt(num_rows=30, **options):
    norms, drawn = trajectories(num_rows, **options)
    rows = np.where(drawn, norms, NAN)
    return SmoothedRanks.learnt_from(rows, np.full(num_rows, 4)), rows, norms


def scores_of(ranks, rows):
    """Normal scores by definition: the share of the row's norms below, ties halved."""
    found = np.full(rows.shape, NAN)
    for row, logs, out in zip(rows, ranks.sorted_logs, found, strict=True):
        for i in np.flatnonzero(~np.isnan(row)):
            value = np.log(np.float64(np.float32(row[i])))
            below, equal = (logs < value).sum(), (logs == value).sum()
            rank = np.clip((below + equal / 2) / len(logs), 0.5 / len(logs), None)
            out[i] = ndtri(min(rank, 1 - 0.5 / len(logs)))
    return found


def test_the_smoother_is_conditioning_on_all_draws():
    ranks, rows, _ = learnt(12, num_examples=60)
    plain = replace(ranks, scales=np.ones_like(ranks.scales))
    predicted = plain.predict(rows)
    scores, times = scores_of(ranks, rows), ranks.times
    apart = np.abs(times[:, None] - times)
    covariance = ranks.signal * np.exp(-apart / ranks.time_scale)
    for i in range(rows.shape[1]):
        seen = np.flatnonzero(~np.isnan(scores[:, i]))
        among = covariance[np.ix_(seen, seen)] + ranks.noise * np.eye(len(seen))
        gain = np.linalg.solve(among, covariance[seen]).T
        mean = gain @ scores[seen, i]
        slow = np.diag(covariance - gain @ covariance[seen])
        np.testing.assert_allclose(predicted.mean[:, i], mean, atol=1e-5)
        np.testing.assert_allclose(predicted.slow_std[:, i] ** 2, slow, atol=1e-5)
        whole = slow + ranks.noise
        np.testing.assert_allclose(predicted.std[:, i] ** 2, whole, atol=1e-5)


def test_the_persistence_is_found():
    ranks, _, _ = learnt(40, num_examples=3000)
    assert ranks.time_scale in (0.4, 0.8)  # 0.5 in truth; on the list these are next
    assert ranks.noise == pytest.approx(0.3, abs=0.1)
    assert ranks.signal + ranks.noise == pytest.approx(1, abs=0.05)


def test_norms_at_scores_are_those_of_the_row():
    ranks, rows, _ = learnt()
    scores = scores_of(ranks, rows)
    for row in (0, 17):
        seen = ~np.isnan(rows[row])
        again = ranks.norms_at(row, scores[row, seen])
        np.testing.assert_allclose(again, rows[row, seen], rtol=1e-6)
    extremes = ranks.norms_at(3, np.array([-8.0, 8.0]))
    wanted = np.nanmin(rows[3]), np.nanmax(rows[3])
    np.testing.assert_allclose(extremes, wanted, rtol=1e-6)


def test_the_spread_is_that_of_the_truth():
    ranks, rows, norms = learnt(30, num_examples=3000, seed=3)
    predicted = ranks.predict(rows)
    gaps = np.isnan(rows)
    truth = np.empty(norms.shape)
    for row, logs, out in zip(norms, ranks.sorted_logs, truth, strict=True):
        middles = (np.arange(len(logs)) + 0.5) / len(logs)
        out[:] = ndtri(np.interp(np.log(row), logs, middles))
    errors = ((truth - predicted.mean) / predicted.std)[gaps]
    assert abs(errors.mean()) < 0.03
    assert errors.std() == pytest.approx(1, abs=0.05)


def test_rows_without_draws_and_examples_without_draws():
    rows = np.full((3, 4), NAN)
    ranks = SmoothedRanks.learnt_from(rows, [2, 2, 2])
    assert np.isinf(ranks.norms_at(0, np.zeros(1)))  # nobody knows: the clip norm
    rows[1, :3] = 1.0, 2.0, 3.0
    ranks = SmoothedRanks.learnt_from(rows, [2, 2, 2])
    assert [len(logs) for logs in ranks.sorted_logs] == [3, 3, 3]
    predicted = ranks.predict(rows)
    assert (predicted.mean[:, 3] == 0).all() and (predicted.std > 0).all()


def test_equal_norms_have_equal_scores():
    ranks = SmoothedRanks.learnt_from([[1.0, 1.0, 5.0, 0.0]] * 2, [1, 1])
    predicted = ranks.predict([[1.0, 1.0, 5.0, NAN]] * 2)
    assert predicted.mean[0, 0] == predicted.mean[0, 1] < predicted.mean[0, 2]


def test_every_kth_example_is_learnt_from(monkeypatch):
    monkeypatch.setattr(smoothed_ranks, "_MAX_EXAMPLES", 100)
    ranks, rows, _ = learnt(num_examples=250)
    third = SmoothedRanks.learnt_from(rows[:, ::3], np.full(30, 4))
    np.testing.assert_array_equal(ranks.predict(rows).mean, third.predict(rows).mean)


def ledger():
    norms, drawn = trajectories()
    mechanism = NoisySGD(120, 0.3 / 4, noise_std=1.0, max_grad_norm=1.0)
    rows = np.where(drawn, norms, NAN)
    steps = 4 * np.arange(1, 31)
    return GradNormLedger(mechanism, steps, rows, source="observed")


def test_subsets_and_other_noise_keep_what_the_whole_run_learnt():
    run = ledger()
    part = run.subset([5, 2]).with_noise_std(3.0).subset([1])
    assert part.smoothed_ranks is run.smoothed_ranks
    assert run.with_noise_std(2.0).smoothed_ranks is run.smoothed_ranks


def test_parts_of_a_file_keep_what_the_whole_run_learnt(tmp_path, monkeypatch):
    for most in (1 << 14, 150):
        monkeypatch.setattr(smoothed_ranks, "_MAX_EXAMPLES", most)
        run = ledger()
        run.save(tmp_path / "run")
        whole = run.smoothed_ranks.predict(run.grad_norms)
        parts = list(GradNormLedger.load_chunks(tmp_path / "run", 130))
        assert [part.num_examples for part in parts] == [130, 130, 130, 10]
        means = [p.smoothed_ranks.predict(p.grad_norms).mean for p in parts]
        np.testing.assert_array_equal(np.concatenate(means, axis=1), whole.mean)


def test_a_saved_part_says_what_its_file_lacks(tmp_path, recwarn):
    run = ledger()
    run.smoothed_ranks.predict(run.grad_norms)
    run.save(tmp_path / "whole")
    assert not [w for w in recwarn if "ledger of only some" in str(w.message)]
    with pytest.warns(UserWarning, match="ledger of only some"):
        run.subset([1, 2]).save(tmp_path / "part")
