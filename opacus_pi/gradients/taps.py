"""Listen to a backward pass and add up each layer's squared gradient norms.

No parameter gradient is formed: while a layer with a rule runs, its parameters are
frozen, so the backward pass computes input gradients only. A tap on the layer's output
hands the gradient that arrives there to the rule and lets it go.

What a tap cannot account for is never lost. Outside tapped operations the parameters
stay live, so any other use of them (a layer without a rule, a weight taken from another
layer) leaves a ``.grad``. These, and parameters that several calls share, become
``leftover``: to be measured in another way.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from opacus_pi._torch_compat import num_writes
from opacus_pi.gradients.bare import ExampleGradients
from opacus_pi.gradients.products import at_least_float32, squared_lengths

_TWICE = (
    "A second backward pass went through the same forward pass, whose examples would "
    "count twice. Call the model again, or add the losses up before backward()."
)

Squares = Callable[[Tensor | None, Tensor, Collection[str]], Tensor | None]


class Taps:
    """The squared gradient norms heard in one pass, and what could not be heard.

    Attributes:
        leftover: Names of the parameters that the taps do not account for.

    Args:
        model: An evaluation copy; its parameters' ``requires_grad`` belongs to this
            object from now on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.leftover: set[str] = set()
        self._names = {p: n for n, p in model.named_parameters() if p.requires_grad}
        self._anchor = torch.zeros((), requires_grad=True)
        self._squares: Tensor | None = None
        self._calls: list[Mapping[str, nn.Parameter]] = []
        self._unheard: set[nn.Parameter] = set()
        self._batch_size: int | None = None
        self._may_spread, self._has_spread = True, False

    @contextmanager
    def listening(self, batch_size: int) -> Iterator[None]:
        """Tap the forward and backward pass made inside.

        Args:
            batch_size: Number of examples, the first dimension of tapped tensors.
        """
        self._batch_size, self._squares = batch_size, None
        self._calls.clear()
        self._has_spread = False
        try:
            yield
        finally:
            self._batch_size = None

    def give_up(self) -> None:
        """Leave all parameters over."""
        self.leave_over(set(self._names))

    def leave_over(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leave parameters over, from now on; others than the trainable are no matter.

        Args:
            parameters: Of the copy.
        """
        for parameter in self._names.keys() & set(parameters):
            parameter.grad = None
            parameter.requires_grad_(False)
            self.leftover.add(self._names[parameter])

    def settle(self) -> bool:
        """Whether the last pass accounted for all but ``leftover``; widens it if not.

        After a widening the pass must be made again.
        """
        once: set[nn.Parameter] = set()
        shared: set[nn.Parameter] = set()
        for parameters in self._calls:
            shared.update(once.intersection(parameters.values()))
            once.update(parameters.values())
        touched = {p for p in self._names if p.grad is not None}
        known = len(self.leftover)
        self.leave_over(shared | touched | self._unheard)
        self._unheard.clear()
        return len(self.leftover) == known

    def squares(self, like: Tensor) -> Tensor:
        """The squared norms that were heard, zeros shaped as ``like`` if none were."""
        return torch.zeros_like(like) if self._squares is None else self._squares

    @property
    def is_listening(self) -> bool:
        """Whether a pass is being tapped."""
        return self._batch_size is not None

    def wants(self, value: Any) -> bool:
        """Whether to tap an operation that has this as input or output."""
        return (
            self._batch_size is not None
            and isinstance(value, Tensor)
            and value.shape[:1] == (self._batch_size,)
            and torch.is_grad_enabled()
        )

    def spread(self, x: Any) -> Any:
        """Give each example its row of numbers that all share, as positions ``(1, t)``.

        What follows usually broadcasts, and sees the same values either way.
        """
        if (
            not self._may_spread
            or self._batch_size is None
            or not isinstance(x, Tensor)
            or x.is_floating_point()
            or x.shape[:1] != (1,)
        ):
            return x
        self._has_spread = True
        return x.expand(self._batch_size, *x.shape[1:])

    def stop_spreading(self) -> bool:
        """Spread no more and start the pass anew; whether it had spread anything."""
        self._may_spread = False
        self._calls.clear()
        return self._has_spread

    def is_live(self, parameter: Any) -> bool:
        """Whether this is a parameter that taps may still account for."""
        return (
            isinstance(parameter, nn.Parameter)
            and parameter.requires_grad
            and parameter in self._names
        )

    def tap(
        self,
        output: Tensor,
        x: Tensor | None,
        parameters: Mapping[str, nn.Parameter],
        rule: Squares,
    ) -> Tensor:
        """Listen to the gradient that will arrive at the output of an operation.

        Args:
            output: The output, ``(b, ...)``, of frozen parameters.
            x: The input that the rule needs.
            parameters: The live parameters, by the names that the rule knows.
            rule: ``rule(x, grad, names)``, as :func:`register_norm_rule` has it.

        Returns:
            The output, to be used in place of it.
        """
        x = None if x is None else x.detach()
        version = None if x is None else num_writes(x)

        def listen(grad: Tensor) -> None:
            self._calls.append(parameters)  # (checkpointing calls layers twice)
            overwritten = x is not None and num_writes(x) != version
            squares = None
            if not overwritten:
                operand = None if x is None else at_least_float32(x)
                squares = rule(operand, at_least_float32(grad), list(parameters))
            if squares is not None:
                self._add(squares)
            else:
                self._unheard.update(parameters.values())

        return tapped(output, self._anchor, listen)

    def tap_bare(
        self,
        output: Tensor,
        x: Tensor | None,
        parameter: nn.Parameter,
        gradient: ExampleGradients,
    ) -> Tensor:
        """Listen at the output of an operation on one parameter.

        Args:
            output: The output, ``(b, ...)``, of the parameter detached.
            x: What the gradient follows from besides that of the output.
            parameter: The live parameter.
            gradient: ``gradient(x, grad)``, each example's, ``(b, ...)``.

        Returns:
            The output, to be used in place of it.
        """

        def squares(x: Tensor | None, grad: Tensor, names: Collection[str]) -> Tensor:
            return squared_lengths(gradient(x, grad)[:, None])

        return self.tap(output, x, {"parameter": parameter}, squares)

    def miss(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note that an operation froze parameters and could not be tapped."""
        self._unheard.update(parameters.values())

    def _add(self, squares: Tensor) -> None:
        """Add what one operation contributes."""
        if self._squares is None:
            self._squares = squares.double()
        else:
            self._squares += squares


def tapped(output: Tensor, anchor: Tensor, listen: Callable[[Tensor], None]) -> Tensor:
    """Return an output such that ``listen`` is told of the gradient that arrives at it.

    Args:
        output: The output; to be used no more but in place of it.
        anchor: Any leaf that requires a gradient; it will get none.
        listen: Called once.
    """
    heard: Tensor = _Tap.apply(output, anchor, listen)
    return heard


class _Tap(torch.autograd.Function):
    """The identity, in place, that reports the gradient passing through, once.

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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        return (_heard_once if torch.is_grad_enabled() else _heard)(ctx, grad)


def _heard(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
    """Report a gradient and pass it on."""
    listen, ctx.listen = ctx.listen, None  # frees the layer's input
    if listen is None:
        raise RuntimeError(_TWICE)
    listen(grad)
    return (grad if ctx.needs_input_grad[0] else None), None, None


_heard_once = once_differentiable(_heard)  # for backward(create_graph=True)
