"""A chain of noisy steps whose gradients depend on the outputs, solved exactly.

Step t adds N(0, 1) to its vector; the example's ratio is ``large`` after an output
above a threshold, else ``small``. The thresholds leave a share of k/4 of the runs above
them, so finitely many equally likely runs are the whole distribution.
"""

import itertools
import math

import numpy as np
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from opacus_pi.accounting import GradNormLedger, NoisySGD


class Chain:
    def __init__(self, first, small, large, rate, shares):
        self.first, self.small, self.large = first, small, large
        self.rate, self.shares = rate, shares  # quarters above, after steps 1 … T-1
        self.num_steps = len(shares) + 1

    def paths(self):
        """Ratios of every run, ``(R, T)``, each equally likely."""
        quarters = itertools.product(range(4), repeat=len(self.shares))
        pick = {True: self.large, False: self.small}
        return np.array(
            [
                [
                    self.first,
                    *(pick[x < k] for x, k in zip(xs, self.shares, strict=True)),
                ]
                for xs in quarters
            ]
        )

    def ledger(self, ratios, steps=None, sampling="poisson"):
        """Ratios ``(T, n)`` as one run measured before every update, or some."""
        steps = list(range(self.num_steps)) if steps is None else steps
        clip = max(self.first, self.large)
        mechanism = NoisySGD(self.num_steps, self.rate, 1.0, clip, sampling=sampling)
        return GradNormLedger(mechanism, steps, np.asarray(ratios)[steps])

    def runs(self):
        """The whole distribution as equally likely ledgers of one example."""
        return [self.ledger(path[:, None]) for path in self.paths()]

    def _cut(self, ratio, quarters):
        """Threshold that a run with the example exceeds in that many quarters."""

        def excess(c):
            with_x = norm.sf(c - ratio)
            return self.rate * with_x + (1 - self.rate) * norm.sf(c) - quarters / 4

        return brentq(excess, -20, 20)

    def _partial(self, ratio, order, low, high):
        """E_Q[(P/Q)^order; low < z < high] of one step."""

        def integrand(z):
            likelihood = 1 + self.rate * math.expm1(ratio * z - ratio**2 / 2)
            return norm.pdf(z) * likelihood**order

        low, high = max(low, -12), min(high, 12 + order * ratio)
        return quad(integrand, low, high, epsabs=0, epsrel=1e-10, limit=200)[0]

    def divergence(self, order):
        """D_order of the whole chain with the example from that without."""

        def value(step, ratio):
            if step == self.num_steps:
                return self._partial(ratio, order, -math.inf, math.inf)
            cut = self._cut(ratio, self.shares[step - 1])
            below = self._partial(ratio, order, -math.inf, cut)
            above = self._partial(ratio, order, cut, math.inf)
            return below * value(step + 1, self.small) + above * value(
                step + 1, self.large
            )

        return math.log(value(1, self.first)) / (order - 1)


CHAINS = [
    Chain(0.6, 0.1, 0.9, 1.0, (1,)),
    Chain(0.4, 0.05, 1.2, 0.3, (1,)),
    Chain(0.5, 0.2, 1.0, 1.0, (1, 2)),
    Chain(1.0, 0.1, 1.6, 0.1, (3, 1)),
]
