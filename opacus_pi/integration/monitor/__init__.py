"""Record training without clipping: plain SGD, or SGLD with noise on the mean gradient.

This is the training of the paper. The model is not wrapped and nothing is clipped, so
BatchNorm is allowed. At the rows of the ledger, between two updates, a sweep measures
the gradient norms of all examples.

* :mod:`~opacus_pi.integration.monitor.training`: ``monitor``, which installs the hooks;
* :mod:`~opacus_pi.integration.monitor.noise`: the noisy update;
* :mod:`~opacus_pi.integration.monitor.sampling`: sample rates of loaders and updates.

With noise, the loss must be the mean over the batch, and each update must use one
batch. In BatchNorm layers in training mode the examples of a batch change each other's
gradients, while sweeps use the running statistics: the norms are then the paper's
estimate, not a bound.
"""

from opacus_pi._promised import promise
from opacus_pi.integration.monitor.sampling import SamplingScheme, sampling_scheme
from opacus_pi.integration.monitor.training import monitor

__all__ = ["SamplingScheme", "monitor", "sampling_scheme"]

promise(__name__)
