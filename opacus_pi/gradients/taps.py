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
        model: An evaluation copy; its parameters' ``requires_grad`` and its layers'
            ``forward`` belong to this object from now on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {p: n for n, p in model.named_parameters() if p.requires_grad}
        self.leftover: set[str] = set()
        self._anchor = torch.zeros((), requires_grad=True)
        self._squares: Tensor | None = None
        self._num_calls: Counter[nn.Parameter] = Counter()
        self._unheard: set[nn.Parameter] = set()
        self._batch_size: int | None = None
        for module in model.modules():
            if (rule := norm_rule(module)) is not None:
                _TappedLayer(self, module, rule)

    @contextmanager
    def listening(self, batch_size: int) -> Iterator[None]:
        """Tap the forward and backward pass made inside.

        Args:
            batch_size: Number of examples, the first dimension of tapped tensors.
        """
        self._batch_size, self._squares = batch_size, None
        self._num_calls.clear()
        try:
            yield
        finally:
            self._batch_size = None

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

    def wants(self, value: Any) -> bool:
        """Whether a layer is to be tapped that has this tensor as input or output."""
        return (
            self._batch_size is not None
            and isinstance(value, Tensor)
            and value.shape[:1] == (self._batch_size,)
            and torch.is_grad_enabled()
        )

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
    """One layer's forward: frozen while it runs, heard when the gradient comes back."""

    def __init__(self, taps: Taps, module: nn.Module, rule: NormRule) -> None:
        self._taps, self._module, self._rule = taps, module, rule
        self._live = module._parameters
        self._frozen = {
            k: p if p is None else p.detach() for k, p in self._live.items()
        }
        self._plain_forward = module.forward
        module.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, tapped if its one input and its output are batches."""
        x = args[0] if args else next(iter(kwargs.values()), None)
        alone = len(args) + len(kwargs) == 1 and self._taps.wants(x)
        parameters = self._parameters() if alone else {}
        if not parameters:
            return self._plain_forward(*args, **kwargs)
        self._module.__dict__["_parameters"] = self._frozen
        try:
            output = self._plain_forward(*args, **kwargs)
        finally:
            self._module.__dict__["_parameters"] = self._live
        if not self._taps.wants(output):
            self._taps.add(None, parameters)
            return output
        self._taps.count(parameters)
        return self._taps.tap(output, self._listener(x.detach(), parameters))

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The layer's own parameters that are still to be measured here."""
        return {
            k: p for k, p in self._live.items() if p is not None and p.requires_grad
        }

    def _listener(
        self, x: Tensor, parameters: dict[str, nn.Parameter]
    ) -> Callable[[Tensor], None]:
        """What to do with the gradient at the output of this call."""
        version = x._version

        def listen(grad: Tensor) -> None:
            names = self._taps.counted_once(parameters)
            if x._version != version:  # overwritten: its values are gone
                self._taps.add(None, parameters)
            elif names:
                squares = self._rule(self._module, x, grad, names)
                self._taps.add(squares, parameters)

        return listen


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
