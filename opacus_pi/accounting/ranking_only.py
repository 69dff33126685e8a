"""What may be said of norms that were measured to put examples in order.

Losses that follow from them rank examples. Nothing is claimed from them: no ε, no
guarantee, no confidence limit.
"""

from collections.abc import Iterable

from opacus_pi._validate import expect
from opacus_pi.accounting.guarantee import Assumption
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger

_HOW = "in bfloat16, for ranking only"


def only_rank(runs: Iterable[GradNormLedger]) -> bool:
    """Whether losses order examples and claim nothing: noise assumed, or norms unfit.

    Args:
        runs: The recorded runs.
    """
    return any(run.ranking_only or run.mechanism.assumed_noise for run in runs)


def unfit_norms(runs: Iterable[GradNormLedger]) -> tuple[Assumption, ...]:
    """The assumption that is not met if the norms of a run only rank examples.

    Args:
        runs: The recorded runs.

    Returns:
        It alone, or nothing.
    """
    if not any(run.ranking_only for run in runs):
        return ()
    return (Assumption("gradient norms were measured to be accounted", False, _HOW),)


def require_claimable(runs: Iterable[GradNormLedger]) -> None:
    """Refuse to claim something from what only ranks examples.

    Args:
        runs: The recorded runs.

    Raises:
        ValueError: If norms of one of them are marked so, or its noise was assumed.
    """
    runs = tuple(runs)
    expect(
        not unfit_norms(runs),
        "ledger",
        f"norms measured {_HOW}",
        "must hold norms that something may be claimed from",
        "Rank by privacy_losses, or record again in the model's own precision.",
    )
    expect(
        not any(run.mechanism.assumed_noise for run in runs),
        "noise_std",
        "an assumed one",
        "must be the noise that training added",
        "Rank by privacy_losses: of a noise that was not there, nothing follows.",
    )
