"""Forward hooks on what ``make_private`` returned for the model.

The probe of the model (:mod:`~opacus_pi.custody.model_probe`) repeats the forward pass
of the user's module. A hook on the wrapper that Opacus puts around it runs afterwards,
and may replace the outputs, for example by centred ones. So the link "model" is
unchecked while there is such a hook.

*What breaks it.* Functions that the loop applies to the outputs are a part of the loss.
"""

from opacus.grad_sample import AbstractGradSampleHooks
from torch import nn

from opacus_pi._torch_compat import forward_hooks
from opacus_pi.custody import Chain
from opacus_pi.models.copies import is_hook_of_opacus

__all__ = ["look_for_wrapper_hooks"]

_HOOKED = (
    "A forward hook was registered on the model that make_private returned. It runs "
    "after the model and may change its outputs, for example by the mean over the "
    "batch, and the check of the model does not include it. Register the hook on "
    "the module that was passed to make_private, before that call."
)


def look_for_wrapper_hooks(hooks: AbstractGradSampleHooks, chain: Chain) -> None:
    """Leave the link "model" unchecked if the wrapper has a hook of the user's.

    Args:
        hooks: What ``make_private`` returned for the model.
        chain: The chain of custody of the run.
    """
    present = forward_hooks(hooks) if isinstance(hooks, nn.Module) else None
    if present and not all(map(is_hook_of_opacus, present.values())):
        chain.leave_unchecked("model", _HOOKED)
