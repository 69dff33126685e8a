"""Groups of examples: one Poisson update, exact by enumeration and quadrature."""

import math
import warnings
from collections.abc import Iterator

import numpy as np
from scipy.special import logsumexp

from benchmarks.looseness.case import Array, Case
from opacus_pi.accounting import NoisySGD
from opacus_pi.accounting.group.divergence import group_divergence
from opacus_pi.accounting.group.moments import log_mean_exp, pair_exponents, subset_sums
from opacus_pi.ledger.gram_ledger import GramLedger


def _theorem_b1(full: Array, log_full: Array, rest: Array, log_rest: Array) -> float:
    """Return Theorem B.1's value of one update at order 2, over all minibatches."""
    size = len(full)
    pairs = np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1).reshape(-1, 2)
    weights = log_full[pairs].sum(axis=1)
    logs = [
        log_mean_exp(pair_exponents((full - u) @ (full - u).T, pairs), weights)
        for u in rest
    ]
    return float(np.exp(log_rest) @ logs)


def _mixture(points: Array, means: Array, log_weights: Array) -> Array:
    """Return the log density of a mixture of unit Gaussians."""
    square = ((points[:, None, :] - means) ** 2).sum(-1)
    dims = points.shape[1]
    return logsumexp(log_weights - square / 2, axis=1) - dims / 2 * math.log(
        2 * math.pi
    )


def group_steps(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """Yield updates with up to 3 retained and 3 forgotten points, in 1 or 2 dimensions.

    The densities of the weights are mixtures over all batches.
    """
    for _ in range(number):
        dims, order = int(rng.integers(1, 3)), int(rng.integers(2, 4))
        num_retain, num_forget = (int(k) for k in rng.integers(1, 4, size=2))
        retain = rng.normal(size=(num_retain, dims))
        forget = rng.normal(size=(num_forget, dims)) * rng.uniform(0.2, 1.0)
        rate = float(rng.choice([0.1, 0.3, 0.6]))
        full, log_full = subset_sums(np.concatenate([retain, forget]), rate)
        rest, log_rest = subset_sums(retain, rate)
        # the trapezoid rule converges geometrically: a coarse grid is enough in 2-D
        axis = np.linspace(-16, 16, 6401 if dims == 1 else 161)
        points = np.stack(np.meshgrid(*[axis] * dims), -1).reshape(-1, dims)
        log_p, log_q = (
            _mixture(points, full, log_full),
            _mixture(points, rest, log_rest),
        )
        exact = logsumexp(order * log_p + (1 - order) * log_q)
        exact += dims * math.log(axis[1] - axis[0])
        ledger = GramLedger(
            NoisySGD(1, rate, 1.0), steps=[1], grams=[forget @ forget.T]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no Monte Carlo for groups this small
            ours = {
                method: group_divergence(ledger, order, method=method)
                for method in ("coupled", "scalar", "operator_norm")
            }
        published = {}
        if order == 2:
            published["Theorem B.1"] = _theorem_b1(full, log_full, rest, log_rest)
        yield Case(
            "group, one update", exact / (order - 1), ours, published, tolerance=1e-7
        )
