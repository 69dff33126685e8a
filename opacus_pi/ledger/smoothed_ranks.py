r"""Predictive distribution of an example's norms in updates that did not draw it.

**Idea.** In every row each drawn example has a rank among those drawn. Ranks change
slowly: an example with a large gradient now probably has one of the largest soon after.
The norms in other updates are therefore predicted in five steps:

1. every rank u in (0, 1) becomes a normal score y = Φ⁻¹(u), a value that is normally
   distributed over the examples;
2. an example's scores are a slowly changing part (variance s², correlation
   exp(-|Δ|/τ) over a share Δ of the training) and independent noise of variance r;
3. the slow part at every row is estimated from *all* draws of the example, earlier and
   later ones;
4. in an update that did not draw the example, its score is normally distributed with
   this mean; the variance is calibrated on the prediction errors of the draws;
5. the norm is the one that has this rank among the norms of the row.

The number that is charged is the *mean* of the loss over this distribution, never the
loss at its mean: losses are convex in the norm, so the second would charge too little.

**Guarantee.** None for a single example: this is an estimate. It is fair on average,
because a Poisson draw does not look at the weights: an example that a row did not draw
has the same distribution of (prediction, norm) as one that it drew, and the prediction
for a drawn example, made without this draw, can be compared with its norm.

**What breaks it.** Norms that jump between two draws of an example without any effect
on its ranks, and rows that drew only a handful of examples, and so have few norms. An
example that was never drawn has the distribution of all examples.

Source: own derivation; docs/theory.md, Section 14. The filter is Kalman's (1960), the
smoother combines a filter from each end (Fraser and Potter 1969).

>>> rows = [[8, 6, np.nan, 2], [8, np.nan, 4, 2], [np.nan, 6, 4, 2]]
>>> ranks = SmoothedRanks.learnt_from(rows, num_updates=[5, 5, 5])
>>> scores = ranks.predict(rows)
>>> scores.mean.shape, bool(scores.mean[2, 0] > scores.mean[2, 2])
((3, 4), True)
>>> float(ranks.norms_at(2, np.array([-9.0]))[0].round(9))  # the row's least
2.0
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi.ledger.gap_filling import middle_ranks

__all__ = ["PredictedScores", "SmoothedRanks", "sampling_step"]

Array = NDArray[np.float64]
_MAX_EXAMPLES = 1 << 14  # the distribution is fitted to so many; more change little
_TIME_SCALES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 1e6)  # shares of the training
_AT_ONCE = 2048  # examples predicted at a time: what the caches hold
_NUM_LEVELS, _NUM_TIMES = 6, 5  # cells in which the spread is calibrated
_PRIOR_DRAWS = 50.0  # weight of the model's own spread in each cell, in draws
_LARGEST_SHARE = 0.95  # of the variance; the slow part has at most this
_TINY = 1e-30  # the least norm whose logarithm is taken


@dataclass(frozen=True, eq=False)
class PredictedScores:
    """Mean and spread of the normal scores that examples may have had.

    Args:
        mean: float32 ``(N, n)``.
        std: float32 ``(N, n)``, standard deviation of a score: slow part and noise
            together.
        slow_std: float32 ``(N, n)``, standard deviation of the slow part alone.
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    slow_std: NDArray[np.float32]

    def of_examples(self, columns: NDArray[np.int64] | slice) -> "PredictedScores":
        """Return the scores of some examples."""
        parts = (self.mean, self.std, self.slow_std)
        return PredictedScores(*(part[:, columns] for part in parts))


@dataclass(frozen=True, eq=False)
class SmoothedRanks:
    """The persistence of ranks in a run's draws, and the norms of each row.

    Args:
        times: float64 ``(N,)``, the middle of each row's updates as a share of the
            training.
        time_scale: τ, the share of the training after which the correlation of an
            example's ranks has fallen to 1/e.
        signal: s², variance of the slowly changing part.
        noise: r, variance of the rest.
        num_examples: Number of examples of the run to which this was fitted.
        num_draws: Mean number of draws of an example.
        sorted_logs: For each row the ascending logarithms of the norms drawn in it.
        level_bounds: float64 ``(5,)``, the bounds between the six levels of predicted
            scores that are calibrated separately.
        scales: float64 ``(5, 6)``, for each part of the training and level, the factor
            by which prediction errors exceed the variance of the model.
    """

    times: Array
    time_scale: float
    signal: float
    noise: float
    num_examples: int
    num_draws: float
    sorted_logs: Sequence[Array]
    level_bounds: Array
    scales: Array

    @classmethod
    def learnt_from(cls, rows: ArrayLike, num_updates: ArrayLike) -> "SmoothedRanks":
        """Fit the distribution to all draws of a run.

        At most 16,384 examples are used: of more, every k-th.

        Args:
            rows: ``(N, n)``, raw gradient norms, NaN where not drawn. Infinite norms
                stand for the clip norm and are not used.
            num_updates: ``(N,)``, number of updates of each row, at least 1.
        """
        norms = np.asarray(rows, dtype=np.float32)
        num_examples = norms.shape[1]
        norms = norms[:, :: sampling_step(num_examples)]
        ends = np.cumsum(np.asarray(num_updates, dtype=np.float64))
        times = (ends - np.asarray(num_updates) / 2) / ends[-1]
        logs = [_sorted_logs(row) for row in norms]
        scores = np.stack(
            [_scores(row, log) for row, log in zip(norms, logs, strict=True)]
        )
        time_scale, signal, noise = _persistence(scores, times)
        fresh = cls(
            times,
            time_scale,
            signal,
            noise,
            num_examples,
            float(np.isfinite(scores).sum() / max(1, scores.shape[1])),
            _filled(logs),
            np.zeros(_NUM_LEVELS - 1),
            np.ones((_NUM_TIMES, _NUM_LEVELS)),
        )
        return fresh._calibrated(scores)

    @property
    def error_time_scale(self) -> float:
        """The share of the training after which an error in the slow part is forgotten.

        Between draws the slow part drifts, and each draw corrects it: for a continuous
        stream of draws the error decays at the rate √(1/τ² + 2s²·K/(τ·r)), where K is
        the number of draws.

        Source: Kalman and Bucy 1961, for a stationary process of the first order.
        """
        rate = 1 / self.time_scale
        corrected = 2 * rate * self.signal * self.num_draws / self.noise
        return 1 / math.sqrt(rate**2 + corrected)

    def predict(self, rows: ArrayLike) -> PredictedScores:
        """Return the distribution of each example's scores in updates without it.

        Args:
            rows: ``(N, m)``, raw norms of any examples of the run, NaN where not drawn.
        """
        norms = np.asarray(rows, dtype=np.float32)
        parts = np.empty((3, *norms.shape), np.float32)
        for start in range(0, norms.shape[1], _AT_ONCE):
            block = slice(start, start + _AT_ONCE)
            self._predict_into(parts[:, :, block], norms[:, block])
        return PredictedScores(*parts)

    def _predict_into(
        self, parts: NDArray[np.float32], norms: NDArray[np.float32]
    ) -> None:
        """Write mean, spread, and spread of the slow part, ``(3, N, m)``."""
        scores = np.stack(
            [
                _scores(row, log)
                for row, log in zip(norms, self.sorted_logs, strict=True)
            ]
        )
        others, variance = self._from_other_draws(scores)
        drawn = ~np.isnan(scores)
        gain = np.where(drawn, variance / (variance + self.noise), 0.0)
        mean = others + gain * np.where(drawn, scores - others, 0.0)
        slow, scale = variance * (1 - gain), self._scale_at(mean)
        parts[0], parts[2] = mean, np.sqrt(slow * scale)
        parts[1] = np.sqrt((slow + self.noise) * scale)

    def norms_at(self, row: int, scores: Array) -> Array:
        """Return the norms at which a row's norms have given normal scores.

        Args:
            row: Position of the row.
            scores: Normal scores, any shape.

        Returns:
            float64 in the shape of ``scores``: a geometric interpolation between two
            norms of the row; beyond its norms the least or the largest of them.
        """
        from scipy.special import ndtr  # takes a quarter of a second

        logs = self.sorted_logs[row]
        norms: Array = np.exp(np.interp(ndtr(scores), middle_ranks(len(logs)), logs))
        return norms

    def _from_other_draws(self, scores: Array) -> tuple[Array, Array]:
        """Return mean and variance of the slow part, without each row's own draw."""
        ahead, ahead_variance = self._filter(scores, self.times)
        back, back_variance = (
            x[::-1] for x in self._filter(scores[::-1], self.times[::-1])
        )
        # Two estimates that share nothing but the prior, which is removed once.
        variance = 1 / (1 / ahead_variance + 1 / back_variance - 1 / self.signal)
        return variance * (ahead / ahead_variance + back / back_variance), variance

    def _filter(self, scores: Array, times: Array) -> tuple[Array, Array]:
        """Return mean and variance of the slow part, from the rows before each row."""
        mean = np.zeros(scores.shape[1])
        variance = np.full(scores.shape[1], self.signal)
        means, variances = np.empty(scores.shape), np.empty(scores.shape)
        kept = np.exp(-np.abs(np.diff(times, prepend=times[:1])) / self.time_scale)
        undrawn = np.isnan(scores)
        filled = np.where(undrawn, 0.0, scores)
        for row, score in enumerate(filled):
            mean = mean * kept[row]
            variance = (variance - self.signal) * kept[row] ** 2 + self.signal
            means[row], variances[row] = mean, variance
            gain = variance / (variance + self.noise)
            gain[undrawn[row]] = 0.0
            mean = mean + gain * (score - mean)
            variance = variance * (1 - gain)
        return means, variances

    def _calibrated(self, scores: Array) -> "SmoothedRanks":
        """Return these ranks with the spread calibrated on the errors of the draws."""
        others, variance = self._from_other_draws(scores)
        row, example = np.nonzero(~np.isnan(scores))
        if not len(row):
            return self
        predicted = others[row, example]
        errors = (scores[row, example] - predicted) ** 2
        errors /= variance[row, example] + self.noise
        shares = np.arange(1, _NUM_LEVELS) / _NUM_LEVELS
        bounds = np.quantile(predicted, shares)
        cells = _cells(self.times)[row] * _NUM_LEVELS + np.searchsorted(
            bounds, predicted
        )
        count = _NUM_TIMES * _NUM_LEVELS
        sums = np.bincount(cells, errors, minlength=count) + _PRIOR_DRAWS
        scales = sums / (np.bincount(cells, minlength=count) + _PRIOR_DRAWS)
        scales = scales.reshape(_NUM_TIMES, _NUM_LEVELS)
        return replace(self, level_bounds=bounds, scales=scales)

    def _scale_at(self, mean: Array) -> Array:
        """Return the calibration factor at each row and example, ``(N, n)``."""
        levels = np.searchsorted(self.level_bounds, mean)
        scales: Array = self.scales[_cells(self.times)[:, None], levels]
        return scales


def sampling_step(num_examples: int) -> int:
    """Return k, where every k-th example is used to fit the distribution.

    Args:
        num_examples: Number of examples of the run.
    """
    return max(1, -(-num_examples // _MAX_EXAMPLES))


def _sorted_logs(row: NDArray[np.float32]) -> Array:
    """Return the ascending logarithms of a row's finite norms."""
    norms = np.sort(row[np.isfinite(row)].astype(np.float64))
    return np.log(np.maximum(norms, _TINY))


def _scores(row: NDArray[np.float32], logs: Array) -> Array:
    """Return the normal scores of norms among the norms of a row; NaN where not drawn.

    Equal norms share the middle of their ranks.
    """
    from scipy.special import ndtri  # takes a quarter of a second

    scores = np.full(len(row), np.nan)
    drawn = np.isfinite(row)
    if len(logs):
        values = np.log(np.maximum(row[drawn].astype(np.float64), _TINY))
        below = np.searchsorted(logs, values, side="left")
        upto = np.searchsorted(logs, values, side="right")
        edge = 0.5 / len(logs)
        ranks = np.clip((below + upto) / (2 * len(logs)), edge, 1 - edge)
        scores[drawn] = ndtri(ranks)
    return scores


def _persistence(scores: Array, times: Array) -> tuple[float, float, float]:
    """Return time scale, variance of the slow part, and variance of the noise.

    The mean product of two scores of one example, Δ apart, is s²·exp(-|Δ|/τ). For each
    τ of a list, s² is fitted by least squares, weighted by the number of products.
    """
    drawn = ~np.isnan(scores)
    filled = np.nan_to_num(scores)
    counted = drawn.astype(np.float64)
    # The scores of a row with few draws say little about their variance, which is 1.
    total = float((filled**2).sum() + _PRIOR_DRAWS) / (drawn.sum() + _PRIOR_DRAWS)
    first, second = np.triu_indices(len(times), 1)
    products = (filled @ filled.T)[first, second]
    counts = (counted @ counted.T)[first, second]
    apart = np.abs(times[second] - times[first])
    best = (np.inf, 1.0, 0.0)
    for scale in _TIME_SCALES:
        shape = np.exp(-apart / scale)
        norm = float((shape * shape) @ counts)
        fitted = float(shape @ products) / norm if norm else 0.0
        signal = float(np.clip(fitted, 0.01 * total, _LARGEST_SHARE * total))
        error = signal**2 * norm - 2 * signal * float(shape @ products)
        best = min(best, (error, scale, signal))
    return best[1], best[2], total - best[2]


def _cells(times: Array) -> NDArray[np.int64]:
    """Return the part of the training, for the calibration, in which each row lies."""
    return np.minimum((times * _NUM_TIMES).astype(np.int64), _NUM_TIMES - 1)


def _filled(logs: list[Array]) -> list[Array]:
    """Give rows without any draw the norms of the next row, else of the last."""
    known = [i for i, log in enumerate(logs) if len(log)]
    if not known:
        return [np.array([np.inf])] * len(logs)
    places = np.minimum(np.searchsorted(known, np.arange(len(logs))), len(known) - 1)
    return [logs[known[place]] for place in places]
