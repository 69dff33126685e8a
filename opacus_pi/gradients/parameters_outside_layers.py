"""Tap parameters used outside of layers: position and class tokens, scales, shifts.

A module may own a parameter and add it to a batch, multiply a batch with it, or expand
it over the batch, without a layer that a rule could be registered for. The gradient of
each example is then the gradient that arrives at the result (times the batch's entries
for a product), summed over the positions that share an entry of the parameter.

A ``TorchFunctionMode`` sees every operation of torch while the model runs. It taps the
operations above where one operand is a live parameter and the other a batch, and runs
all others unchanged; their parameters stay live and are recognised by their ``.grad``.

The guarantee: results are those of the plain operations, and a gradient is either
tapped or left to autograd, never lost. Nothing is known to break it. An operation in
another form (``torch.add`` with ``alpha``, a parameter that is reshaped first) is not
tapped, and its parameter is measured more slowly.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from opacus_pi.gradients.example_gradients import ExampleGradients, ExplicitGradients
from opacus_pi.gradients.taps import Call, Taps

# Operators arrive under these names, too: ``x + p`` as Tensor.add, ``x += p`` as
# Tensor.add_. Subtraction and division are not tapped, only measured more slowly.
_SUMS = {torch.add, Tensor.add, Tensor.add_}
_PRODUCTS = {torch.mul, Tensor.mul}
_EXPANSIONS = {Tensor.expand}
_NAME = "parameter"  # under which the one parameter of an operation is tapped


class ParametersOutsideLayers(TorchFunctionMode):
    """Tap the operations above on live parameters, while the mode is entered.

    Args:
        taps: The object to which the operations report.
    """

    def __init__(self, taps: Taps) -> None:
        super().__init__()
        self._taps = taps

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation, tapped if it is one of those above.

        Args:
            func: The operation; torch calls this in place of it.
            types: Not used.
            args: Its positional arguments. In-place addition is tapped only where the
                parameter is what is added: otherwise the parameter would be changed.
            kwargs: Its keyword arguments; with any, the operation runs unchanged.
        """
        if kwargs:
            return func(*args, **kwargs)
        if func in _EXPANSIONS and self._taps.is_live(args[0]):
            return self._expand(func, args)
        if (func in _SUMS or func in _PRODUCTS) and len(args) == 2:
            for place in (1,) if func is Tensor.add_ else (0, 1):
                parameter, x = args[place], args[1 - place]
                if self._taps.is_live(parameter) and self._taps.wants(x):
                    return self._combine(func, args, parameter, x)
        return func(*args)

    def _combine(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        parameter: nn.Parameter,
        x: Tensor,
    ) -> Tensor:
        """Return a tapped sum or product of a batch and a parameter.

        Args:
            func: The operation.
            args: Both operands, in their order.
            parameter: The live one.
            x: The other operand, with a row for each example.
        """
        if not _is_shared(parameter.shape, x.shape):
            plain: Tensor = func(*args)
            return plain
        output = func(*(a.detach() if a is parameter else a for a in args))
        return self._tap(output, (x,) if func in _PRODUCTS else (), parameter)

    def _expand(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Tensor:
        """Return a parameter expanded to one copy per example, tapped.

        Class tokens are used this way: ``token.expand(b, -1, -1)`` is concatenated with
        the sequence. The result is cloned, because the rows of an expanded tensor share
        memory and the tap changes its tensor in place.
        """
        parameter, *sizes = args
        output = func(parameter.detach(), *sizes)
        if not (self._taps.wants(output) and _is_shared(parameter.shape, output.shape)):
            plain: Tensor = func(*args)
            return plain
        return self._tap(output.clone(), (), parameter)

    def _tap(
        self, output: Tensor, factors: tuple[Tensor, ...], parameter: nn.Parameter
    ) -> Tensor:
        """Tap a result.

        Args:
            output: The result, computed with a detached parameter.
            factors: The other factor of a product; empty for a sum or an expansion,
                whose derivative by the parameter is 1.
            parameter: The live one.
        """

        def gradients(call: Call, grad: Tensor) -> dict[str, ExampleGradients]:
            for x in call[0]:
                grad = grad * x
            return {_NAME: ExplicitGradients(_summed(grad, parameter.shape))}

        return self._taps.tap(output, (factors, {}), {_NAME: parameter}, gradients)


def _is_shared(shape: torch.Size, batch: torch.Size) -> bool:
    """Return whether each example of a batch uses the whole of a parameter, broadcast.

    This is false if the parameter has as many dimensions as the batch and several
    entries in the first one: then each example has an entry of its own.
    """
    pairs = zip(reversed(shape), reversed(batch), strict=False)
    return (
        len(shape) <= len(batch)
        and all(mine in (1, theirs) for mine, theirs in pairs)
        and (len(shape) < len(batch) or shape[0] == 1)
    )


def _summed(values: Tensor, shape: torch.Size) -> Tensor:
    """Sum each example's values over the positions that share a parameter's entry."""
    aligned = (1,) * (values.dim() - len(shape)) + tuple(shape)
    shared = [i for i in range(1, values.dim()) if aligned[i] < values.shape[i]]
    return values.sum(shared) if shared else values
