"""What ``grad_sample_mode="fast"`` needs of ``make_private``, and how it prepares."""

from typing import Any, cast

from opacus.grad_sample import AbstractGradSampleModule
from opacus.privacy_engine import DDP, DPDDP, FSDPModule, PrivacyEngine
from torch import nn

from opacus_pi._validate import expect
from opacus_pi.integration.fast.hooks import FastGradSampleModule, FastHooks

MODE = "fast"
_ELSE = 'Use grad_sample_mode="hooks".'
_IN_ONE_PROCESS = (DDP, DPDDP, FSDPModule, nn.DataParallel)


def require_fast(
    *,
    module: nn.Module,
    clipping: str = "flat",
    batch_first: bool = True,
    **_: Any,
) -> None:
    """Refuse what cannot be clipped without per-example gradients.

    Args:
        module: An argument of ``make_private``, like the others.
        clipping: How to clip.
        batch_first: Whether examples are along the first dimension.

    Raises:
        ValueError: If an argument rules the mode out; it says why.
    """
    expect(
        clipping == "flat",
        "clipping",
        repr(clipping),
        'to be "flat": one norm over all parameters, one clip norm for all steps',
        _ELSE,
    )
    expect(
        batch_first,
        "batch_first",
        batch_first,
        "to be true: examples along the first dimension",
        _ELSE,
    )
    expect(
        not isinstance(module, _IN_ONE_PROCESS),
        "module",
        type(module).__name__,
        'to be trained in one process with grad_sample_mode="fast"',
        'Use grad_sample_mode="hooks", or "ghost_fsdp" for FSDP2.',
    )
    expect(
        "_orig_mod" not in module._modules,
        "module",
        "a module of torch.compile",
        "to run layer by layer",
        "Pass the module that was compiled.",
    )


def prepare_model(
    engine: PrivacyEngine,
    module: nn.Module,
    *,
    loss_reduction: str = "mean",
    wrap_model: bool = True,
    **_: Any,
) -> FastHooks:
    """Validate a model as Opacus does, and listen to it.

    Args:
        engine: Whose validation counts.
        module: A plain module, or what an earlier call returned.
        loss_reduction: The criterion's.
        wrap_model: Whether to return a wrapper of the module.

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
            f"to be prepared for this call, with loss_reduction={loss_reduction!r}",
            "Pass the vanilla module, module.to_standard_module().",
        )
        return cast(FastHooks, module)
    made = FastGradSampleModule if wrap_model else FastHooks
    prepared: FastHooks = made(module, loss_reduction=loss_reduction)
    return prepared
