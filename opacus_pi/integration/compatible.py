"""Make a model of any architecture trainable with per-example gradients.

Two things keep most image models from that: BatchNorm mixes the examples of a batch,
and torch forbids to overwrite the output of a layer that Opacus has hooked, which
``nn.ReLU(inplace=True)`` and the ``out += identity`` of residual blocks do.

>>> model = make_compatible(
...     nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
... )
>>> type(model[1]).__name__, model[2]
('GroupNorm', ReLU())
"""

import dis
import sys
from collections.abc import Callable
from functools import lru_cache
from types import CodeType
from typing import Any, SupportsIndex

from opacus.grad_sample import AbstractGradSampleHooks
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from opacus_pi._class_swap import swap_class

__all__ = ["make_compatible"]

OUT_OF_PLACE = (
    "module = opacus_pi.compatible.make_compatible(module) replaces BatchNorm by "
    "GroupNorm and in-place operations by others; make the optimizer anew after it."
)
_HOOKED = "BackwardHookFunction"  # what made the outputs of layers that are hooked


def make_compatible(module: nn.Module, **options: Any) -> nn.Module:
    """Copy a model without what keeps Opacus from training it.

    Layers that Opacus cannot train are replaced by its own ``ModuleValidator.fix``.
    Operations that would overwrite the output of a hooked layer work on a copy of it:
    layers with ``inplace=True``, functions called so, and augmented assignments such as
    ``out += identity``, in whatever the model's ``forward`` calls.

    Weights are kept, under the same names, but for replaced layers: a GroupNorm begins
    with scale 1 and shift 0, and BatchNorm's running statistics are dropped, so a
    pre-trained model has to be fine-tuned. Frozen BatchNorm layers stay: call
    ``.eval()`` on them after ``model.train()``. Convolutions get contiguous inputs:
    Opacus's per-example gradients are wrong for others (``channels_last``, ConvNeXt).

    Left as they are, because their result may be thrown away, are methods such as
    ``out.add_(identity)``; torch refuses them at a hooked layer's output, and they have
    to be written out of place. A layer with ``inplace=True`` whose result is thrown
    away (``self.relu(out)`` alone on a line) has no effect any more.

    Args:
        module: The model, not wrapped yet; left as it is.
        **options: Of Opacus's fixers, e.g. ``num_groups``.

    Returns:
        The copy, of the same class (a subclass of that name, if it has layers).

    Source: Wu and He 2018, arXiv:1803.08494; pytorch/opacus issue 828.
    """
    module = ModuleValidator.fix(module, **options)
    for layer in module.modules():
        if vars(layer).get("inplace") is True:
            vars(layer)["inplace"] = False
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            layer.register_forward_pre_hook(_contiguous)
    has_layers = next(module.children(), None) is not None
    return swap_class(module, _sparing_hooked_outputs) if has_layers else module


def _contiguous(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of a convolution in the order that Opacus reads them."""
    return (args[0].contiguous(), *args[1:])


def explain_in_place(hooks: AbstractGradSampleHooks) -> None:
    """Have torch's refusal of an in-place operation say what to do about it.

    Args:
        hooks: What ``make_private`` returned for the model (a wrapper, or its hooks;
            removing its hooks ends this).
    """
    root = hooks._module
    if _explain not in root._forward_hooks.values():
        handle = root.register_forward_hook(_explain, always_call=True)
        getattr(root, "autograd_grad_sample_hooks", []).append(handle)


def _explain(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
    """A forward hook, which torch also calls while an error is on its way."""
    error = sys.exc_info()[1]
    if isinstance(error, RuntimeError) and _HOOKED in str(error):
        add_note(error, f"Opacus cannot train in-place operations: {OUT_OF_PLACE}")


def add_note(error: BaseException, note: str) -> None:
    """Say more in an error, of the same type and (where Python can) the same text.

    Args:
        error: The error, changed in place.
        note: What to add.
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # Python 3.10
        error.args = (*error.args, note)


class _SparingHookedOutputs(TorchFunctionMode):
    """Runs in-place operations on the outputs of hooked layers on copies of these."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation, on a copy if it would overwrite what is hooked."""
        kwargs = kwargs or {}
        if kwargs.get("inplace") is True and _is_hooked(args[0]):
            return func(*args, **{**kwargs, "inplace": False})
        if func.__name__ in _AUGMENTED and _is_hooked(args[0]):
            caller = sys._getframe(1)
            if _is_augmented_assignment(caller.f_code, caller.f_lasti):
                args = (args[0].clone(), *args[1:])
        return func(*args, **kwargs)


# out += x reaches torch as out.add_(x); only the caller's code tells them apart
_AUGMENTED = frozenset(
    "add_ sub_ mul_ div_ floor_divide_ remainder_ pow_".split()
    + [f"__i{name}__" for name in "add sub mul truediv floordiv mod pow".split()]
)


@lru_cache(maxsize=1024)
def _is_augmented_assignment(code: CodeType, offset: int) -> bool:
    """Whether the instruction binds its result to the name of its left operand."""
    instructions = dis.get_instructions(code)
    found = next(i for i in instructions if i.offset == offset)
    if found.opname == "BINARY_OP":  # since Python 3.11
        return found.argrepr.endswith("=")
    return found.opname.startswith("INPLACE_")


def _is_hooked(value: Any) -> bool:
    """Whether a tensor came out of, or went into, a layer with backward hooks."""
    return isinstance(value, Tensor) and _HOOKED in type(value.grad_fn).__name__


def _sparing_hooked_outputs(base: type) -> type:
    """A model that overwrites no output of a hooked layer in its forward pass."""

    class Compatible(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with _SparingHookedOutputs():
                return super().forward(*args, **kwargs)

        def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
            """Copies and pickles name the user's class, and swap it again."""
            state = super().__reduce_ex__(protocol)[2]
            return _compatible_of, (base,), state

    return Compatible


def _compatible_of(base: type[nn.Module]) -> nn.Module:
    """An empty model of the subclass of a class."""
    return swap_class(base.__new__(base), _sparing_hooked_outputs)
