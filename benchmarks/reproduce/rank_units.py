"""Units that rank examples by one seed's ledger: by proxies, and at several noises."""

from dataclasses import dataclass

from benchmarks.reproduce.experiment import Experiment, Facts
from benchmarks.reproduce.lab import Lab, scores_of
from benchmarks.reproduce.units import Training, Unit
from opacus_pi.difficulty.agreement import rank_correlations, rank_stability

LOSS = "privacy loss"


@dataclass(frozen=True)
class ProxyRanks(Unit):
    """Spearman's rho of every proxy with the privacy loss, over all examples."""

    experiment: Experiment
    seed: int

    def needs(self) -> list[Unit]:
        """The training."""
        return [Training(self.experiment, self.seed)]

    def facts(self) -> Facts:
        """What determines the scores, and the seed."""
        return self.experiment.ranking_facts() | {"seed": self.seed}

    def compute(self, lab: Lab) -> dict[str, float]:
        """By name of the proxy."""
        ledger = lab.ledger(self.experiment, self.seed)
        scores = scores_of([ledger], self.experiment.order)
        ranks = rank_correlations(scores)
        return {n: float(ranks.between(n, LOSS)[0]) for n in scores if n != LOSS}


@dataclass(frozen=True)
class NoiseRanks(Unit):
    """Spearman's rho between privacy losses at several noises of one ledger."""

    experiment: Experiment
    seed: int
    noise_stds: tuple[float, ...]  # on the sum of the gradients

    def needs(self) -> list[Unit]:
        """The training."""
        return [Training(self.experiment, self.seed)]

    def facts(self) -> Facts:
        """What determines the losses, the noises and the seed."""
        own = {"seed": self.seed, "noise_stds": list(self.noise_stds)}
        return self.experiment.ranking_facts() | own

    def compute(self, lab: Lab) -> list[list[float]]:
        """The matrix."""
        ledger, order = lab.ledger(self.experiment, self.seed), self.experiment.order
        return rank_stability(ledger, self.noise_stds, order).rho.tolist()
