"""What the backward pass of one physical batch leaves for clipping."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._torch_compat import num_writes, pytree
from opacus_pi.gradients.clipping.completeness import (
    BEYOND,
    Owed,
    autocast_rounding,
    owed,
)
from opacus_pi.gradients.fallback import vmapped_gradients
from opacus_pi.gradients.parameter_gradients import Formed, Gradients, summed
from opacus_pi.gradients.products import at_least_float32
from opacus_pi.models.copies import same_mode_copy

Call = tuple[tuple[Any, ...], dict[str, Any]]

_OVERWRITTEN = (
    "A tensor that the model was given, or that one of its layers was given, was "
    "changed in place before optimizer.step(), which needs it for clipping. Work on a "
    "copy of it."
)
_NOT_USED = (
    "Parameter {} has no gradient of the last backward pass. Let every parameter of "
    "the optimizer take part in the loss, freeze it, or take it out of the optimizer."
)
_REFUSED = (
    "The examples' gradients by {} cannot be told apart: no layer with one batch as "
    "input and one as output uses them, and the model cannot be run again for each "
    "example alone ({}). Give a position embedding a row for each example "
    "(position_ids=torch.arange(length).expand(batch, -1)) and a parameter outside of "
    "layers a layer of its own, or freeze these parameters (requires_grad_(False))."
)
_NO_ROWS = (
    "the loss is of an output of shape {}, which has no row for each of the {} "
    "examples, such as a loss made within the model"
)
_SLOW = (
    "{} are used in a way that has no formula: their gradients are formed example by "
    "example, through the whole model, which is slow."
)


class Inputs:
    """Arguments of a call, kept by reference, as long as nobody changes them.

    Attributes:
        tensors: The tensors among them, cut from the graph.

    Args:
        call: Positional and keyword arguments.
    """

    def __init__(self, call: Call) -> None:
        args, kwargs = call
        self._is_alone = not kwargs and len(args) == 1 and isinstance(args[0], Tensor)
        leaves = list(args)
        if not self._is_alone:
            leaves, self._shape = pytree.tree_flatten(call)
        self._leaves = [v.detach() if isinstance(v, Tensor) else v for v in leaves]
        self.tensors = [v for v in self._leaves if isinstance(v, Tensor)]
        self._versions = self._counts()

    @property
    def call(self) -> Call:
        """The arguments, their tensors cut from the graph."""
        return self._packed(self._leaves)

    @property
    def widened(self) -> Call:
        """The same in single precision or better."""
        return self._packed(
            [at_least_float32(v) if isinstance(v, Tensor) else v for v in self._leaves]
        )

    def _packed(self, leaves: list[Any]) -> Call:
        """Arguments made of their leaves."""
        if self._is_alone:
            return tuple(leaves), {}
        call: Call = pytree.tree_unflatten(leaves, self._shape)
        return call

    @property
    def are_unchanged(self) -> bool:
        """Whether nothing was written into them since."""
        return self._counts() == self._versions

    def _counts(self) -> list[int]:
        """How often each tensor was written to."""
        return [num_writes(tensor) for tensor in self.tensors]


@dataclass
class WholeCall:
    """A call of the whole model, and the gradients that arrived at its outputs."""

    inputs: Inputs
    cotangents: dict[int, Tensor] = field(default_factory=dict)


class Batch:
    """The gradients of one physical batch, by parameter.

    Several calls of the model before the first backward pass are views of one batch:
    row j of each belongs to example j, as Opacus has it.

    Args:
        size: Number of examples, the first dimension of every tensor with rows.

    Attributes:
        missed: Parameters of which neither autograd nor anybody heard a part.
        owed: What autograd was left with of the others that were not all heard.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: list[WholeCall] = []
        self._uses: dict[nn.Parameter, list[Gradients]] = defaultdict(list)
        self._kept: list[Inputs] = []
        self._leftover: set[nn.Parameter] = set()
        self.missed: set[nn.Parameter] = set()
        self.owed: dict[nn.Parameter, Owed] = {}
        self._rounding = autocast_rounding()

    def hear(
        self, found: Mapping[nn.Parameter, Gradients], kept: Inputs | None = None
    ) -> None:
        """An operation's part of its parameters' gradients.

        Args:
            found: By parameter.
            kept: What they follow from, if it may not change until the step.
        """
        for parameter, gradients in found.items():
            self._uses[parameter].append(gradients)
        if kept is not None:
            self._kept.append(kept)

    def leave_over(self, parameters: Iterable[nn.Parameter]) -> None:
        """Their gradients were not all heard; autograd has the rest."""
        self._leftover.update(parameters)

    def miss(self, parameters: Iterable[nn.Parameter]) -> None:
        """Their gradients were not all heard, and autograd has not got the rest."""
        self.missed.update(parameters)

    def gradients(
        self, parameters: Iterable[nn.Parameter], model: nn.Module
    ) -> dict[nn.Parameter, Gradients]:
        """Everything that was heard of some parameters.

        Args:
            parameters: Those that are trained.
            model: The live model, in the mode in which it was called.

        Raises:
            RuntimeError: If an input was overwritten since.
            ValueError: If a parameter's gradients are unknown, with its name.
        """
        if not all(inputs.are_unchanged for inputs in self._kept):
            raise RuntimeError(_OVERWRITTEN)
        wanted = list(parameters)
        found: dict[nn.Parameter, Gradients] = {}
        unknown = self._leftover | self.missed
        if unknown and self.size:
            names = _names(model)
            leftover = {names[p]: p for p in wanted if p in unknown}
            formed = self._through_the_model(leftover, model) if leftover else {}
            found = {p: Formed(formed[name]) for name, p in leftover.items()}
            self._settle({p: formed[name] for name, p in leftover.items()})
        for parameter in wanted:
            if self.size == 0:
                found[parameter] = Formed(parameter.new_zeros(0, parameter.numel()))
            elif parameter not in found:
                if not self._uses[parameter]:
                    raise ValueError(_NOT_USED.format(_names(model)[parameter]))
                found[parameter] = summed(self._uses[parameter])
        return found

    def _settle(self, formed: Mapping[nn.Parameter, Tensor]) -> None:
        """Reckon what autograd has of parameters whose gradients were formed."""
        ones = torch.ones(self.size)
        for parameter, gradients in formed.items():
            factors = ones.to(parameter)
            heard = [use.weighted(factors) for use in self._uses[parameter]]
            self.owed[parameter] = owed(gradients, heard, self._rounding)

    def _through_the_model(
        self, leftover: dict[str, nn.Parameter], model: nn.Module
    ) -> dict[str, Tensor]:
        """Form gradients by differentiating the whole model, example by example."""
        shown = ", ".join(sorted(leftover))
        warnings.warn(_SLOW.format(shown), stacklevel=2)
        twin = same_mode_copy(model)
        calls = [call for call in self.calls if call.cotangents]
        if not calls:
            raise ValueError(BEYOND.format(shown))
        for call in calls:
            for grad in call.cotangents.values():
                if grad.shape[:1] != (self.size,):
                    why = _NO_ROWS.format(tuple(grad.shape), self.size)
                    raise ValueError(_REFUSED.format(shown, why))
        if not all(call.inputs.are_unchanged for call in calls):
            raise RuntimeError(_OVERWRITTEN)
        total: dict[str, Tensor] = {}
        try:
            for call in calls:
                found = vmapped_gradients(
                    twin, leftover, call.inputs.call, call.cotangents
                )
                total = {n: g + total[n] if n in total else g for n, g in found.items()}
        except Exception as error:  # vmap refuses a model in one of many ways
            why = str(error).partition(". ")[0]  # the first sentence of several
            raise ValueError(_REFUSED.format(shown, why)) from error
        return total

    def release(self) -> None:
        """Let go of everything but the size and what autograd is owed."""
        self.calls, self._kept, self._leftover = [], [], set()
        self._uses.clear()


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    """A model's parameters, and what they are called."""
    return {parameter: name for name, parameter in model.named_parameters()}


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    r"""Opacus's :math:`\min(1, C / (\lVert g \rVert + 10^{-6}))`, ``(b,)``."""
    return (max_grad_norm / (norms + 1e-6)).clamp(max=1.0)


def joint_norms(gradients: Iterable[Gradients]) -> Tensor:
    """Norm of each example's gradient over parameters, float64 ``(b,)``."""
    squares = [g.squares for g in gradients]
    return torch.stack([s.to(squares[0].device) for s in squares]).sum(0).sqrt()
