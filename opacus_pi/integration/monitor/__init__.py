"""The paper's training, recorded: plain SGD, or SGLD with noise on the mean gradient.

The model stays as it is and nothing is clipped, so BatchNorm is allowed. The norms of
all examples are measured by sweeps between updates.

With noise, the user's loop gives the mean gradient of the b rows drawn. A mechanism
whose ratio of gradient to noise is known must divide by a number that does not depend
on the draw, so the gradient is first multiplied by b / E[B]:

    Σ_i ∇ℓ_i / E[B] + N(0, noise_std² I),  noise on the sum: noise_std · E[B]

This needs a loss that is the mean over the batch, and one batch per update. Through
BatchNorm in training mode the examples of a batch change each other's gradients, and
sweeps measure with its running statistics: the paper's estimate, not a bound.
"""

from opacus_pi.integration.monitor.draws import Draws, draws_of
from opacus_pi.integration.monitor.monitored import monitor

__all__ = ["Draws", "draws_of", "monitor"]
