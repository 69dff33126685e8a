"""Taps of a norm sweep: add up the squared gradient norms of every operation.

Each tapped operation adds the squared norms of its parameters' gradients, and drops its
input. The norm of a sum does not follow from the norms of its terms, so the gradients
of parameters that several operations share are kept until the end of the pass, in the
form that their rules return, and added before their norm is taken. Parameters used by
operations without a rule cannot be measured this way.

The guarantee is that no part of a gradient is lost. Outside tapped operations the
parameters stay live, so that any other use of them leaves a ``.grad``, which shows that
something was missed. Such parameters become ``leftover``: their per-example gradients
are to be formed in another way, and the pass is repeated without them. It is also
repeated where parameters turn out to be shared. What breaks it: an operation whose
output has one row for each example although its rows are not the examples'
(:mod:`~opacus_pi.gradients.position_tables`), and a wrong rule.
:class:`~opacus_pi.gradients.norm_engine.NormEngine` checks for both.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._torch_compat import operations_seen_by_no_mode
from opacus_pi.gradients.example_gradients import (
    ExampleGradients,
    add_up,
    joint_squares,
)
from opacus_pi.gradients.products import at_least_float32
from opacus_pi.gradients.taps import Call, SavedInputs, TapRule, tapped


class NormTaps:
    """Squared gradient norms of one pass, and the parameters that were not measured.

    Attributes:
        leftover: Names of the parameters that the taps do not measure. It only grows.
        shared_uses: Parameters used in a computation without a batch.

    Args:
        model: An evaluation copy; its parameters' ``requires_grad`` belongs to this
            object from now on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.leftover: set[str] = set()
        self.shared_uses: set[nn.Parameter] = set()
        self._names = {p: n for n, p in model.named_parameters() if p.requires_grad}
        self._anchor = torch.zeros((), requires_grad=True)
        self._squares: Tensor | None = None
        self._calls: list[Mapping[str, nn.Parameter]] = []
        self._missed: set[nn.Parameter] = set()
        self._shared: set[nn.Parameter] = set()  # by several operations of a pass
        self._parts: dict[nn.Parameter, list[ExampleGradients]] = defaultdict(list)
        self._needed: list[tuple[SavedInputs, Mapping[str, nn.Parameter]]] = []
        self._held: set[nn.Parameter] | None = None  # None: norms are measured
        self._batch_size: int | None = None
        self._may_expand, self._has_expanded = True, False

    @contextmanager
    def intercepting(self, batch_size: int) -> Iterator[None]:
        """Tap the forward and backward pass made inside.

        Args:
            batch_size: Number of examples, the first dimension of tapped tensors.
        """
        self._batch_size, self._squares = batch_size, None
        self._forget()
        self._has_expanded = False
        try:
            yield
        finally:
            self._batch_size = None

    @contextmanager
    def holding(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Hold the gradients by some parameters in the passes made inside.

        Nothing is measured meanwhile; :meth:`held` returns the gradients.

        Args:
            parameters: Parameters of the copy.
        """
        self._held = set(parameters)
        try:
            yield
        finally:
            self._held = None
            self._forget()

    def held(self) -> dict[str, ExampleGradients]:
        """Return the gradients of the last pass by the parameters that are held.

        Returns:
            By name; a parameter that the pass did not use is missing.
        """
        found = {
            self._names[parameter]: add_up(parts)
            for parameter, parts in self._parts.items()
            if self.is_live(parameter)
        }
        self._forget()
        return found

    @property
    def is_intercepting(self) -> bool:
        """Return whether a pass is being tapped."""
        return self._batch_size is not None

    def squares(self, like: Tensor) -> Tensor:
        """Return the squared norms of the last pass, zeros if nothing was tapped."""
        found = torch.zeros_like(like) if self._squares is None else self._squares
        for parameter, parts in self._parts.items():
            if self.is_live(parameter):
                found = found + add_up(parts).squares
        self._forget()
        return found

    def _forget(self) -> None:
        """Drop the results of the last pass."""
        self._calls.clear()
        self._parts.clear()
        self._needed.clear()

    # ----------------------------------------------------- what is not measured by taps
    def update_leftover(self) -> bool:
        """Add to ``leftover`` the parameters that the last pass did not measure.

        There are three kinds: a parameter that autograd has reached through an
        operation without a tap, one whose operation could not be tapped, and a shared
        one whose inputs were overwritten before its gradients could be added.

        Returns:
            Whether the pass has measured everything else. If not, it must be made
            again: with more ``leftover``, or with the gradients of parameters kept that
            were found to be shared.
        """
        once: set[nn.Parameter] = set()
        num_shared = len(self._shared)
        for parameters in self._calls:
            self._shared.update(once.intersection(parameters.values()))
            once.update(parameters.values())
        for inputs, parameters in self._needed:
            if not inputs.are_unchanged:
                self.miss(parameters)
        touched = {p for p in self._names if p.grad is not None}
        before = len(self.leftover)
        self.leave_over(touched | self._missed)
        self._missed.clear()
        return len(self.leftover) == before and len(self._shared) == num_shared

    @property
    def has_missed_any(self) -> bool:
        """Return whether the last pass used a parameter without measuring it."""
        return bool(self._missed) or any(p.grad is not None for p in self._names)

    def drop_missed(self) -> None:
        """Drop what autograd and missed operations have left of the last pass."""
        self._missed.clear()
        for parameter in self._names:
            parameter.grad = None

    def leave_over(self, parameters: Iterable[nn.Parameter]) -> None:
        """Stop measuring parameters by taps: they become ``leftover``.

        Args:
            parameters: Parameters of the copy; those that are not trainable are
                ignored.
        """
        for parameter in self._names.keys() & set(parameters):
            parameter.grad = None
            parameter.requires_grad_(False)
            self.leftover.add(self._names[parameter])

    def leave_all_over(self) -> None:
        """Stop measuring any parameter by taps."""
        self.leave_over(set(self._names))

    # -------------------------------------------------------- the interface of ``Taps``
    def is_live(self, parameter: Any) -> bool:
        """Return whether this is a parameter that taps may still measure."""
        return (
            isinstance(parameter, nn.Parameter)
            and parameter.requires_grad
            and parameter in self._names
        )

    def wants(self, value: Any) -> bool:
        """Return whether to tap an operation that has this as input or output."""
        return (
            self._batch_size is not None
            and isinstance(value, Tensor)
            and value.shape[:1] == (self._batch_size,)
            and torch.is_grad_enabled()
        )

    def tap(
        self,
        output: Tensor,
        call: Call,
        parameters: Mapping[str, nn.Parameter],
        rule: TapRule,
    ) -> Tensor:
        """Add up the squared norms that follow from the gradient at an output.

        Arguments and result are those of :meth:`opacus_pi.gradients.taps.Taps.tap`.
        """
        saved = SavedInputs(call)

        def measure(grad: Tensor) -> None:
            self._calls.append(parameters)  # here: checkpointing runs layers twice
            with operations_seen_by_no_mode():
                found = None
                if saved.are_unchanged:
                    found = rule(saved.widened, at_least_float32(grad))
                if found is None:
                    self.miss(parameters)
                else:
                    self._add(found, parameters, saved)

        return tapped(output, self._anchor, measure)

    def miss(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Record that an operation froze parameters and could not be tapped."""
        self._missed.update(parameters.values())

    def _add(
        self,
        found: Mapping[str, ExampleGradients],
        parameters: Mapping[str, nn.Parameter],
        inputs: SavedInputs,
    ) -> None:
        """Add the squares of one operation, or keep gradients of shared parameters.

        Args:
            found: The examples' gradients, by name.
            parameters: The live parameters, by the same names.
            inputs: The tensors from which the gradients are computed.
        """
        alone = dict(found)
        kept = self._shared if self._held is None else self._held
        for name in found if kept else ():
            if parameters[name] in kept:
                self._parts[parameters[name]].append(alone.pop(name))
        if len(alone) < len(found):
            self._needed.append((inputs, parameters))
        if alone and self._held is None:
            squares = joint_squares(list(alone.values()))
            before = self._squares
            self._squares = squares.double() if before is None else before + squares

    # ------------------------------------------------------- inputs shared by a batch
    def expand_shared(self, x: Any) -> Any:
        """Expand a row of whole numbers that all examples share to one row for each.

        A model usually looks up its position table for ``(1, t)`` numbers and adds the
        result to the batch by broadcasting. Expanded to ``(b, t)`` the numbers give the
        same sum, but now the gradient of the table is known for each example.

        Args:
            x: The input of a layer. Anything but a tensor ``(1, ...)`` of whole numbers
                is returned as it is.
        """
        if (
            not self._may_expand
            or self._batch_size is None
            or not isinstance(x, Tensor)
            or x.is_floating_point()
            or x.shape[:1] != (1,)
        ):
            return x
        self._has_expanded = True
        return x.expand(self._batch_size, *x.shape[1:])

    def stop_expanding(self) -> bool:
        """Expand no more, and prepare to repeat the forward pass.

        Called when the model has failed, which it may have done because of the
        expansion.

        Returns:
            Whether anything was expanded in this pass.
        """
        self._may_expand = False
        self._forget()
        return self._has_expanded
