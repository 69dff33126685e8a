"""Random small ridge problems with requests, and what the oracle says about them."""

from dataclasses import dataclass

import numpy as np

from opacus_pi.unlearning.heads import RidgeHead
from tests.unlearning.heads.extended_precision import law


@dataclass
class Ridge:
    """A ridge problem: rows, settings, and requests ``(indices, num_steps)``."""

    rows: np.ndarray
    targets: np.ndarray
    settings: dict
    requests: list

    @classmethod
    def random(cls, rng):
        n, d, m = (int(rng.integers(*r)) for r in ((8, 14), (1, 5), (1, 4)))
        rows = rng.normal(size=(n, d))
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1)
        penalty = float(10 ** rng.uniform(-2, -0.3))
        settings = {
            "regularisation": penalty,
            "learning_rate": float(rng.uniform(0.3, 1)) / (1 + penalty),
            "noise_std": float(10 ** rng.uniform(-1.7, -0.7)),
            "initial_std": float(rng.choice([0.0, 0.1])),
            "num_steps": int(rng.integers(1, 40)),
            "denominator": float(n + rng.integers(3)),
        }
        order = rng.permutation(n)
        sizes = rng.choice([1, 2, 3], size=rng.integers(1, 3), p=[0.5, 0.3, 0.2])
        requests = [
            (np.sort(order[end - size : end]), int(rng.integers(0, 12)))
            for size, end in zip(sizes, np.cumsum(sizes), strict=True)
        ]
        return cls(rows, rng.normal(size=(n, m)), settings, requests)

    def head(self, seed=0):
        return RidgeHead(seed=seed, **self.settings).fit(self.rows, self.targets)

    def laws(self):
        """The law after all requests, and that of retraining."""
        kept = np.ones(len(self.rows), dtype=bool)
        phases = [(self.rows, self.targets, self.settings["num_steps"])]
        for indices, num_steps in self.requests:
            kept[indices] = False
            phases.append((self.rows[kept], self.targets[kept], num_steps))
        total = sum(phase[2] for phase in phases)
        shared = ("learning_rate", "noise_std", "initial_std", "denominator")
        constants = {name: self.settings[name] for name in shared}
        constants["penalty"] = self.settings["regularisation"]
        again = [(self.rows[kept], self.targets[kept], total)]
        return law(phases, **constants), law(again, **constants)
