"""Tap bare parameters: position and class tokens, scales and shifts.

A parameter that a module adds to a batch, multiplies it with, or expands over it, has
for each example the gradient that arrives at the result (times the batch's entries for
a product), summed over the positions that share an entry.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ExampleGradients = Callable[[Tensor | None, Tensor], Tensor]
_SUMS = {torch.add, Tensor.add, Tensor.add_}
_PRODUCTS = {torch.mul, Tensor.mul}
_SPREADS = {Tensor.expand}


class Listener(Protocol):
    """Who is told of operations on bare parameters."""

    def is_live(self, parameter: Any) -> bool:
        """Whether this is a parameter whose gradients are wanted here."""

    def wants(self, value: Any) -> bool:
        """Whether this is a tensor with one row for each example."""

    def tap_bare(
        self,
        output: Tensor,
        x: Tensor | None,
        parameter: nn.Parameter,
        gradient: ExampleGradients,
    ) -> Tensor:
        """Listen at an output; ``gradient(x, grad)`` is each example's gradient."""


class BareParameters(TorchFunctionMode):
    """Taps the operations above on live parameters, while it is entered.

    Args:
        taps: Where they report.
    """

    def __init__(self, taps: Listener) -> None:
        super().__init__()
        self._taps = taps

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation, tapped if it is one of those above."""
        if kwargs:
            return func(*args, **kwargs)
        if func in _SPREADS and self._taps.is_live(args[0]):
            return self._spread(func, args)
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
        """A sum or product of a batch and a parameter."""
        if not _is_shared(parameter.shape, x.shape):
            plain: Tensor = func(*args)
            return plain
        output = func(*(a.detach() if a is parameter else a for a in args))
        return self._tap(output, x if func in _PRODUCTS else None, parameter)

    def _spread(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Tensor:
        """A parameter expanded to one copy per example."""
        parameter, *sizes = args
        output = func(parameter.detach(), *sizes)
        if not (self._taps.wants(output) and _is_shared(parameter.shape, output.shape)):
            plain: Tensor = func(*args)
            return plain
        return self._tap(output.clone(), None, parameter)

    def _tap(self, output: Tensor, x: Tensor | None, parameter: nn.Parameter) -> Tensor:
        """Tap the result; ``x`` is the other factor of a product."""

        def gradient(x: Tensor | None, grad: Tensor) -> Tensor:
            return _summed(grad if x is None else grad * x, parameter.shape)

        return self._taps.tap_bare(output, x, parameter, gradient)


def _is_shared(shape: torch.Size, batch: torch.Size) -> bool:
    """Whether each example of a batch sees the whole of a parameter, broadcast."""
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
