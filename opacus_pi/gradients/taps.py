"""Listen to a backward pass and add up each layer's squared gradient norms.

No parameter gradient is formed: while a layer with a rule runs, its parameters are
frozen, so the backward pass computes input gradients only. A tap on the layer's output
hands the gradient that arrives there to the rule and lets it go.

What a tap cannot account for is never lost. Outside their own layer's forward pass the
parameters stay live, so any other use of them (bare parameters, a layer without a rule,
a weight taken from another layer) leaves a ``.grad``. These, and parameters that
several calls share, become ``leftover``: to be measured in another way.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from opacus_pi.gradients.registry import NormRule, norm_rule


class Taps:
    """Taps on every layer of a model that has a rule.

    Attributes:
        leftover: Names of the parameters that the taps do not account for.

    Args:
        model: An evaluation copy; its parameters' ``requires_grad`` and its hooks
            belong to this object from now on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {p: n for n, p in model.named_parameters() if p.requires_grad}
        self.leftover: set[str] = set()
        self._anchor = torch.zeros((), requires_grad=True)
        self._layers = [
            _TappedLayer(self, module, rule)
            for module in model.modules()
            if (rule := norm_rule(module)) is not None
        ]
        self._squares: Tensor | None = None
        self._num_calls: Counter[nn.Parameter] = Counter()
        self._unheard: set[nn.Parameter] = set()
        self.batch_size: int | None = None

    @contextmanager
    def listening(self, batch_size: int) -> Iterator[None]:
        """Tap the forward and backward pass made inside.

        Args:
            batch_size: Number of examples, the first dimension of tapped tensors.
        """
        self.batch_size, self._squares = batch_size, None
        self._num_calls.clear()
        try:
            yield
        finally:
            self.batch_size = None
            for layer in self._layers:
                layer.thaw()

    def give_up(self) -> None:
        """Leave all parameters over."""
        self._leave_over(set(self._names))

    def settle(self) -> bool:
        """Whether the last pass accounted for all but ``leftover``; widens it if not.

        After a widening the pass must be made again.
        """
        shared = {p for p, calls in self._num_calls.items() if calls > 1}
        touched = {p for p in self._names if p.grad is not None}
        known = len(self.leftover)
        self._leave_over(shared | touched | self._unheard)
        self._unheard.clear()
        return len(self.leftover) == known

    def squares(self, like: Tensor) -> Tensor:
        """The squared norms that were heard, zeros shaped as ``like`` if none were."""
        return torch.zeros_like(like) if self._squares is None else self._squares

    def _leave_over(self, parameters: set[nn.Parameter]) -> None:
        """Freeze parameters for good."""
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
            self.leftover.add(self._names[parameter])

    # What the layers call.

    def count(self, parameters: dict[str, nn.Parameter]) -> None:
        """Note one tapped use of each parameter."""
        self._num_calls.update(parameters.values())

    def counted_once(self, parameters: dict[str, nn.Parameter]) -> list[str]:
        """The names, as their layer has them, of those that a rule may do."""
        return [
            name
            for name, p in parameters.items()
            if p.requires_grad and self._num_calls[p] == 1
        ]

    def add(self, squares: Tensor | None, parameters: dict[str, nn.Parameter]) -> None:
        """Add one layer's squares, or note that it has none to give."""
        if squares is None:
            self._unheard.update(parameters.values())
        elif self._squares is None:
            self._squares = squares.double()
        else:
            self._squares += squares

    def tap(self, output: Tensor, listen: Callable[[Tensor], None]) -> Tensor:
        """Let ``listen`` hear the gradient that arrives at ``output``."""
        return _Tap.apply(output, self._anchor, listen)


class _TappedLayer:
    """One layer: frozen while it runs, heard when the gradient comes back."""

    def __init__(self, taps: Taps, module: nn.Module, rule: NormRule) -> None:
        self._taps, self._module, self._rule = taps, module, rule
        self._live = module._parameters
        self._frozen = {
            k: p if p is None else p.detach() for k, p in self._live.items()
        }
        self._input: Tensor | None = None
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after, with_kwargs=True, prepend=True)

    def thaw(self) -> Tensor | None:
        """Put the live parameters back and return the input, if it was frozen."""
        self._module.__dict__["_parameters"] = self._live
        x, self._input = self._input, None
        return x

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The layer's own parameters that are still to be measured here."""
        return {
            k: p for k, p in self._live.items() if p is not None and p.requires_grad
        }

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Freeze the layer, if its one input is a batch of examples."""
        if self._taps.batch_size is None or not torch.is_grad_enabled():
            return
        x, *more = *args, *kwargs.values()
        if more or not _is_batch(x, self._taps.batch_size) or not self._parameters():
            return
        self._input = x.detach()
        module.__dict__["_parameters"] = self._frozen

    def _after(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Tap the output, if it is a batch of examples."""
        x = self.thaw()
        if x is None:
            return None
        parameters = self._parameters()
        if not _is_batch(output, self._taps.batch_size):
            self._taps.add(None, parameters)
            return None
        self._taps.count(parameters)
        version = x._version

        def listen(grad: Tensor) -> None:
            names = self._taps.counted_once(parameters)
            if x._version != version:
                self._taps.add(None, parameters)
            elif names:
                self._taps.add(self._rule(module, x, grad, names), parameters)

        return self._taps.tap(output, listen)


class _Tap(torch.autograd.Function):
    """The identity, in place, that reports the gradient passing through.

    In place, so that the layer's output may still be changed in place afterwards. The
    anchor requires a gradient, so that the first layer, whose input does not, is heard.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, listen: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.listen = listen
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        listen, ctx.listen = ctx.listen, None  # frees the layer's input
        listen(grad)
        return (grad if ctx.needs_input_grad[0] else None), None, None


def _is_batch(value: Any, batch_size: int | None) -> bool:
    """Whether a value is a tensor with one row per example."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch_size
