"""Rankings of runs whose noise was assumed: no guarantee follows from them.

``with_noise_std`` asks what the losses would have been under another noise. Such losses
order examples by difficulty. They are not the losses of the run that was made, so no ε,
guarantee or confidence limit may be derived from them. The same holds for training with
adaptive clipping: Opacus divides the noisy count of unclipped gradients by the true
size of the batch, and the noise that it is charged for does not cover that.
"""

from collections.abc import Iterable

from opacus_pi._validate import expect
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger

__all__ = ["has_assumed_noise", "require_real_noise"]


def has_assumed_noise(runs: Iterable[GradNormLedger]) -> bool:
    """Return whether the noise of a run was assumed, so that losses only rank.

    Args:
        runs: The recorded runs.
    """
    return any(run.mechanism.assumed_noise for run in runs)


def require_real_noise(runs: Iterable[GradNormLedger]) -> None:
    """Refuse to claim something from a run whose noise was assumed.

    Args:
        runs: The recorded runs.

    Raises:
        ValueError: If the noise of one of them was assumed.
    """
    expect(
        not has_assumed_noise(runs),
        "noise_std",
        "an assumed one",
        "must be the noise that training added",
        "Noise is assumed after with_noise_std, and after adaptive clipping, whose "
        "accounting is not proved. It gives a ranking only: use privacy_losses to rank "
        "examples. For a guarantee, pass the ledger of a private training as it was "
        "recorded, without adaptive clipping.",
    )
