"""Intercept the gradient that arrives at the output of an operation.

The idea: while a layer runs, its parameters are replaced by frozen ones, so that the
backward pass computes input gradients only. A *tap*, an identity in the autograd graph,
is put on the layer's output. When the backward pass reaches it, it passes the gradient
to a rule, together with the layer's saved input; from both, norms or clipped sums of
the parameters' gradients follow. No parameter gradient is formed.

The guarantee: each operation is measured at most once, with the input that it had. A
second backward pass through the same forward pass is an error; an input that was
overwritten before the backward pass arrives is detected by its version counter, and the
operation counts as not measured. What breaks it: writes that the counter does not see
(through ``.data`` or NumPy).

:class:`Taps` is the interface of the objects that intercept a pass: sweeps
(:class:`~opacus_pi.gradients.norm_taps.NormTaps`), training
(:class:`~opacus_pi.gradients.clipping.training_taps.TrainingTaps`), and the search for
position tables (:mod:`~opacus_pi.gradients.position_tables`).
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from opacus_pi._torch_compat import num_writes, pytree, result_is_saved, viewed_tensor
from opacus_pi.gradients.example_gradients import ExampleGradients
from opacus_pi.gradients.products import at_least_float32

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments
# ``rule(call, grad)``: gradients by parameter name; None where it does not apply
TapRule = Callable[[Call, Tensor], Mapping[str, ExampleGradients] | None]

_SECOND_BACKWARD = (
    "A second backward pass went through the same forward pass, so its examples would "
    "count twice. Call the model again for the second loss, or add the losses and "
    "call backward() once."
)


class Taps(Protocol):
    """The interface of objects that intercept a forward and a backward pass.

    Code that runs a layer (or another operation with parameters) asks ``wants`` of its
    input and ``is_live`` of its parameters, runs the layer with frozen parameters, and
    hands the output to ``tap``, or calls ``miss`` if the output has an unexpected form.

    Attributes:
        shared_uses: Parameters that were used in a computation without a batch. A layer
            that has one is not tapped as a layer: its input may have as many rows as
            there are examples by chance. Its operations are followed instead.
    """

    shared_uses: set[nn.Parameter]

    def is_live(self, parameter: Any) -> bool:
        """Return whether this is a parameter whose gradients are wanted here.

        Args:
            parameter: Anything.
        """

    def wants(self, value: Any) -> bool:
        """Return whether this is a tensor with one row for each example of the pass.

        Args:
            value: Anything; also False while no pass is intercepted.
        """

    def tap(
        self,
        output: Tensor,
        call: Call,
        parameters: Mapping[str, nn.Parameter],
        rule: TapRule,
    ) -> Tensor:
        """Intercept the gradient that will arrive at an operation's output.

        Args:
            output: The output, ``(b, ...)``, computed with frozen parameters.
            call: The arguments of the operation.
            parameters: The live parameters, by the names that the rule returns.
            rule: Returns the examples' gradients from the arguments and the gradient
                at the output.

        Returns:
            The output, to be used in place of ``output``.
        """

    def miss(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Record that an operation froze parameters and cannot be tapped.

        Args:
            parameters: The live parameters, by name. Autograd has no gradient of this
                operation for them.
        """


class SavedInputs:
    """Arguments of a call, kept by reference, as long as they are not overwritten.

    Attributes:
        tensors: The tensors among them, detached.

    Args:
        call: Positional and keyword arguments.
    """

    def __init__(self, call: Call) -> None:
        args, kwargs = call
        # Flattening is slow, and most layers have a single tensor as their input.
        self._is_single = not kwargs and len(args) == 1 and isinstance(args[0], Tensor)
        if self._is_single:
            self._leaves = self.tensors = [args[0].detach()]
        else:
            leaves, self._structure = pytree.tree_flatten(call)
            self._leaves = [v.detach() if isinstance(v, Tensor) else v for v in leaves]
            self.tensors = [v for v in self._leaves if isinstance(v, Tensor)]
        self._num_writes = self._count_writes()

    @property
    def call(self) -> Call:
        """The arguments, their tensors detached."""
        return self._packed(self._leaves)

    @property
    def widened(self) -> Call:
        """The arguments with half precision turned into single precision.

        Norms of half-precision values would overflow or lose their digits.
        """
        if self._is_single:
            return (at_least_float32(self._leaves[0]),), {}
        return self._packed(
            [at_least_float32(v) if isinstance(v, Tensor) else v for v in self._leaves]
        )

    @property
    def are_unchanged(self) -> bool:
        """Return whether no tensor was written to since the call."""
        return self._count_writes() == self._num_writes

    def _packed(self, leaves: list[Any]) -> Call:
        """Return arguments made of their leaves."""
        if self._is_single:
            return tuple(leaves), {}
        call: Call = pytree.tree_unflatten(leaves, self._structure)
        return call

    def _count_writes(self) -> list[int]:
        """Return how often each tensor was written to."""
        return [num_writes(tensor) for tensor in self.tensors]


def tapped(
    output: Tensor, anchor: Tensor, on_gradient: Callable[[Tensor], None]
) -> Tensor:
    """Return an output whose gradient is passed to a function when it arrives.

    A view is not tapped itself, because autograd would copy the gradient three times to
    pass it through a view that was written to. The viewed tensor is tapped instead.

    Args:
        output: The output; only the returned tensor may be used from now on.
        anchor: Any leaf that requires a gradient; it will get none.
        on_gradient: Called once, with the gradient at the output.
    """
    if result_is_saved(output):
        output = output.clone()
    whole, shape = viewed_tensor(output), output.shape
    result: Tensor
    if whole is None or result_is_saved(whole):
        result = _Tap.apply(output, anchor, on_gradient)
        return result

    def unflattened(grad: Tensor) -> None:
        on_gradient(grad.reshape(shape))

    result = _Tap.apply(whole, anchor, unflattened)
    return result.view(shape)


class _Tap(torch.autograd.Function):
    """The identity, in place, which reports the gradient that passes through it, once.

    In place, so that the model may still change the layer's output in place afterwards.
    The anchor requires a gradient, so that a layer whose input requires none (the
    first) is reached by the backward pass, too.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, on_gradient: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.on_gradient = on_gradient
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        create_graph = torch.is_grad_enabled()
        return (_report_without_graph if create_graph else _report)(ctx, grad)


def _report(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
    """Report a gradient and pass it on."""
    on_gradient, ctx.on_gradient = ctx.on_gradient, None  # frees the layer's input
    if on_gradient is None:
        raise RuntimeError(_SECOND_BACKWARD)
    on_gradient(grad)
    return (grad if ctx.needs_input_grad[0] else None), None, None


_report_without_graph = once_differentiable(_report)
