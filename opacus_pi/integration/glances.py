"""Compares the gradients of the model's outputs with those of an audited criterion.

``loop_loss`` repeats a whole update, which takes several passes through a copy of the
model, so it does that a few times only. A glance needs no pass: the criterion is
evaluated again on a copy of the outputs that the loop has computed, with the delivered
targets. Its gradients must be those that reached the outputs, up to a factor, which
``loss_multiples`` judges.

*When.* In each of the first 64 updates, and later in one of eight. Two glances are at
most 15 updates apart; a generator of this file draws how many.

*Guarantee.* A loss of torch is compared exactly, up to rounding. Nothing is drawn, and
no update waits for an accelerator: differences there are read with the chain.

*What breaks it.* Another loss in k single updates after the first 64 is missed with a
probability of (7/8)^k. So is one that begins within the last 15 updates of a run and
meets no glance. Whatever reaches the weights in another way than through the outputs,
such as a penalty on the weights that begins late, is not seen. In mixed precision,
factors are not compared. A criterion of the user may draw random numbers or count its
calls, so it is not compared at all; its link stays unchecked for another reason.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opacus_pi.attribution.delivery import Delivery, ForwardPass
from opacus_pi.attribution.lookalikes import rows_of_all
from opacus_pi.attribution.targets import in_order_of_pass
from opacus_pi.custody import Chain
from opacus_pi.custody.function_copies import copied_if_possible
from opacus_pi.custody.looks import Looks
from opacus_pi.gradients.fallback import MODEL_ERRORS
from opacus_pi.integration.loss_multiples import LossMultiples
from opacus_pi.models.batches import (
    floating,
    inputs_and_targets,
    logits_of,
    map_tensors,
)
from opacus_pi.models.output_gradients import OutputGradients, rows_by_example

__all__ = ["Glance", "Glances"]

_ALL_OF_FIRST = 64  # updates
_LARGEST_GAP = 15  # updates; drawn from 1 to this, so 8 in the mean
_MAX_AWAITED = 256  # comparisons on an accelerator that have not been read
_ALIKE = 1e-3  # relative difference of gradients that counts as none
_ROUNDINGS = 16  # of an entry of the outputs
_COARSE = 0.5  # tolerance above which nothing is compared
_TINY = 1e-30


@dataclass(frozen=True)
class Glance:
    """A forward pass of the loop whose outputs are compared.

    Args:
        outputs: Copies of the outputs, nested as the criterion gets them.
        gradients: The gradients that reach them.
        device: The type of their device.
        mixed_type: The data type of automatic mixed precision; None: it was off.
    """

    outputs: Any
    gradients: OutputGradients
    device: str
    mixed_type: torch.dtype | None

    @classmethod
    def at(cls, outputs: Any) -> "Glance":
        """Return a glance at the outputs that a model has just returned.

        Args:
            outputs: Tensors in any nesting, with their graph.
        """
        logits = logits_of(outputs)
        device = next((x.device.type for x in floating(logits).values()), "cpu")
        is_mixed = torch.is_autocast_enabled(device)
        kind = torch.get_autocast_dtype(device) if is_mixed else None
        copied = map_tensors(lambda tensor: tensor.detach().clone(), logits)
        return cls(copied, OutputGradients(logits), device, kind)


class Glances:
    """Compares the gradients of the outputs in many updates.

    Args:
        criterion: A loss of torch, which was audited. A copy of it is called, so that
            settings that are changed later are another loss.
        chain: The chain of custody of the run; reads what awaits an accelerator.
        batch_dim: The dimension of the inputs along which the examples are.
        is_summed: Whether training sums losses that the criterion does not reduce;
            otherwise it takes their mean.
        tell_other: Called if a loss was another one, with the number of examples that
            it left out, and the number of all that were compared.
        multiples: Judges the factors of the gradients.
    """

    def __init__(
        self,
        criterion: Callable[[Any, Any], Tensor],
        chain: Chain,
        *,
        batch_dim: int,
        is_summed: bool,
        tell_other: Callable[[int, int], None],
        multiples: LossMultiples,
    ) -> None:
        self._criterion = copied_if_possible(criterion)
        self._dim, self._is_summed = batch_dim, is_summed
        self._tell_other, self._multiples = tell_other, multiples
        self._looks = Looks(_updates())
        self._awaited: list[Tensor] = []
        chain.on_read(self._judge)

    @property
    def is_near(self) -> bool:
        """Whether targets are needed: a loop may get its next batch before it steps."""
        return self._looks.is_near

    @property
    def is_due(self) -> bool:
        """Whether the outputs of the update under way are compared."""
        return self._looks.is_due

    def update_was_made(self) -> None:
        """Count an update."""
        self._looks.count()

    def saw_batch(self, delivery: Delivery, batch: Any) -> None:
        """Keep copies of the targets of a batch, if they may be needed.

        Args:
            delivery: Its description.
            batch: What the loop receives.
        """
        if not self.is_near:
            return
        try:
            targets = inputs_and_targets(batch)[1]
        except ValueError:
            return
        delivery.targets = map_tensors(Tensor.clone, targets)

    def compare(self, passes: Sequence[ForwardPass]) -> None:
        """Compare the passes of a physical batch whose outputs were kept.

        Passes with samples that were not recognised are left out.

        Args:
            passes: The forward passes whose gradients were clipped.
        """
        for forward in passes:
            if not isinstance(forward.call, Glance) or not forward.is_recognised:
                continue
            found = self._compared(forward, forward.call, len(passes))
            if found is not None:
                self._awaited.append(found)
                if found.is_cpu or len(self._awaited) >= _MAX_AWAITED:
                    self._judge()

    def _compared(
        self, forward: ForwardPass, glance: Glance, num_passes: int
    ) -> Tensor | None:
        """Compare a pass, without waiting for an accelerator.

        Args:
            forward: The pass.
            glance: What was kept of it.
            num_passes: The number of passes whose gradients were clipped together.

        Returns:
            float32 ``(8,)``: how far the directions differ, the factor, the tolerance
            of both, the number of passes, that of samples, how many of how many
            examples had no gradient although the criterion gives them one, and the
            loss. None if nothing can be compared.
        """
        delivery = forward.delivery
        kept = None if delivery is None else delivery.targets
        targets = None if kept is None else in_order_of_pass(forward, kept, self._dim)
        evaluated = None if targets is None else self._expected(glance, targets)
        if evaluated is None:
            return None
        loss, expected = evaluated
        gradients = glance.gradients.tensors()
        places = sorted(set(expected) & set(gradients))
        size = forward.num_samples or 0
        one, other = (
            rows_by_example([found[p].float() for p in places], size, self._dim)
            for found in (gradients, expected)
        )
        if one.shape != other.shape:
            return None
        is_known = torch.ones(size, dtype=torch.bool)
        is_known[torch.from_numpy(rows_of_all(forward.alike))] = False
        if not bool(is_known.all()):
            rows = is_known.nonzero()[:, 0].to(one.device)
            one, other = one[rows], other[rows]
        if not one.numel():
            return None
        is_left_out = (one == 0).all(dim=1) & (other != 0).any(dim=1)
        is_mixed = glance.mixed_type is not None
        return torch.stack(
            [
                *_direction_and_factor(one, other, is_mixed=is_mixed),
                self._tolerance(glance, other),
                one.new_tensor(num_passes),
                one.new_tensor(size),
                is_left_out.sum().float(),
                one.new_tensor(len(one)),
                loss.to(one),
            ]
        )

    def _tolerance(self, glance: Glance, expected: Tensor) -> Tensor:
        """Return the relative difference of gradients that rounding may cause.

        Args:
            glance: The outputs, whose entries were rounded.
            expected: The gradients, float32 ``(b, k)``. Where all of them are small, as
                late in a training, they are differences of numbers near 1.
        """
        outputs = list(floating(glance.outputs).values())
        kinds = {x.dtype for x in outputs} | {glance.mixed_type or torch.float32}
        rounding = max(torch.finfo(kind).eps for kind in kinds)
        largest = torch.stack([x.detach().abs().max().float() for x in outputs]).max()
        share = 1 if self._is_summed else len(expected)
        error = _ROUNDINGS * rounding * (1 + largest) * expected.numel() ** 0.5 / share
        share_of_all: Tensor = error / expected.norm().clamp(min=_TINY)
        return share_of_all + max(_ALIKE, 8 * rounding)

    def _judge(self) -> None:
        """Tell what the comparisons have found that were not judged yet."""
        awaited, self._awaited = self._awaited, []
        for found in awaited:
            gap, factor, tolerance, *counts, loss = found.tolist()
            num_passes, num_samples, num_left_out, size = map(int, counts)
            if not gap < math.inf or tolerance > _COARSE:
                continue  # a loss that is not finite, or gradients lost in rounding
            if gap > tolerance:
                self._tell_other(num_left_out, size)
            elif not math.isnan(factor):
                self._multiples.saw(
                    factor,
                    size=num_samples,
                    num_passes=num_passes,
                    loss=loss,
                    tolerance=tolerance,
                )

    def _expected(
        self, glance: Glance, targets: Any
    ) -> tuple[Tensor, dict[int, Tensor]] | None:
        """Return the criterion, and its gradients of the outputs by their position.

        Args:
            glance: The outputs.
            targets: Their targets.

        Returns:
            None if the criterion does not take them.
        """
        leaves = floating(glance.outputs)
        for leaf in leaves.values():
            leaf.requires_grad_()
        is_mixed = glance.mixed_type is not None
        try:
            with (
                torch.enable_grad(),
                torch.autocast(glance.device, glance.mixed_type, enabled=is_mixed),
            ):
                losses = self._criterion(glance.outputs, targets)
                loss = losses.sum() if self._is_summed else losses.mean()
                found = torch.autograd.grad(
                    loss, list(leaves.values()), allow_unused=True
                )
        except MODEL_ERRORS:
            return None
        places = {place: g for place, g in enumerate(found) if g is not None}
        return loss.detach(), places


def _updates() -> Iterator[int]:
    """Yield the numbers of the updates that are compared."""
    yield from range(1, _ALL_OF_FIRST)
    draws, number = random.Random(0), _ALL_OF_FIRST  # no secret: it spreads them
    while True:
        yield number
        number += draws.randint(1, _LARGEST_GAP)


def _direction_and_factor(
    one: Tensor, other: Tensor, *, is_mixed: bool
) -> tuple[Tensor, Tensor]:
    """Return how far two sets of gradients are from multiples of each other.

    Args:
        one: Gradients, float32 ``(b, k)``.
        other: Those expected, ``(b, k)``.
        is_mixed: Whether mixed precision may have scaled them.

    Returns:
        The distance of their unit vectors, up to the sign; and the factor with its
        sign, NaN if it is not known.
    """
    length, wanted = one.norm(), other.norm()
    sign = torch.where((one * other).sum() < 0, -1.0, 1.0)
    units = one / length.clamp(min=_TINY) - sign * other / wanted.clamp(min=_TINY)
    factor = sign * length / wanted
    is_known = (length > 0) & (wanted > 0) & (not is_mixed)
    return units.norm(), torch.where(is_known, factor, torch.nan)
