"""Make a model of any architecture trainable with per-example gradients.

Two things keep most image models from being trained by Opacus. BatchNorm mixes the
examples of a batch. And torch forbids overwriting the output of a layer that has
backward hooks, as Opacus's layers have; ``nn.ReLU(inplace=True)`` and the
``out += identity`` of residual blocks do that.

>>> model = make_compatible(
...     nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
... )
>>> type(model[1]).__name__, model[2]
('GroupNorm', ReLU())

**The idea for in-place operations.** While the model's ``forward`` runs, a
``TorchFunctionMode`` sees every operation before torch does. If an operation would
overwrite the output of a hooked layer, the output is first replaced by a copy of it,
by :func:`torch.utils.swap_tensors`: the tensor object stays, so every variable that
refers to it sees the copy, but the copy has no hooks and may be overwritten.

**What it guarantees.** Outputs and gradients are those of the model as it was written,
also where the result of an in-place operation is not used.

**What breaks it.** ``swap_tensors`` refuses a tensor that autograd has saved for an
earlier operation, or that has weak references. Torch then refuses the in-place
operation, as it does without this module, and a note on the error says what to do. (In
the first case the plain model fails as well, in its backward pass.)
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, SupportsIndex

from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import swap_tensors

from opacus_pi._class_swap import swap_class
from opacus_pi._torch_compat import has_backward_hooks
from opacus_pi.integration.attention import Attention

__all__ = ["make_compatible"]


def make_compatible(module: nn.Module, **options: Any) -> nn.Module:
    """Return a copy of a model that Opacus can train.

    What is replaced:

    * layers that Opacus cannot train, by its own ``ModuleValidator.fix``: BatchNorm by
      GroupNorm, LSTM and GRU by Opacus's ``DPLSTM`` and ``DPGRU``, and others;
    * ``nn.MultiheadAttention``, also within torch's transformer layers, by our
      ``Attention`` (Opacus's computes something else with ``batch_first=True``);
    * the flag ``inplace=True`` of layers, by False. A layer whose result the model does
      not use (``self.relu(out)`` alone on a line) has no effect any more;
    * the outputs of hooked layers that an operation in ``forward`` would overwrite, by
      copies: by augmented assignments such as ``out += identity``, by methods such as
      ``out.add_(identity)``, by ``out[0] = 0`` and by functions with ``inplace=True``;
    * the inputs of convolutions, by contiguous ones: Opacus's per-example gradients are
      wrong for others (``channels_last``, ConvNeXt).

    What is not replaced: frozen BatchNorm layers (call ``.eval()`` on them after
    ``model.train()``), operations with ``out=...``, and in-place operations outside of
    the model's ``forward``, such as in a training loop that calls its layers directly.

    The copy computes the function of the model, in training and in evaluation mode
    (dropout draws other random numbers), with two exceptions. A GroupNorm is not the
    function of the BatchNorm that it replaces: it begins with scale 1 and shift 0, and
    running statistics are dropped, so a pre-trained model has to be fine-tuned. (In
    place of a BatchNorm1d of at most 32 features it may give the same outputs for all
    inputs: a warning then names the remedy.) And an InstanceNorm that tracks running
    statistics no longer tracks them. Weights are kept; those of replaced layers have
    the names of the replacement.

    Args:
        module: The model, not wrapped yet; it is not changed.
        **options: Options of Opacus's fixers, e.g. ``num_groups``.

    Returns:
        The copy, of the same class (if it has layers, of a subclass with the same
        name).

    Raises:
        ValueError: If a layer has no replacement that computes the same: an LSTM with
            ``proj_size``.

    Source: Wu and He 2018, arXiv:1803.08494; pytorch/opacus issue 828.
    """
    original = dict(module.named_modules(remove_duplicate=False))
    _require_replaceable(original)
    module = _as_original(ModuleValidator.fix(module, **options), original)
    for layer in module.modules():
        if vars(layer).get("inplace") is True:
            vars(layer)["inplace"] = False
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            layer.register_forward_pre_hook(_make_input_contiguous)
    has_layers = next(module.children(), None) is not None
    return swap_class(module, _copying_before_overwriting) if has_layers else module


def _require_replaceable(original: dict[str, nn.Module]) -> None:
    """Refuse layers for which Opacus has no replacement that computes the same.

    Args:
        original: The model's layers by name.

    Raises:
        ValueError: With the layer's name and a remedy.
    """
    for name, layer in original.items():
        is_trained = any(p.requires_grad for p in layer.parameters())
        if type(layer) is nn.LSTM and layer.proj_size and is_trained:
            raise ValueError(
                f"{f'The layer {name!r}' if name else 'The model'} is an LSTM with "
                f"proj_size={layer.proj_size}, which Opacus's DPLSTM does not have. "
                "Use an LSTM without proj_size, followed by a Linear layer."
            )


def _as_original(module: nn.Module, original: dict[str, nn.Module]) -> nn.Module:
    """Have replaced layers compute what the original layers compute.

    Opacus makes replacements in training mode and in single precision, and replaces a
    layer that has several names under the first of them only.

    Args:
        module: What Opacus's fixers returned; changed in place.
        original: The layers of the model from before, by every name.

    Returns:
        The module; another one if it is itself a layer that is replaced.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for name, layer in original.items():
        made = replaced.get(layer) or module.get_submodule(name)
        if type(made) is type(layer):
            continue
        if layer not in replaced:
            if isinstance(layer, nn.MultiheadAttention):
                made = Attention.replacing(layer)
            else:
                made.train(layer.training).to(next(layer.parameters()))
            if isinstance(layer, nn.RNNBase):
                made.load_state_dict(layer.state_dict())
            if isinstance(made, nn.GroupNorm) and made.num_groups == made.num_channels:
                made.register_forward_pre_hook(_warn_if_constant)
            replaced[layer] = made
        if not name:
            return made
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, made)
    return module


def _make_input_contiguous(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a convolution's inputs in the memory order that Opacus reads."""
    return (args[0].contiguous(), *args[1:])


def _warn_if_constant(layer: nn.GroupNorm, args: tuple[Any, ...]) -> None:
    """Warn if each value is normalised alone, which makes it 0 whatever it was.

    Args:
        layer: A layer with one channel in each group.
        args: Its input, ``(b, channels, ...)``.
    """
    if math.prod(args[0].shape[2:]) == 1:
        warnings.warn(
            f"A GroupNorm replaced a BatchNorm of {layer.num_channels} features and "
            "normalises each of them alone, so its outputs do not depend on its "
            "inputs and the layers before it learn nothing. Replace that BatchNorm "
            f"by nn.LayerNorm({layer.num_channels}) before you call make_compatible.",
            stacklevel=2,
        )


class _CopyBeforeOverwriting(TorchFunctionMode):
    """Replaces outputs of hooked layers by copies before they are overwritten."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation; torch calls this in place of it."""
        kwargs = kwargs or {}
        if args and _overwrites_first_argument(func, kwargs):
            target = args[0]
            if isinstance(target, Tensor) and has_backward_hooks(target):
                _replace_by_copy(target)
        return func(*args, **kwargs)


def _overwrites_first_argument(
    func: Callable[..., Any], options: dict[str, Any]
) -> bool:
    """Return whether an operation works in place, by torch's naming convention.

    ``out += x`` arrives as ``Tensor.add_``, like ``out.add_(x)``.
    """
    name = func.__name__
    is_in_place_method = name.endswith("_") and not name.endswith("__")
    return is_in_place_method or name == "__setitem__" or options.get("inplace") is True


def _replace_by_copy(tensor: Tensor) -> None:
    """Make a tensor object refer to a copy of its content, without backward hooks.

    Gradients still reach the hooked layer: the copy is computed from its output.
    """
    copy = tensor.clone()
    try:
        swap_tensors(tensor, copy)
    except RuntimeError:
        # Something else holds the tensor. It stays, and torch explains in its error
        # why the operation that follows is not possible.
        return


def _copying_before_overwriting(base: type) -> type:
    """Return a subclass of a model class whose ``forward`` runs in the mode above."""

    class Compatible(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with _CopyBeforeOverwriting():
                return super().forward(*args, **kwargs)

        def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
            """Copy and pickle by the user's class, which can be imported."""
            state = super().__reduce_ex__(protocol)[2]
            return _compatible_of, (base,), state

    return Compatible


def _compatible_of(base: type[nn.Module]) -> nn.Module:
    """Return an empty model of the subclass, into which a state is then loaded."""
    return swap_class(base.__new__(base), _copying_before_overwriting)
