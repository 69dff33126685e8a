"""Run a torch model without changing it: copies, contexts, batches, losses.

The packages that measure, evaluate, align or unlearn a model share these files:

* ``copies``: model copies, without the wrappers of training
* ``accelerators``: the accelerator of this process, its random states
* ``no_trace``: contexts that restore random states, modes and switches
* ``batches``: batches as users have them, tensors or tuples and dicts of tensors
* ``losses``: one loss per example, in float64, and its gradient by the outputs
* ``predictions``: one forward pass over a data set
* ``weights_name``: the name of a model's weights, a hash

Everything here is private and may change; the packages above export the public
functions.
"""

from opacus_pi._promised import promise

__all__: list[str] = []

promise(__name__)
