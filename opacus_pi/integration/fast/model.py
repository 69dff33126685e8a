"""The model's side of the fast mode: option checks, and Opacus's interface to a cache.

``make_private`` returns either :class:`FastHooks`, which leaves the model as it is, or
:class:`FastGradSampleModule`, a wrapper. Both fill a per-batch cache while the loop
runs its forward and backward passes, and form no per-example gradients.
"""

from typing import Any, cast

from opacus.grad_sample import AbstractGradSampleModule, GradSampleHooks
from opacus.grad_sample.gsm_base import AbstractGradSampleHooks
from opacus.privacy_engine import PrivacyEngine
from torch import nn

from opacus_pi._torch_compat import compiled_module
from opacus_pi._validate import expect
from opacus_pi.gradients.clipping import TrainingTaps
from opacus_pi.integration.opacus_compat import (
    DISTRIBUTED,
    module_of,
    pop_removable_handles,
    removable_handles,
    set_removable_handles,
)

__all__ = [
    "MODE",
    "FastGradSampleModule",
    "FastHooks",
    "prepare_model",
    "require_fast",
]

MODE = "fast"
"""The value of ``grad_sample_mode`` that selects this mode."""

_ELSE = 'Use grad_sample_mode="hooks".'  # the remedy that each refusal ends with
_PARALLEL = (*DISTRIBUTED, nn.DataParallel)


class FastHooks(AbstractGradSampleHooks):
    """Fills the per-batch cache of a model without wrapping the model.

    Until ``optimizer.step()`` has clipped, the cache keeps for each layer either its
    input and the gradient at its output, or the gradients of the examples where these
    are smaller. ``grad_sample`` is never set, nor is ``grad`` before the step.

    Args:
        m: The model.
        batch_first: Must be true: examples are along the first dimension.
        loss_reduction: How the criterion reduces the losses: ``"mean"`` or ``"sum"``.

    Raises:
        NotImplementedError: If a trainable layer has buffers; Opacus raises it too.
        ValueError: If the model has hooks of Opacus already.
    """

    def __init__(
        self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean"
    ) -> None:
        super().__init__(m, batch_first=batch_first, loss_reduction=loss_reduction)
        # The same models are refused as in hooks mode, with the same errors.
        GradSampleHooks.validate(module=m, strict=True)
        if removable_handles(m) is not None:
            # Opacus's own words, for the same mistake in its other modes.
            raise ValueError("Trying to add hooks twice to the same model")
        self.taps = TrainingTaps()
        set_removable_handles(m, self.taps.attach(m))

    def set_grad_sample_to_none(self) -> None:
        """Drop the cached batches whose backward pass has run."""
        super().set_grad_sample_to_none()
        self.taps.clear()

    def forbid_grad_accumulation(self) -> None:
        """Make a second backward pass before a step an error from now on."""
        self.taps.may_accumulate = False

    def allow_grad_accumulation(self) -> None:
        """Allow several backward passes before a step from now on."""
        self.taps.may_accumulate = True

    def remove_hooks(self) -> None:
        """Remove all hooks from the model and drop what the cache holds."""
        for handle in pop_removable_handles(module_of(self)):
            handle.remove()
        self.taps.detach()


class FastGradSampleModule(FastHooks, AbstractGradSampleModule):
    """A wrapper of a model that fills its per-batch cache, as ``FastHooks`` does.

    ``make_private`` returns it by default, as it returns ``GradSampleModule`` in hooks
    mode; with ``wrap_model=False`` it returns ``FastHooks``.

    Args:
        m: The model.
        **options: Options of ``FastHooks``.
    """

    def __init__(self, m: nn.Module, **options: Any) -> None:
        # nn.Module goes first: it creates the table in which FastHooks puts the model.
        nn.Module.__init__(self)
        FastHooks.__init__(self, m, **options)
        self.grad_accumulation_hook = None  # Opacus's wrapper has it and removes it


def require_fast(
    *,
    module: nn.Module,
    clipping: str = "flat",
    batch_first: bool = True,
    **other_options: Any,
) -> None:
    """Raise for options of ``make_private`` that the fast mode does not support.

    Args:
        module: The model.
        clipping: How to clip.
        batch_first: Whether examples are along the first dimension.
        **other_options: Other options of ``make_private``; any value is supported.

    Raises:
        ValueError: If an option rules the mode out; the message says why.
    """
    expect(
        clipping == "flat",
        "clipping",
        repr(clipping),
        'must be "flat"',
        "The fast mode clips one norm, that of all parameters together. " + _ELSE,
    )
    expect(
        batch_first,
        "batch_first",
        batch_first,
        "must be True",
        "The fast mode needs the examples along the first dimension. " + _ELSE,
    )
    expect(
        not isinstance(module, _PARALLEL),
        "module",
        type(module).__name__,
        'must be trained in one process with grad_sample_mode="fast"',
        'Use grad_sample_mode="hooks", or "ghost_fsdp" for FSDP2.',
    )
    expect(
        compiled_module(module) is None,
        "module",
        "the result of torch.compile",
        "must be a module whose layers run one by one",
        "Pass the module that you gave to torch.compile.",
    )


def prepare_model(
    engine: PrivacyEngine,
    module: nn.Module,
    *,
    loss_reduction: str = "mean",
    wrap_model: bool = True,
    **other_options: Any,
) -> FastHooks:
    """Validate a model as Opacus does, and add the hooks that fill its cache.

    Args:
        engine: The engine whose validation applies.
        module: A plain module, or what an earlier call returned.
        loss_reduction: How the criterion reduces the losses.
        wrap_model: Whether to return a wrapper of the module.
        **other_options: Other options of ``make_private``; not used.

    Returns:
        ``FastHooks``, or a ``FastGradSampleModule`` that wraps the module. A module
        that an earlier call prepared in the same way is returned as it is.

    Raises:
        ValueError: If the module was prepared in another way before.
    """
    engine.validate(module=module, optimizer=None, data_loader=None)
    if wrap_model and isinstance(module, AbstractGradSampleModule):
        expect(
            type(module) is FastGradSampleModule
            and module.loss_reduction == loss_reduction,
            "module",
            f"{type(module).__name__} with loss_reduction={module.loss_reduction!r}",
            "must be a plain module, or one that was prepared by an earlier call "
            f"with the same loss_reduction={loss_reduction!r}",
            "Pass the plain module: module.to_standard_module().",
        )
        return cast(FastHooks, module)
    made = FastGradSampleModule if wrap_model else FastHooks
    prepared: FastHooks = made(module, loss_reduction=loss_reduction)
    return prepared
