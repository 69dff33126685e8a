"""Check that a copy of a module computes with its own parameters.

Gradients of parameters without a rule are formed by running a copy of a layer, or of
the model. If a method was replaced by a function that refers to the original, such as
``layer.forward = lambda x: F.linear(x, layer.weight)``, the copy computes with the
original's parameters, and the gradients with respect to its own are zero.

*Guarantee.* It is found for the inputs of the call, from autograd's graph of a forward
pass on one example. Random states stay as they are, and the user's hooks are not run.

*What breaks it.* A function that refers to the original for other inputs only, and a
module that cannot be run on one example.
"""

import copy

import torch
from torch import nn

from opacus_pi._quiet import quiet
from opacus_pi._torch_compat import forward_hooks
from opacus_pi.gradients.fallback import MODEL_ERRORS, raise_if_out_of_memory
from opacus_pi.gradients.taps import Call
from opacus_pi.models.batches import map_tensors
from opacus_pi.models.copies import require_own_parameters, same_mode_copy
from opacus_pi.models.no_trace import random_state_untouched

_REFUSED = (
    'grad_sample_mode="fast" forms gradients on a copy. {error} Alternatively, use '
    'grad_sample_mode="hooks".'
)


def require_copyable(module: nn.Module, call: Call, size: int) -> None:
    """Raise if a copy of a module computes with the parameters of the module.

    Args:
        module: The live model, or a layer of it.
        call: Positional and keyword arguments of a call.
        size: The number of examples in the call.

    Raises:
        ValueError: If a gradient would flow to the original.
    """
    one = map_tensors(
        lambda t: t.detach()[:1] if t.shape[:1] == (size,) else t.detach(), call
    )
    try:
        copied = same_mode_copy(module)
        for part in copied.modules():
            forward_hooks(part).clear()  # hooks of the user may store tensors
        with (
            random_state_untouched(),
            quiet(),
            torch.enable_grad(),
        ):
            outputs = copied(*one[0], **one[1])
    except (*MODEL_ERRORS, copy.Error) as error:
        raise_if_out_of_memory(error)
        return
    try:
        require_own_parameters(outputs, module.parameters())
    except ValueError as error:
        raise ValueError(_REFUSED.format(error=error)) from error
