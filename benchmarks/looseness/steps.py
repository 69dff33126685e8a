"""Steps to unlearn on the same constants, by this library and by published bounds."""

from collections.abc import Iterator
from typing import Any

from opacus_pi.accounting.langevin.constants import LangevinConstants
from opacus_pi.accounting.langevin.lsi import lsi_track
from opacus_pi.accounting.langevin.unlearning import steps_to_unlearn
from opacus_pi.accounting.published import (
    chien_rate,
    corollary_4_4_steps,
    steps_at_rate,
)

ETA, SIGMA, M, L, TARGET, LEARNED = 0.5, 0.03, 0.0119, 0.2619, 0.01, 1000


def step_counts() -> Iterator[dict[str, Any]]:
    """Yield the steps on a strongly convex problem, for several orders and losses.

    The losses are D_α = α·μ²/2. Corollary 4.4 is evaluated in its best case, training
    at stationarity (both of its ε are 0).
    """
    constants = LangevinConstants(
        learning_rate=ETA,
        noise_variance=2 * ETA * SIGMA**2,
        smoothness=L,
        strong_convexity=M,
    )
    lsi = lsi_track(
        0.0,
        LEARNED,
        lipschitz=constants.lipschitz,
        noise_variance=constants.noise_variance,
    )[-1]
    rate = chien_rate(
        learning_rate=ETA, sigma=SIGMA, strong_convexity=M, lsi=2 * SIGMA**2 / M
    )
    for order in (2.0, 4.0, 16.0):
        for loss in (0.1, 1.0, 10.0, 100.0):
            slope = loss / order

            def divergence(a: float, slope: float = slope) -> float:
                return slope * a

            ours = steps_to_unlearn(
                divergence, order, TARGET, constants, initial_lsi=lsi
            )
            at_order = steps_to_unlearn(loss, order, TARGET, constants, initial_lsi=lsi)
            yield {
                "order": order,
                "loss": loss,
                "corollary_4_4": corollary_4_4_steps(
                    order, 4 * loss, 0.0, 0.0, target=TARGET, rate=rate
                ),
                "chien_rate": steps_at_rate(loss, order, TARGET, rate),
                "ours_loss_at_order_only": at_order.num_steps,
                "ours": ours.num_steps,
            }
