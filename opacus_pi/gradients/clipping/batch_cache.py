"""Per-batch cache of layer inputs and output gradients, from which clipping computes.

For every operation that uses a parameter, a backward pass adds to the cache each
example's gradient by this parameter: as a tensor, or as the input and output gradient
from which it follows (:mod:`~opacus_pi.gradients.example_gradients`). Once the pass is
over, norms and clipped sums of all parameters follow from the cache.

The guarantee: for every parameter, the cache returns each example's whole gradient, or
raises. Parameters that were used in an operation without a rule are differentiated
through the whole model, example by example, with a warning; and the sum of those
gradients is compared with what autograd received
(:mod:`~opacus_pi.gradients.clipping.completeness`). What breaks it: inputs overwritten
without a trace in their version counters, and a wrong rule.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from opacus_pi.gradients.clipping.completeness import (
    BEYOND_THE_OUTPUTS,
    Remainder,
    autocast_rounding,
    expected_remainder,
)
from opacus_pi.gradients.clipping.copied_calls import require_copyable
from opacus_pi.gradients.example_gradients import (
    ExampleGradients,
    ExplicitGradients,
    add_up,
)
from opacus_pi.gradients.fallback import (
    MODEL_ERRORS,
    raise_if_out_of_memory,
    vmapped_gradients,
)
from opacus_pi.gradients.taps import SavedInputs
from opacus_pi.models.copies import same_mode_copy

_OVERWRITTEN = (
    "An input of the model, or of one of its layers, was changed in place before "
    "optimizer.step(), which needs the original values for clipping. Change a copy "
    "instead."
)
_NOT_USED = (
    "The last backward pass computed no gradient for parameter {}. Use the parameter "
    "in the loss, freeze it (requires_grad_(False)), or remove it from the optimizer."
)
_NOT_SEPARABLE = (
    "The per-example gradients of {} cannot be computed. These parameters are used "
    "outside of layers whose inputs and outputs have one row for each example, and the "
    "model cannot be run for each example alone ({}). For a position embedding, pass "
    "one row of positions for each example "
    "(position_ids=torch.arange(length).expand(batch, -1)). Move a parameter that is "
    "used outside of layers into a layer of its own. Or freeze these parameters "
    "(requires_grad_(False))."
)
_NO_ROWS = (
    "the loss depends on an output of shape {}, which does not have one row for each "
    "of the {} examples; this happens, for example, if the model computes the loss "
    "itself"
)
_SLOW = (
    "There is no formula for the per-example gradients of {}. They are computed by "
    "running the whole model again for each example (torch.func.vmap), which is slow "
    "and takes much memory. Give each layer inputs with one row for each example, and "
    "move a parameter that is used outside of layers into a layer of its own."
)


@dataclass
class WholeCall:
    """A call of the whole model, and the gradients that arrived at its outputs.

    Attributes:
        inputs: The arguments.
        cotangents: The gradients, by the output's position among the tensors that the
            call returned.
    """

    inputs: SavedInputs
    cotangents: dict[int, Tensor] = field(default_factory=dict)


class BatchCache:
    """The gradients of each example of one physical batch, by parameter.

    Several calls of the model before the first backward pass are views of one batch:
    sample j of each belongs to example j, as in Opacus.

    Args:
        size: Number of examples: the length of the first dimension of tensors that have
            one row for each example.

    Attributes:
        size: Number of examples.
        calls: The calls of the whole model for this batch, each a ``WholeCall``.
        missed: Parameters for which a part of the gradient is neither in the cache nor
            in autograd's sum.
        remainders: For parameters whose gradients are only partly in the cache: the sum
            that autograd must have for the rest. Filled by ``gradients``.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: list[WholeCall] = []
        self.missed: set[nn.Parameter] = set()
        self.remainders: dict[nn.Parameter, Remainder] = {}
        self._parts: dict[nn.Parameter, list[ExampleGradients]] = defaultdict(list)
        self._needed: list[SavedInputs] = []  # until the step
        self._leftover: set[nn.Parameter] = set()
        self._rounding = autocast_rounding()

    # ------------------------------------------------------------ while passes are made
    def add(
        self, found: Mapping[nn.Parameter, ExampleGradients], inputs: SavedInputs
    ) -> None:
        """Add one operation's part of its parameters' gradients.

        Args:
            found: The examples' gradients, by parameter.
            inputs: The tensors from which they are computed, which may not change until
                the step.
        """
        for parameter, gradients in found.items():
            self._parts[parameter].append(gradients)
        self._needed.append(inputs)

    def leave_over(self, parameter: nn.Parameter) -> None:
        """Record that autograd has summed up a part of a parameter's gradients.

        A hook on the parameter calls this when a gradient arrives that no tap has
        intercepted. The examples' gradients by this parameter are then computed by
        differentiating the whole model.

        Args:
            parameter: A parameter of the live model.
        """
        self._leftover.add(parameter)

    def miss(self, parameters: Iterable[nn.Parameter]) -> None:
        """Record that a part of some gradients is neither stored here nor in autograd.

        The layer was frozen while it ran, so autograd computes nothing for it, and its
        tap could not be used. Then there is no sum to compare with.

        Args:
            parameters: Parameters of the live model.
        """
        self.missed.update(parameters)

    # --------------------------------------------------------------------- for the step
    def gradients(
        self, parameters: Iterable[nn.Parameter], model: nn.Module
    ) -> dict[nn.Parameter, ExampleGradients]:
        """Return each example's gradients with respect to the given parameters.

        Args:
            parameters: The trained parameters.
            model: The live model, in the mode in which it was called.

        Raises:
            RuntimeError: If an input was overwritten after the forward pass.
            ValueError: If a parameter's gradients are unknown, with its name.
        """
        if not all(inputs.are_unchanged for inputs in self._needed):
            raise RuntimeError(_OVERWRITTEN)
        wanted = list(parameters)
        if self.size == 0:
            empty = {p: p.new_zeros(0, p.numel()) for p in wanted}
            return {p: ExplicitGradients(values) for p, values in empty.items()}
        formed = self._form_incomplete(wanted, model)
        found = {p: formed[p] if p in formed else self._sum(p, model) for p in wanted}
        if formed:
            self._note_remainders(formed, found)
        return found

    def release(self) -> None:
        """Free everything but the size and the remainders."""
        self.calls, self._needed, self._leftover = [], [], set()
        self._parts.clear()

    def _sum(self, parameter: nn.Parameter, model: nn.Module) -> ExampleGradients:
        """Return the sum of a parameter's parts, none of which is missing."""
        if not self._parts[parameter]:
            raise ValueError(_NOT_USED.format(_names(model)[parameter]))
        return add_up(self._parts[parameter])

    def _form_incomplete(
        self, wanted: list[nn.Parameter], model: nn.Module
    ) -> dict[nn.Parameter, ExplicitGradients]:
        """Form gradients of parameters that taps have not intercepted everywhere.

        Args:
            wanted: The trained parameters.
            model: The live model.

        Returns:
            The gradients of the incomplete parameters only.
        """
        unknown = self._leftover | self.missed
        names = _names(model) if unknown else {}
        incomplete = {names[p]: p for p in wanted if p in unknown}
        if not incomplete:
            return {}
        formed = self._through_the_model(incomplete, model)
        return {p: ExplicitGradients(formed[name]) for name, p in incomplete.items()}

    def _note_remainders(
        self,
        formed: Mapping[nn.Parameter, ExplicitGradients],
        found: Mapping[nn.Parameter, ExampleGradients],
    ) -> None:
        """Note the sums that autograd must have of what taps have not intercepted.

        :meth:`TrainingTaps.require_complete` compares them with autograd's.

        Args:
            formed: The gradients that were formed by running the model again.
            found: The gradients of all trained parameters.
        """
        whole = example_norms(found.values()).sum()
        ones = torch.ones(self.size)
        for parameter, gradients in formed.items():
            factors = ones.to(parameter)
            parts = [part.weighted_sum(factors) for part in self._parts[parameter]]
            self.remainders[parameter] = expected_remainder(
                gradients.values, parts, self._rounding, whole
            )

    def _through_the_model(
        self, parameters: dict[str, nn.Parameter], model: nn.Module
    ) -> dict[str, Tensor]:
        """Form gradients by differentiating the whole model, example by example.

        Args:
            parameters: Parameters to differentiate with respect to, by name.
            model: The live model; a copy of it in the same mode is run.

        Returns:
            ``(b, *shape)`` by name, added up over the calls of the model.

        Raises:
            RuntimeError: If an input of the model was overwritten after the forward
                pass.
            ValueError: If no output of the model was used for the loss, or an output
                has no row for each example, the model fails for single examples, or a
                copy of it computes with its own parameters.
        """
        shown = ", ".join(sorted(parameters))
        warnings.warn(_SLOW.format(shown), stacklevel=2)
        calls = [call for call in self.calls if call.cotangents]
        if not calls:
            raise ValueError(BEYOND_THE_OUTPUTS.format(shown))
        self._require_rows(calls, shown)
        if not all(call.inputs.are_unchanged for call in calls):
            raise RuntimeError(_OVERWRITTEN)
        total: dict[str, Tensor] = {}
        require_copyable(model, calls[0].inputs.call, self.size)
        copied = same_mode_copy(model)
        try:
            for call in calls:
                found = vmapped_gradients(
                    copied, parameters, call.inputs.call, call.cotangents
                )
                total = {n: g + total[n] if n in total else g for n, g in found.items()}
        except MODEL_ERRORS as error:
            raise_if_out_of_memory(error)
            why = str(error).partition(". ")[0]  # the first sentence of several
            raise ValueError(_NOT_SEPARABLE.format(shown, why)) from error
        return total

    def _require_rows(self, calls: Iterable[WholeCall], shown: str) -> None:
        """Raise if the loss used an output without one row for each example."""
        for call in calls:
            for grad in call.cotangents.values():
                if grad.shape[:1] != (self.size,):
                    why = _NO_ROWS.format(tuple(grad.shape), self.size)
                    raise ValueError(_NOT_SEPARABLE.format(shown, why))


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Return a model's parameters with their names."""
    return {parameter: name for name, parameter in model.named_parameters()}


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    r"""Return :math:`\min(1, C / (\lVert g \rVert + 10^{-6}))` for each example.

    The small constant is Opacus's. It avoids a division by zero for an example with
    gradient 0, and keeps clipped gradients just below the clip norm.

    Args:
        norms: Norm of each example's gradient before clipping, ``(b,)``.
        max_grad_norm: The clip norm C.

    Returns:
        ``(b,)``, in the type of the norms.
    """
    return (max_grad_norm / (norms + 1e-6)).clamp(max=1.0)


def example_norms(gradients: Iterable[ExampleGradients]) -> Tensor:
    """Return the norm of each example's gradient over several parameters.

    Args:
        gradients: The examples' gradients of each parameter, at least one. Parameters
            may be on several devices; the sum is taken on the first one's.

    Returns:
        float64 ``(b,)``.
    """
    squares = [g.squares for g in gradients]
    return torch.stack([s.to(squares[0].device) for s in squares]).sum(0).sqrt()
