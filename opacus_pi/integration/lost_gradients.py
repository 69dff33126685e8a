"""Find gradients that are not in the per-example gradients that make an update.

With per-example gradients (hooks, functorch, ew) Opacus replaces ``p.grad`` by the sum
of clipped ``p.grad_sample``. Whatever reaches a weight without passing through the call
of a layer is in ``p.grad`` only, and is lost: a penalty on the weights in the loss, a
parameter that only the loss uses, the use of a weight in a function, what a gradient
hook adds. Before clipping, the sum of the per-example gradients of a backward pass must
be what the pass has added to ``p.grad``.

The gradient of a parameter that only the loss uses arrives before the backward pass
reaches the outputs of the model. So ``p.grad`` is noted in the forward pass, and
otherwise when the backward pass reaches the outputs. A loop may clear ``p.grad`` in
between; then all of it is what the pass has added.

*Guarantee.* In a checked backward pass, a lost gradient is found if it is larger than
1 % of what the examples contribute (the sum of their norms; up to 6 % in half or mixed
precision). Passes 1, 2, 4, 8, 16 and so on are checked, and every 64th. It is reported
when an update uses the gradients of the pass. Nothing is written.

With ew, torch computes the per-example gradients in place of ``p.grad``, so a pass
should add nothing to it.

*What breaks it.* Models whose outputs are not what the loss is computed from, and
distributed runs: there no pass is checked. Parameters on an accelerator are not
compared, because every pass would have to wait for it. A second call of ``backward``
that does not reach the outputs, such as one for a penalty alone, is not seen if it
follows the first. If two forward passes come before two backward passes, a parameter
that only the loss uses is compared in the first of these only.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._torch_compat import at_end_of_backward, current_backward_pass
from opacus_pi.custody import Chain
from opacus_pi.custody.looks import Looks
from opacus_pi.gradients.clipping.completeness import autocast_rounding
from opacus_pi.integration.explanations import listed
from opacus_pi.integration.opacus_compat import unfinished_calls

__all__ = ["LostGradients"]

_LOST = (
    "The gradient of {names} is not the sum of the per-example gradients that Opacus "
    "has computed: {share:.0%} of what it is made of is something else. Opacus "
    "computes per-example gradients at the calls of layers, and the update has no "
    "others. Everything else in the gradient is left out, such as a penalty on the "
    "weights, the use of a parameter in the loss, or a change by a gradient hook. The "
    "recorded norms are those of the per-example gradients that were clipped, but "
    "these are not the gradients of the loss. Replace a penalty by the optimizer's "
    "weight_decay, and use the model's parameters within its forward pass only."
)
_LOST_SHARE = 0.01
_ROUNDINGS = 8  # of the type of the gradients
_LEAST = 1e-3  # a parameter's share of all gradients below which rounding decides


@dataclass(frozen=True)
class _Before:
    """A parameter before a backward pass."""

    parameter: nn.Parameter
    grad: Tensor | None
    newest: weakref.ref[Tensor] | None  # of its per-example gradients

    @property
    def has_new(self) -> bool:
        """Return whether its newest per-example gradients are those of this pass."""
        newest = _newest(self.parameter)
        return self.newest is None or self.newest() is not newest


class LostGradients:
    """Compares gradients with the sums of per-example gradients.

    Args:
        model: The user's module.
        parameters: Those that the optimizer updates.
        chain: Its link "norm" is left unchecked if gradients are lost.
        is_mean: Whether the loss of a batch is the mean of the examples' losses.
        is_instead: Whether a pass adds nothing to ``p.grad``.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter],
        chain: Chain,
        *,
        is_mean: bool,
        is_instead: bool = False,
    ) -> None:
        self._parameters = list(parameters)
        ids = set(map(id, self._parameters))
        self._names = {id(p): n for n, p in model.named_parameters() if id(p) in ids}
        self._chain, self._is_mean, self._is_instead = chain, is_mean, is_instead
        self._looks = Looks()
        self._pass = -1  # the number that torch gives it
        self._rounding = 0.0  # of mixed precision
        self._before: list[_Before] | None = None
        self._found = ""  # in a pass whose gradients no update has used yet

    def saw(self, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        """Note in a forward pass what the comparison needs.

        Args:
            args: The positional inputs of the model; not used.
            kwargs: Its inputs by keyword; not used.
            outputs: Its outputs; not used.
        """
        if self._looks.is_due:
            self._rounding = autocast_rounding()
            self._before = self._noted()

    def _noted(self) -> list[_Before]:
        """Return the parameters in host memory as they are."""
        return [
            _Before(p, None if p.grad is None else p.grad.clone(), _reference(p))
            for p in self._parameters
            if p.requires_grad and p.device.type == "cpu"
        ]

    def backward_began(self, *, is_second: bool = False) -> None:
        """Compare when the backward pass has ended, if it is one to be checked.

        Args:
            is_second: Not used: these modes have one backward pass.
        """
        present = current_backward_pass()
        if present == self._pass:  # of another output
            return
        self._pass = present
        if self._looks.count():
            before = self._noted() if self._before is None else self._before
            self._before = None
            at_end_of_backward(partial(self._compare, before))

    def _compare(self, before: list[_Before]) -> None:
        """Compare what a backward pass has added."""
        with torch.no_grad():
            compared = [one for one in before if self._is_comparable(one)]
            found = [self._difference(one) for one in compared]
        if not found:
            return
        differences, sizes = torch.stack(found).double().T.tolist()
        least = _LEAST * sum(sizes)
        shares = {}
        for one, difference, size in zip(compared, differences, sizes, strict=True):
            if difference > self._tolerance(one.parameter) * max(size, least):
                name = self._names.get(id(one.parameter), "a parameter")
                shares[name] = difference / (difference + size)
        if shares:
            share = max(shares.values())
            self._found = _LOST.format(names=listed(shares), share=share)

    def _is_comparable(self, before: _Before) -> bool:
        """Return whether the per-example gradients of the pass are known by themselves.

        Those of several passes must be kept apart, which ew does not do; and Opacus
        keeps none before all calls of a layer have had their backward pass.
        """
        parameter = before.parameter
        if unfinished_calls(parameter):
            return False
        if (
            before.newest is None
            or type(getattr(parameter, "grad_sample", None)) is list
        ):
            return True
        return before.has_new and not self._is_instead

    def gradients_were_cleared(self) -> None:
        """Forget what was found in passes whose gradients no update will use.

        A generator is trained through the private model with such passes.
        """
        self._found = ""

    def gradients_were_used(self) -> None:
        """Report what was found: the gradients of the passes enter an update."""
        found, self._found = self._found, ""
        if found and not self._chain.is_broken("norm"):
            self._chain.leave_unchecked("norm", found)

    def _tolerance(self, parameter: nn.Parameter) -> float:
        """Return which share of a parameter's gradient may be rounding."""
        newest = _newest(parameter)
        kind = parameter.dtype if newest is None else newest.dtype
        rounding = max(self._rounding, torch.finfo(kind).eps)
        return max(_LOST_SHARE, _ROUNDINGS * rounding)

    def _difference(self, before: _Before) -> Tensor:
        """Return the norm of what is lost, and the size of what is not, ``(2,)``."""
        parameter, device = before.parameter, self._parameters[0].device
        newest = _newest(parameter)
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        total, size = torch.zeros_like(grad), grad.new_zeros(())
        if newest is not None and before.has_new and newest.numel():
            count = len(newest) if self._is_mean else 1
            if not self._is_instead:
                total = newest.sum(0).view_as(grad) / count
            size = newest.reshape(len(newest), -1).norm(dim=1).sum() / count
        lost = (grad.to_dense() - total).norm()
        if before.grad is not None:  # unless the loop has cleared it since
            added = (grad - before.grad).to_dense()
            lost = torch.minimum(lost, (added - total).norm())
        return torch.stack([lost, torch.maximum(size, total.norm())]).to(device)


def _newest(parameter: nn.Parameter) -> Any:
    """Return the per-example gradients of the last backward pass, ``(b, ...)``."""
    held: Any = getattr(parameter, "grad_sample", None)
    return held[-1] if type(held) is list else held


def _reference(parameter: nn.Parameter) -> "weakref.ref[Tensor] | None":
    """Return a weak reference to the newest per-example gradients, if there are any."""
    newest = _newest(parameter)
    return None if newest is None else weakref.ref(newest)
