"""Choose, check and run the way in which a model's gradient norms are measured.

Taps measure most layers in one backward pass (:mod:`~opacus_pi.gradients.norm_taps`).
For the remaining parameters per-example gradients are formed
(:mod:`~opacus_pi.gradients.fallback`). The first batch decides how far either can be
trusted: it is searched for parameters that are not indexed by examples, and the example
with the largest norm is differentiated alone by plain autograd. If its norm disagrees,
a rule or the assumption that the first dimension counts examples is wrong, and the taps
are given up. If it still disagrees, the examples influence each other, and every
example is differentiated alone, with a warning.

The guarantee: the norms are those that a loop over examples would give, up to rounding.
What breaks it: a model that behaves otherwise on a later batch than on the first.
"""

import warnings
import weakref
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._torch_compat import pytree, run_backward_in_modes
from opacus_pi._validate import expect
from opacus_pi.gradients.example_gradients import ExampleGradients
from opacus_pi.gradients.fallback import (
    MODEL_ERRORS,
    looped_squares,
    raise_if_out_of_memory,
    vmapped_squares,
)
from opacus_pi.gradients.fallback_warnings import (
    INFLUENCE,
    NEEDS_ALL_GRADIENTS,
    cause,
    warn_of_fallbacks,
)
from opacus_pi.gradients.layers.attention import tap_attention
from opacus_pi.gradients.layers.recurrent import tap_recurrent
from opacus_pi.gradients.norm_taps import NormTaps
from opacus_pi.gradients.parameters_outside_layers import ParametersOutsideLayers
from opacus_pi.gradients.position_tables import parameters_not_indexed_by_example
from opacus_pi.gradients.tapped_layers import tap_layers
from opacus_pi.models.batches import (
    arguments,
    forward,
    give_only_logits,
    map_tensors,
    num_examples,
    reached,
    rows,
)
from opacus_pi.models.complex_weights import require_real
from opacus_pi.models.copies import evaluation_copy, require_own_parameters, unwrap
from opacus_pi.models.losses import float64_losses, unit_cotangents
from opacus_pi.models.own_losses import Criterion
from opacus_pi.models.structure import Place, structure_of, take_values
from opacus_pi.models.written_attributes import ObservedAttributes

_DISAGREE = "the rules of the model disagree with plain autograd"


class NormEngine:
    """Measure squared per-example gradient norms, batch by batch.

    One engine serves one sweep: what it learns from the first batches (which parameters
    the taps cannot measure, whether the model runs under ``torch.func.vmap``) holds for
    the batches that follow. Create and use it inside
    :func:`~opacus_pi.models.no_trace.isolated`, which puts back what the passes change.

    Args:
        model: The live model, plain or wrapped; a copy that shares its weights is run.
        criterion: ``criterion(outputs, targets)``, with one loss per example; a torch
            loss module may have any reduction (it is copied).

    Raises:
        ValueError: If nothing is trainable, or a layer normalises by statistics of the
            batch even in evaluation mode.
    """

    def __init__(self, model: nn.Module, criterion: Criterion) -> None:
        expect(
            any(p.requires_grad for p in model.parameters()),
            "model",
            f"a {type(model).__name__} without one",
            "must have a trainable parameter",
            "Set requires_grad on the parameters to measure.",
        )
        require_real(model)
        # Weak, because hooks on a parameter may hold the model: a kept engine would.
        self._live = [weakref.ref(parameter) for parameter in model.parameters()]
        # For warnings: why parameters are left over
        self._live_model = weakref.ref(unwrap(model))
        self._without_rule: Mapping[nn.Parameter, set[str]] = {}
        self._not_indexed_by_example: set[nn.Parameter] = set()
        self._has_wrong_rules = False
        self._alone: tuple[str, str] = "", ""  # cause and warning
        self._model = evaluation_copy(model)
        self._model.register_forward_hook(give_only_logits)
        self._losses = float64_losses(criterion)
        self._trainable = {
            name: p for name, p in self._model.named_parameters() if p.requires_grad
        }
        self._taps = NormTaps(self._model)
        tapped = tap_attention(self._taps, self._model)
        tapped |= tap_recurrent(self._taps, self._model)
        tapped |= tap_layers(self._taps, self._model)
        # Intercepting every operation of torch is slow, and most models do not need it:
        # it begins where a parameter belongs to no layer that is tapped, or once a pass
        # has left a parameter over.
        self._has_followed_operations = False
        outside = set(self._trainable.values()) - tapped
        self._outside_layers: ParametersOutsideLayers | None = None
        if outside:
            self._follow_operations()
        # Whether torch.func.vmap can run the model, and whether a batch's examples may
        # be differentiated together. Each turns False once it fails, for good.
        self._vectorised, self._together = True, True
        # Whether plain autograd has confirmed a norm, and whether position tables have
        # been looked for. Both happen at the first batch that is suited for it.
        self._checked = False
        self._searched_position_tables = False

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(iter(self._trainable.values())).device

    def structure(self, ignored: Collection[Place]) -> Hashable | None:
        """Return a description of the copy, without its parameters' ``requires_grad``.

        Args:
            ignored: Attributes to be left out.

        Returns:
            ``None`` if there is none, as for
            :func:`~opacus_pi.models.structure.structure_of`.
        """
        flags = [(p, p.requires_grad) for p in self._model.parameters()]
        self._model.requires_grad_(False)
        try:
            return structure_of(self._model, ignored)
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def observed_attributes(self, expected: frozenset[Place]) -> ObservedAttributes:
        """Observe which attributes of the copy its forward passes write.

        Args:
            expected: Attributes whose reads are watched.
        """
        return ObservedAttributes(self._model, expected)

    def take_values(self, model: nn.Module, ignored: Collection[Place]) -> None:
        """Take the present values of the model's buffers and tensors.

        Args:
            model: The unwrapped model, of unchanged structure.
            ignored: Attributes to be left as they are.
        """
        take_values(self._model, model, ignored)

    def _live_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the live model."""
        for reference in self._live:
            if (parameter := reference()) is not None:
                yield parameter

    def squares(self, x: Any, y: Any) -> tuple[Tensor, Any]:
        """Return the squared norms, float64 ``(b,)``, and the detached outputs.

        Until a norm has been confirmed, three ways are tried, from fast to slow: taps,
        per-example gradients by ``torch.func``, and one example after the other. Each
        is given up only when plain autograd contradicts it.

        Args:
            x: Inputs of ``b`` examples, on the model's device.
            y: Their targets.

        Raises:
            ValueError: If the criterion does not give one loss per example, or a copy
                of the model still computes with the parameters of the original.
        """
        if self._together:
            found = self._measured_together(x, y)
            if found is not None:
                self._warn_of_fallbacks()
                return found
        squares, outputs = self._looped(self._trainable, x, y)
        if self._together:
            self._together = False
            warnings.warn(self._alone[1], stacklevel=4)
        return squares, pytree.tree_map(lambda *parts: torch.cat(parts), *outputs)

    def _measured_together(self, x: Any, y: Any) -> tuple[Tensor, Any] | None:
        """Measure the examples of a batch together.

        Returns:
            As :meth:`squares`; ``None`` if each example must be differentiated alone.
        """
        try:
            self._search_position_tables(x, num_examples(y))
            squares, outputs = self._batched(x, y)
            if self._checked or self._checks(squares, x, y):
                return squares, outputs
            self._has_wrong_rules = True
            self._taps.leave_all_over()
            squares, outputs = self._batched(x, y)
            if self._checks(squares, x, y):
                return squares, outputs
        except MODEL_ERRORS as error:
            raise_if_out_of_memory(error)
            if not self._taps.leftover:
                raise
            message = NEEDS_ALL_GRADIENTS.format(error=error)
            self._alone = "the model cannot be run otherwise", message
        else:
            self._alone = "examples influence each other", INFLUENCE
        return None

    @property
    def ways(self) -> dict[str, str]:
        """How each parameter is measured: the way, and the cause of a slow one.

        See :func:`~opacus_pi.gradients.rule_coverage`.
        """
        if not self._together:
            return dict.fromkeys(self._trainable, f"one at a time: {self._alone[0]}")
        ways = dict.fromkeys(self._trainable, "exact rule")
        slow = "torch.func" if self._vectorised else "one at a time"
        for name in self._taps.leftover:
            ways[name] = f"{slow}: {self._cause(name)}"
        return ways

    def _cause(self, name: str) -> str:
        """Return why a parameter has no exact rule."""
        if self._has_wrong_rules:
            return _DISAGREE
        parameter, (owner, _, _) = self._trainable[name], name.rpartition(".")
        operations = self._without_rule.get(parameter, set())
        is_misplaced = parameter in self._not_indexed_by_example
        return cause(self._model.get_submodule(owner), operations, is_misplaced)

    def _warn_of_fallbacks(self) -> None:
        """Warn of parameters without an exact rule, once for each model."""
        if self._taps.leftover:
            slow = {n: way for n, way in self.ways.items() if way != "exact rule"}
            warn_of_fallbacks(self._live_model(), slow, stacklevel=5)

    @property
    def is_confirmed(self) -> bool:
        """Return whether plain autograd has confirmed or refuted the fast ways."""
        return self._checked or not self._together

    @property
    def tapped(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradients the taps give, by name."""
        if not self._together:
            return {}
        left = self._taps.leftover
        return {name: p for name, p in self._trainable.items() if name not in left}

    def held(
        self, x: Any, y: Any, names: Collection[str]
    ) -> tuple[dict[str, ExampleGradients], Tensor]:
        """Return each example's gradients by some parameters, not yet formed.

        Args:
            x: Inputs of ``b`` examples, on the model's device.
            y: Their targets.
            names: Names of tapped parameters.

        Returns:
            The gradients of losses whose gradient at the model's output is scaled to
            unit length, by name, and the lengths before, float64 ``(b,)``. A parameter
            that the batch did not use is missing, and so is one that the taps turned
            out not to measure, which is then no longer among :attr:`tapped`.
        """
        passed = None
        with self._taps.holding(self._trainable[name] for name in names):
            while passed is None:
                passed = self._passed(x, y)
            return self._taps.held(), passed[2]

    def _search_position_tables(self, x: Any, size: int) -> None:
        """Exclude from the taps the parameters that are not indexed by examples.

        This is done at the first batch of more than one example, which can show them.
        """
        if self._searched_position_tables or size < 2:
            return
        self._searched_position_tables = True
        found = parameters_not_indexed_by_example(self._model, arguments(x), size)
        self._not_indexed_by_example = found
        self._taps.leave_over(found)

    def _batched(self, x: Any, y: Any) -> tuple[Tensor, Any]:
        """Measure the examples of a batch together.

        Parameters that the taps cannot measure are *left over* and measured in another
        way. The pass is repeated until no more are found. That happens in the first
        batch only, and at most a few times, because the set only grows.

        Each example's output gradient has unit length when it enters the network, and
        the norms are multiplied by its length afterwards
        (:func:`~opacus_pi.models.losses.unit_cotangents`): gradients of well-fitted
        examples would underflow on their way.
        """
        passed = None
        while passed is None:
            passed = self._passed(x, y)
        outputs, cotangents, scales = passed
        squares = self._taps.squares(like=scales) * scales.square()
        if self._taps.leftover:
            squares = squares + self._leftover_squares(x, y, cotangents, scales)
        return squares, map_tensors(Tensor.detach, outputs)

    def _passed(self, x: Any, y: Any) -> tuple[Any, dict[int, Tensor], Tensor] | None:
        """Make a forward and backward pass, tapped.

        Returns:
            The outputs, the gradient at each output at unit length, and the lengths
            before, ``(b,)``; ``None`` if the pass must be repeated. Its tensors are
            freed then, which are large for a large vocabulary.
        """
        with self._taps.intercepting(num_examples(y)):
            outputs = self._forward(x)
            if not self._checked:
                require_own_parameters(outputs, self._live_parameters())
            cotangents, scales = unit_cotangents(self._losses, outputs, y)
            ends, units = reached(outputs, cotangents)
            if ends:
                with self._following():
                    run_backward_in_modes(ends, units)
        if self._taps.has_missed_any and not self._has_followed_operations:
            self._taps.drop_missed()
            self._follow_operations()
            return None
        is_complete = self._taps.update_leftover()
        if is_complete:
            self._stop_following_in_vain()
        return (outputs, cotangents, scales) if is_complete else None

    def _follow_operations(self) -> None:
        """Intercept every operation from now on."""
        self._has_followed_operations = True
        self._outside_layers = ParametersOutsideLayers(
            self._taps, self._model, sees_reruns=True
        )
        self._without_rule = self._outside_layers.unruled

    def _stop_following_in_vain(self) -> None:
        """Intercept no more operations if none was tapped."""
        if self._outside_layers is not None and not self._outside_layers.has_tapped:
            self._outside_layers = None

    def _following(self) -> AbstractContextManager[Any]:
        """Return the context in which operations are intercepted, if they need be.

        It is entered for the backward pass, too, in which ``torch.utils.checkpoint``
        runs parts of the model again.
        """
        return self._outside_layers or nullcontext()

    def _forward(self, x: Any) -> Any:
        """Return the outputs.

        If the model fails where shared positions were expanded to the batch, it is run
        again without that.
        """
        try:
            with self._following():
                return forward(self._model, x)
        except MODEL_ERRORS as error:
            raise_if_out_of_memory(error)
            if not self._taps.stop_expanding():
                raise
        return self._forward(x)

    def _leftover_squares(
        self, x: Any, y: Any, cotangents: dict[int, Tensor], scales: Tensor
    ) -> Tensor:
        """Measure the parameters left over, by per-example gradients.

        Args:
            x: Inputs of ``b`` examples.
            y: Their targets.
            cotangents: The gradient at each output, at unit length for each example.
            scales: The lengths before, ``(b,)``.

        Returns:
            Squared norms over these parameters, float64 ``(b,)``.
        """
        names = sorted(self._taps.leftover)
        leftover = {name: self._trainable[name] for name in names}
        if self._vectorised:
            try:
                found = vmapped_squares(self._model, leftover, x, cotangents)
                return found * scales.square()
            except MODEL_ERRORS as error:
                raise_if_out_of_memory(error)
                self._vectorised = False
        return self._looped(leftover, x, y)[0]

    def _looped(
        self, parameters: Mapping[str, Tensor], x: Any, y: Any
    ) -> tuple[Tensor, list[Any]]:
        """Measure one example after the other, by plain autograd.

        This way assumes nothing of the model, and is the reference for the others.

        Args:
            parameters: The parameters to measure, by name.
            x: Inputs of ``b`` examples.
            y: Their targets.

        Returns:
            Squared norms, float64 ``(b,)``, and the outputs of each example.
        """
        return looped_squares(
            self._model, list(parameters.values()), self._losses, x, y
        )

    def _checks(self, squares: Tensor, x: Any, y: Any) -> bool:
        """Return whether plain autograd gives the largest of the squared norms as well.

        The largest norm is compared, because it has the most significant digits and
        counts the most. A norm of 0 proves nothing: then the next batch is checked.

        Args:
            squares: Squared norms of a batch, float64 ``(b,)``.
            x: Its inputs.
            y: Its targets.
        """
        place = int(squares.argmax())
        alone, _ = self._looped(
            self._trainable, rows(x, place, place + 1), rows(y, place, place + 1)
        )
        norm, truth = squares[place].sqrt(), alone[0].sqrt()
        close = torch.allclose(
            norm, truth, rtol=self._tolerance(), atol=0.0, equal_nan=True
        )
        self._checked = close and bool(truth > 0)
        return close

    def _tolerance(self) -> float:
        """Return the relative difference of norms that rounding may cause.

        On a GPU convolutions may run in TF32, with 10 bits of precision.
        """
        kinds = [p.dtype for p in self._trainable.values()]
        rounding = max(torch.finfo(kind).eps for kind in kinds)
        return max(1e-3 if self.device.type == "cpu" else 1e-2, 32 * rounding)
