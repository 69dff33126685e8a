"""Layers whose per-example gradients a function of the user's computes.

Opacus calls the function that was registered for the type of a layer
(``register_grad_sampler``, ``register_norm_sampler``). Clipping and norms are what this
function returns. That their sum is the gradient does not show that each row is right:
equal rows, or rows in another order, have the same sum. So the link "norm" is unchecked
until an audit has compared the norms with those of single examples.
"""

from opacus.grad_sample import AbstractGradSampleHooks

from opacus_pi.integration.opacus_compat import module_of, samplers_of

__all__ = ["own_samplers"]

_REGISTERED = (
    "The per-example gradients of {layers} are computed by a function that was "
    "registered with Opacus by other code, and it was not checked whether each row is "
    "the gradient of its example. If it is not, clipping and norms are wrong. Call "
    "engine.audit(criterion), which compares the norms with those of single examples."
)
_LIBRARIES = ("opacus", "opacus_pi")


def own_samplers(hooks: AbstractGradSampleHooks) -> str | None:
    """Say for which types of layers the user has registered a function.

    Args:
        hooks: What ``make_private`` returned for the model.

    Returns:
        Sentences for the link "norm"; None if there is no such layer.
    """
    found = {
        type(layer).__name__
        for layer in module_of(hooks).modules()
        if any(p.requires_grad for p in layer.parameters(recurse=False))
        and any(
            (sampler.__module__ or "").split(".")[0] not in _LIBRARIES
            for sampler in samplers_of(hooks, layer)
        )
    }
    if not found:
        return None
    return _REGISTERED.format(layers=", ".join(sorted(found)))
