"""A criterion as a function that gives each example's own loss, as it was trained.

An example's *own loss* is what the criterion returns for a batch of this example alone.
Training minimises the mean or the sum of the own losses of a batch, and only then does
a gradient belong to one example. :class:`OwnLosses` computes them for a whole batch at
once, and honours the criterion's ``reduction``:

* ``"mean"``: the mean over an example's entries that count (``ignore_index`` does not);
* ``"sum"`` and ``"batchmean"``: their sum;
* ``"none"``, and functions: the criterion must return one loss for each example.

**Guarantee.** Either the losses are those that were trained, or :class:`CoupledLoss` is
raised. Some criteria divide by a quantity of the whole batch (class weights, labels
that are ignored in some examples only), and others compare the examples with each
other. Then no example has a loss of its own.

**What breaks it.** A criterion that behaves otherwise on later batches: the comparison
with the trained loss is made on the first batch that has at least two examples.

>>> outputs, targets = torch.ones(2, 3), torch.zeros(2, 3)
>>> per_example_criterion(nn.MSELoss(reduction="sum"))(outputs, targets)
tensor([3., 3.])
>>> per_example_criterion(nn.MSELoss(reduction="mean"))(outputs, targets)
tensor([1., 1.])
"""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from opacus_pi.models.batches import map_tensors, num_examples
from opacus_pi.models.known_losses import LabelMean, are_classes, label_mean_of
from opacus_pi.models.no_trace import random_state_untouched

__all__ = [
    "CoupledLoss",
    "OwnLosses",
    "check_losses",
    "half_replaced",
    "per_example_criterion",
]

Criterion = Callable[[Any, Any], Tensor]

_REMEDY = (
    "Pass a function that returns one loss for each example, and train with the mean "
    "of these losses."
)
_OTHER_REDUCTION = (
    "On a batch of {size} examples, {name} returned {got:.6g}, but the {how} of the "
    "examples' own losses is {expected:.6g}. So the loss divides by a quantity of the "
    "whole batch, and no example has a loss of its own. " + _REMEDY
)
_COUPLED = (
    "Replacing some examples of a batch changed the losses that {name} returned for "
    "the others: it compares the examples of a batch, so no example has a loss of its "
    "own. " + _REMEDY
)
_SEVERAL = (
    "criterion(outputs, targets) returned {count} losses for each example, shape "
    "{shape}, and does not say whether training takes their mean or their sum. Pass a "
    'loss module with reduction="mean" or reduction="sum", or a function that returns '
    "one loss for each example."
)


_NOT_ALONE = (
    "For an example of a batch, {name} returned the loss {found:.6g}, but for this "
    "example alone {alone:.6g}. So the loss depends on the other examples, and no "
    "example has a loss of its own. " + _REMEDY
)


class CoupledLoss(ValueError):
    """The loss of a batch is not the mean or the sum of the examples' own losses."""


def per_example_criterion(criterion: Criterion) -> "OwnLosses":
    """Return ``criterion`` as a function that gives one loss per example.

    Args:
        criterion: ``criterion(outputs, targets)``, a loss module or a function. The
            caller's object stays as it is.

    Returns:
        A function ``(outputs, targets) -> losses`` with losses of shape ``(b,)``.
    """
    return OwnLosses(criterion)


class OwnLosses:
    """Each example's own loss under the reduction that training uses.

    Args:
        criterion: As for ``per_example_criterion``.
        averages_each_example: Whether training takes the mean over each example's own
            labels before the mean over the batch, as Opacus's ghost clipping does.
            Class weights and ignored labels then do not couple the examples.
    """

    def __init__(
        self, criterion: Criterion, *, averages_each_example: bool = False
    ) -> None:
        self._trained = self._each = criterion
        self._reduction = "none"
        if isinstance(criterion, nn.Module) and hasattr(criterion, "reduction"):
            self._trained = copy.deepcopy(criterion)
            self._each = copy.deepcopy(criterion)
            cast(Any, self._each).reduction = "none"
            self._reduction = str(cast(Any, criterion).reduction)
        self._averages_each_example = averages_each_example
        self._is_checked = False

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Return the losses ``(b,)``.

        Args:
            outputs: The model's outputs on b examples.
            targets: Their targets.

        Raises:
            CoupledLoss: If the examples have no losses of their own.
            ValueError: If the criterion does not give one loss per example.
        """
        self.check_targets(targets)
        losses = self._own(outputs, targets)
        if not self._is_checked and len(losses) > 1:
            self._check(outputs, targets)
            self._is_checked = True
        return losses

    def compare_alone(self, outputs: Any, targets: Any) -> None:
        """Compare the losses of a few examples with their losses without the batch.

        They are those with the largest and the smallest loss, the first and the last. A
        criterion that draws random numbers is not compared.

        Args:
            outputs: The model's outputs on b examples.
            targets: Their targets.

        Raises:
            CoupledLoss: If a loss differs.
        """
        size = num_examples(targets)
        with torch.no_grad(), random_state_untouched():
            losses = self._own(outputs, targets)
            torch.rand(())
            if not torch.equal(losses, self._own(outputs, targets)):
                return
            for place in {int(losses.argmax()), int(losses.argmin()), 0, size - 1}:
                alone = self._own(*_one_of((outputs, targets), size, place))
                found = losses[place : place + 1]
                if not _are_close(found, alone):
                    message = _NOT_ALONE.format(
                        name=self._name, found=float(found), alone=float(alone)
                    )
                    raise CoupledLoss(message)

    @property
    def is_checked(self) -> bool:
        """Return whether a batch has shown that the criterion does not mix examples."""
        return self._is_checked

    def check_targets(self, targets: Any) -> None:
        """Raise if the criterion divides by a number that depends on the whole batch.

        Args:
            targets: Targets of a batch.

        Raises:
            CoupledLoss: If they are classes, and the criterion takes the mean with
                class weights, or over different numbers of labels.
        """
        mean = None if self._averages_each_example else self._label_mean(targets)
        reason = "" if mean is None else mean.coupling(targets)
        if reason:
            raise CoupledLoss(reason)

    def _own(self, outputs: Any, targets: Any) -> Tensor:
        """Return the losses ``(b,)`` without looking for coupled examples."""
        values = self._each(outputs, targets)
        check_losses(values, num_examples(targets))
        mean = self._label_mean(targets)
        weight = None if mean is None or mean.weight is None else mean.common_weight
        if weight is not None and not self._averages_each_example:
            values = values / weight  # as the trained mean does
        if values.dim() == 1:
            return values
        entries = values.flatten(1)
        if self._reduction == "none":
            if entries.shape[1] != 1:
                shape = tuple(values.shape)
                raise ValueError(_SEVERAL.format(count=entries.shape[1], shape=shape))
            return entries.squeeze(1)
        if self._reduction != "mean":
            return entries.sum(1)
        if mean is not None:
            # Where no label counts, torch divides 0 by 0, but ghost clipping by 1.
            least = 1 if self._averages_each_example else 0
            return entries.sum(1) / mean.num_labels(targets).clamp(min=least)
        return entries.mean(1)

    def _check(self, outputs: Any, targets: Any) -> None:
        """Compare the losses with the trained loss, and with those in another batch.

        Args:
            outputs: The model's outputs on at least two examples.
            targets: Their targets.

        Raises:
            CoupledLoss: If an example's loss depends on the others.
        """
        size = num_examples(targets)
        with torch.no_grad(), random_state_untouched():
            losses = self._own(outputs, targets)
        for kept, by_one in itertools.product((0, 1), (False, True)):
            batch = (outputs, targets)
            others = half_replaced(batch, size, kept=kept, by_one=by_one)
            with torch.no_grad(), random_state_untouched():
                changed = self._own(*others)
            if not _are_close(losses[kept::2], changed[kept::2]):
                raise CoupledLoss(_COUPLED.format(name=self._name))
        if self._averages_each_example or self._reduction == "none":
            return
        with torch.no_grad(), random_state_untouched():
            trained = self._trained(outputs, targets)
        total, how = losses.sum(), "sum"
        if self._reduction != "sum":
            total, how = losses.mean(), "mean"
        if not _are_close(trained, total):
            message = _OTHER_REDUCTION.format(
                size=size,
                name=self._name,
                got=float(trained),
                how=how,
                expected=float(total),
            )
            raise CoupledLoss(message)

    def _label_mean(self, targets: Any) -> LabelMean | None:
        """Return what takes the mean over labels; None: the mean is over entries."""
        if self._reduction != "mean" or not are_classes(targets):
            return None
        return label_mean_of(self._trained)

    @property
    def _name(self) -> str:
        """The name of the criterion in messages."""
        name = getattr(self._trained, "__name__", type(self._trained).__name__)
        return "the criterion" if name == "<lambda>" else str(name)


def check_losses(losses: Any, batch_size: int) -> None:
    """Raise unless ``losses`` holds one loss per example.

    Args:
        losses: The tensor that a criterion returned; should be ``(b, ...)``.
        batch_size: Number of examples, ``b``.

    Raises:
        ValueError: If it is a scalar or its length is not ``batch_size``.
    """
    is_tensor = isinstance(losses, Tensor)
    if not (is_tensor and losses.dim() >= 1 and len(losses) == batch_size):
        shape = f"shape {tuple(losses.shape)}" if is_tensor else type(losses).__name__
        raise ValueError(
            "criterion(outputs, targets) must return one loss per example, shape "
            f"({batch_size},), got {shape}. Pass a criterion with "
            'reduction="none".'
        )


def half_replaced(
    batch: Any,
    size: int,
    *,
    kept: int,
    by_one: bool = False,
    order: Tensor | None = None,
) -> Any:
    """Return a batch in which every second example is replaced by another one.

    If the results of the examples that stay change, they depend on the replaced ones.
    Two calls, one for each half, replace every example once. So they also detect a
    dependence on few examples (the largest, the neighbour, those before), which
    replacing a single example could miss.

    Args:
        batch: Tensors in any nesting; those whose first dimension does not have
            ``size`` entries stay as they are.
        size: The number of examples, at least 2.
        kept: 0 to keep the examples 0, 2, 4, ...; 1 to keep 1, 3, 5, ...
        by_one: Whether all are replaced by the first example that is kept; otherwise
            each is replaced by its neighbour. Neighbours leave the ranks of the
            examples nearly as they were, which a loss of the hardest half depends on.
        order: Permutation ``(size,)``: the order in which examples are numbered.
            Default: their order in the batch.

    >>> half_replaced(torch.tensor([1, 2, 3, 4, 5]), 5, kept=0)
    tensor([1, 1, 3, 3, 5])
    >>> half_replaced(torch.tensor([1, 2, 3, 4, 5]), 5, kept=1)
    tensor([2, 2, 4, 4, 4])
    >>> half_replaced(torch.tensor([1, 2, 3, 4, 5]), 5, kept=1, by_one=True)
    tensor([2, 2, 2, 4, 2])
    >>> order = torch.tensor([4, 0, 1, 3, 2])
    >>> half_replaced(torch.tensor([1, 2, 3, 4, 5]), 5, kept=0, order=order)
    tensor([5, 2, 3, 2, 5])
    """
    places = torch.arange(size)
    last = size - 1 - (size - 1 - kept) % 2  # the last example that is kept
    sources = (places - places % 2 + kept).clamp(max=last)
    if by_one:
        sources = torch.where(places % 2 == kept, places, kept)
    if order is not None:
        sources = torch.empty_like(sources).scatter_(0, order, order[sources])

    def replaced(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or len(tensor) != size:
            return tensor
        return tensor.detach()[sources.to(tensor.device)]

    return map_tensors(replaced, batch)


def _one_of(batch: Any, size: int, place: int) -> Any:
    """Return a batch of one example.

    Args:
        batch: Tensors in any nesting; those whose first dimension does not have
            ``size`` entries stay as they are.
        size: The number of examples.
        place: The position of the one that stays.
    """

    def one(tensor: Tensor) -> Tensor:
        is_batch = tensor.dim() > 0 and len(tensor) == size
        return tensor.detach()[place : place + 1] if is_batch else tensor

    return map_tensors(one, batch)


def _are_close(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of losses are equal up to rounding at their scale."""
    scale = float(max(one.abs().max(), other.abs().max()))
    atol = (1e-9 if one.dtype is torch.float64 else 1e-4) * scale
    atol = atol if math.isfinite(atol) else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=atol, equal_nan=True)
