r"""Log moments of one update that may contain members of a whole group.

**Idea.** The batch is (a batch of the rest) ∪ S, where S contains each of the m forget
examples with probability q. If the rest is equal in both training runs, joint convexity
removes it from the formula, and expanding the power gives

:math:`\ln M(a) \le \ln E_{S_1 \dots S_a} \exp \sum_{i<j} \langle V_{S_i},
V_{S_j} \rangle`,

with V_S = Σ_{x∈S} g_x/σ: only the Gram matrix K of the forget gradients is needed. The
value is 0 without forget examples and the single example's moment for m = 1.

**Guarantee.** Exact while all multisets of subsets can be enumerated, otherwise a Monte
Carlo estimate.

**What breaks it.** The exponent grows with the square of the group's size, so a few
rare tuples dominate the expectation of a large group. A sample that misses them is too
low: ``largest_share`` shows whether to trust it. The expansion needs integer orders.

Source: paper, Appendix B.1, for the expansion; docs/theory.md, Section 4.

>>> K = np.array([[1.0]])  # one example, gradient as long as the noise's deviation
>>> round(coupled_log_moment(K, 0.1, 2).log_moment, 12)  # ln(1 + q²(e − 1))
0.017036863236
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.special import gammaln, logsumexp
from scipy.stats import binom

from opacus_pi._types import ArrayLike
from opacus_pi._validate import numbers

EXACT_LIMIT = 100_000  # number of multisets of subsets up to which all are enumerated
_CHUNK_ENTRIES = 4_000_000  # entries of sampled subsets held in memory at a time


@dataclass(frozen=True)
class MomentEstimate:
    """A log moment and its reliability.

    Attributes:
        log_moment: ln M, in nats.
        effective_size: Effective number of sampled tuples; ``inf`` when exact.
        largest_share: Share of the largest sampled term in the sum; 0 when exact. Above
            0.01 the estimate is unreliable, and probably too low.
    """

    log_moment: float
    effective_size: float = math.inf
    largest_share: float = 0.0


def pair_exponents(
    gram: NDArray[np.float64], tuples: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return Σ_{i<j} ⟨V_{t_i}, V_{t_j}⟩ of index tuples, which is −Δ/2 of Theorem B.1.

    Args:
        gram: ``(J, J)``, centred.
        tuples: int ``(L, a)``.

    Returns:
        float64 ``(L,)``.
    """
    pairs = itertools.combinations(range(tuples.shape[1]), 2)
    zero = np.zeros(len(tuples))
    return sum((gram[tuples[:, i], tuples[:, j]] for i, j in pairs), zero)


def log_mean_exp(exponents: ArrayLike, log_weights: ArrayLike) -> float:
    """Return ln Σ w·e^x for weights that sum to 1, accurate also near 0.

    Positive and negative x are summed apart as w·|e^x − 1|, so that a small logarithm
    is not lost against 1.

    Args:
        exponents: x, ``(L,)``.
        log_weights: ln w, ``(L,)`` or a number.

    Returns:
        The logarithm.
    """
    x, w = np.broadcast_arrays(numbers("exponents", exponents), log_weights)
    with np.errstate(divide="ignore", over="ignore"):
        # ln|e^x − 1| = max(x, 0) + ln(1 − e^{−|x|})
        excess = w + np.maximum(x, 0) + np.log(-np.expm1(-np.abs(x)))
    up = logsumexp(excess[x > 0]) if (x > 0).any() else -math.inf
    down = logsumexp(excess[x < 0]) if (x < 0).any() else -math.inf
    if up > 0:
        return float(up + np.log1p((1 - math.exp(down)) * math.exp(-up)))
    return float(np.log1p(math.exp(up) - math.exp(min(down, 0.0))))


def coupled_log_moment(
    gram: ArrayLike,
    sample_rate: float,
    order: float,
    *,
    num_samples: int = 20_000,
    generator: np.random.Generator | None = None,
) -> MomentEstimate:
    """Return the log moment of the coupled bound at an integer order.

    Exact by enumeration while there are at most ``EXACT_LIMIT`` multisets of subsets,
    otherwise Monte Carlo over tuples of subsets. Only tuples with two or more non-empty
    subsets are sampled (all others contribute exactly 0).

    Args:
        gram: K ``(m, m)``, clipped and divided by σ².
        sample_rate: q.
        order: a ≥ 1, an integer if q < 1.
        num_samples: Number of tuples sampled.
        generator: Source of randomness; default: seed 0, so that calls agree.

    Returns:
        The moment with its reliability. A sampled one is not a bound: it is biased low.
    """
    K = numbers("gram", gram)
    size = len(K)
    if size == 0 or order <= 1 or sample_rate == 0 or not K.any():
        return MomentEstimate(0.0)
    if sample_rate == 1:
        return MomentEstimate(order * (order - 1) / 2 * float(K.sum()))
    order = int(order)
    if size <= 16 and math.comb(2**size + order - 1, order) <= EXACT_LIMIT:
        return MomentEstimate(_enumerate(K, sample_rate, order))
    generator = np.random.default_rng(0) if generator is None else generator
    return _sample(K, sample_rate, order, num_samples, generator)


def subset_sums(
    vectors: ArrayLike, sample_rate: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return all sums of subsets of the rows, and their log probabilities.

    Args:
        vectors: ``(m, …)``.
        sample_rate: q.

    Returns:
        Sums ``(2^m, …)`` and log probabilities ``(2^m,)``.
    """
    rows = numbers("vectors", vectors)
    bits = np.array(list(itertools.product((0.0, 1.0), repeat=len(rows))))
    chosen = bits.sum(axis=1)
    return np.tensordot(bits, rows, 1), subset_log_probability(
        chosen, len(rows), sample_rate
    )


def subset_log_probability(
    chosen: ArrayLike, size: int, sample_rate: float
) -> NDArray[np.float64]:
    """Return the logarithm of q^k(1 − q)^(m−k), with 0·ln 0 = 0.

    Args:
        chosen: k, the number of examples in the subset, any shape.
        size: m.
        sample_rate: q.

    Returns:
        float64 in the shape of ``chosen``.
    """
    k = numbers("chosen", chosen)
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.where(k > 0, k * np.log(sample_rate), 0.0)
        outside = np.where(k < size, (size - k) * np.log1p(-sample_rate), 0.0)
    return inside + outside


def _enumerate(K: NDArray[np.float64], sample_rate: float, order: int) -> float:
    """Return the log moment over all multisets of subsets."""
    bits, log_weights = subset_sums(np.eye(len(K)), sample_rate)
    choose = itertools.combinations_with_replacement(range(len(bits)), order)
    tuples = np.fromiter(itertools.chain.from_iterable(choose), np.int64)
    tuples = tuples.reshape(-1, order)
    # Orderings of a multiset: a! over the product of its multiplicities' factorials.
    run = np.ones(tuples.shape)
    for k in range(1, order):
        run[:, k] += run[:, k - 1] * (tuples[:, k] == tuples[:, k - 1])
    log_count = gammaln(order + 1) - np.log(run).sum(axis=1)
    weights = log_count + log_weights[tuples].sum(axis=1)
    return max(0.0, log_mean_exp(pair_exponents(bits @ K @ bits.T, tuples), weights))


def _sample(
    K: NDArray[np.float64],
    sample_rate: float,
    order: int,
    num_samples: int,
    generator: np.random.Generator,
) -> MomentEstimate:
    """Return the log moment over random tuples with at least two non-empty subsets."""
    filled = -math.expm1(len(K) * math.log1p(-sample_rate))  # P(S is not empty)
    counts = np.arange(2, order + 1)
    log_share = binom.logpmf(counts, order, filled)
    log_hit = float(logsumexp(log_share))
    share = np.exp(log_share - log_hit)
    drawn = generator.choice(counts, size=num_samples, p=share / share.sum())
    step = max(1, _CHUNK_ENTRIES // (len(K) * order))
    starts = range(0, num_samples, step)
    exponents = np.concatenate(
        [_exponents(K, sample_rate, drawn[i : i + step], generator) for i in starts]
    )
    with np.errstate(divide="ignore"):
        terms = np.maximum(exponents, 0) + np.log(-np.expm1(-np.abs(exponents)))
    total, squares = logsumexp(terms), logsumexp(2 * terms)
    # E over all tuples: a share of 1 − P(two non-empty) contributes exponent 0.
    mean = log_mean_exp(exponents, -math.log(num_samples) + log_hit)
    return MomentEstimate(
        max(0.0, mean),
        effective_size=float(np.exp(2 * total - squares)),
        largest_share=float(np.exp(terms.max() - total)),
    )


def _exponents(
    K: NDArray[np.float64],
    sample_rate: float,
    counts: NDArray[np.int64],
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """Return Σ_{i<j} b_iᵀKb_j of one tuple of non-empty random subsets per count.

    It is (joint sum's square minus the subsets' own squares) / 2, which costs one
    product with K per subset instead of one per pair.
    """
    subsets = _nonempty_subsets(int(counts.sum()), len(K), sample_rate, generator)
    own = np.asarray(subsets.multiply(subsets @ K).sum(axis=1)).ravel()
    owner = np.repeat(np.arange(len(counts)), counts)
    ones = np.ones(len(owner))
    gather = csr_matrix((ones, (owner, np.arange(len(owner)))))
    joint = gather @ subsets
    whole = np.asarray(joint.multiply(joint @ K).sum(axis=1)).ravel()
    pairs: NDArray[np.float64] = (whole - gather @ own) / 2
    return pairs


def _nonempty_subsets(
    number: int, size: int, sample_rate: float, generator: np.random.Generator
) -> csr_matrix:
    """Return Poisson samples of 0 … size − 1 that are not empty, as 0/1 rows."""
    log_out = math.log1p(-sample_rate)
    filled = -math.expm1(size * log_out)
    first = np.log1p(-generator.random(number) * filled) / log_out
    rows, position = np.arange(number), np.minimum(first.astype(np.int64), size - 1)
    chosen_rows, chosen = [rows], [position]
    # The gaps between members are geometric: skipping from member to member takes as
    # many rounds as the largest subset has members, not as many as there are examples.
    while len(rows):
        position = position + generator.geometric(sample_rate, size=len(rows))
        rows, position = rows[position < size], position[position < size]
        chosen_rows.append(rows)
        chosen.append(position)
    index = (np.concatenate(chosen_rows), np.concatenate(chosen))
    return csr_matrix((np.ones(len(index[0])), index), shape=(number, size))
