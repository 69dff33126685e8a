"""Which criteria are known, and which of them divide by a number of labels.

A loss of torch treats all batches alike, so what was seen of it in a few batches holds
for the others. A criterion of the user may couple examples in some batches only.

Two losses of torch are an exception. With ``reduction="mean"``, ``CrossEntropyLoss``
and ``NLLLoss`` divide by the number of labels of the whole batch that are not
``ignore_index``, or by the sum of their class weights. So they couple the examples of
batches in which some labels are ignored, and of no others. :class:`LabelMean` tells
these batches from their labels.

>>> mean = label_mean_of(nn.CrossEntropyLoss())
>>> mean.coupling(torch.tensor([2, 0, 1]))
''
>>> mean.coupling(torch.tensor([2, -100, 1]))[:46]
'With ignore_index=-100, CrossEntropyLoss with '
"""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from opacus_pi._torch_compat import forward_hooks, forward_pre_hooks
from opacus_pi.models.token_loss import TokenLoss

__all__ = ["LabelMean", "are_classes", "is_known_loss", "label_mean_of"]

_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_FUNCTIONS_OF_CLASSES = (functional.cross_entropy, functional.nll_loss)
_OTHER_FUNCTIONS = {
    *("binary_cross_entropy", "binary_cross_entropy_with_logits"),
    *("cross_entropy", "kl_div"),
}
_DEPRECATED = {"size_average", "reduce"}  # in place of reduction
_WEIGHTED = (
    '{name} with weights and reduction="mean" divides by the sum of the weights of the '
    "whole batch, so no example has a loss of its own: its share depends on the labels "
    'of the others. Make it with reduction="none" and pass that criterion, or, if an '
    "example has several labels, pass a function that returns one weighted loss for "
    "each example; train with the mean of these losses. Or train with "
    'reduction="sum", and pass that.'
)
_IGNORED = (
    'With ignore_index={index}, {name} with reduction="mean" divides by the number of '
    "labels of the whole batch that are not ignored. The examples of this batch have "
    "different numbers of such labels, or no such label, so no example has a loss of "
    'its own. Train with reduction="sum" and pass that criterion, or pass a function '
    "that returns the mean over each example's own labels, and train with the mean of "
    "these losses."
)


@dataclass(frozen=True)
class LabelMean:
    """The mean over the labels of a batch that are not ignored.

    Args:
        name: The name of the criterion.
        ignore_index: The label that does not count.
        weight: The weights of the classes, ``(classes,)``; None: all are 1.
    """

    name: str
    ignore_index: int
    weight: Tensor | None = None

    @property
    def common_weight(self) -> float | None:
        """The weight that all classes have, which cancels in the mean; None: none."""
        if self.weight is None:
            return 1.0
        first = float(self.weight.flatten()[0])
        return first if bool((self.weight == first).all()) and first > 0 else None

    def num_labels(self, targets: Tensor) -> Tensor:
        """Count each example's labels that are not ignored, ``(b,)``.

        Args:
            targets: Classes, ``(b, ...)``.
        """
        counted: Tensor = targets != self.ignore_index
        return counted.reshape(len(targets), -1).sum(1)

    def couples(self, targets: Any) -> Tensor:
        """Return whether ignored labels couple the examples of a batch.

        Args:
            targets: The targets of the batch, in any form.

        Returns:
            A tensor of one bool, on the device of the targets.
        """
        if not are_classes(targets) or len(targets) < 2:
            return torch.tensor(False)
        num_labels = self.num_labels(targets)
        return ((num_labels != num_labels[0]) | (num_labels == 0)).any()

    def coupling(self, targets: Any) -> str:
        """Say why no example of a batch has a loss of its own; empty if each has one.

        Args:
            targets: The targets of the batch, in any form.
        """
        if self.common_weight is None and are_classes(targets):
            return _WEIGHTED.format(name=self.name)
        if self.couples(targets):
            return _IGNORED.format(name=self.name, index=self.ignore_index)
        return ""


def are_classes(targets: Any) -> bool:
    """Return whether targets are one tensor of classes, and no probabilities."""
    is_batch = isinstance(targets, Tensor) and targets.dim() > 0
    return is_batch and not targets.is_floating_point()


def label_mean_of(criterion: Any) -> LabelMean | None:
    """Return how a criterion reduces labels; None if it takes no mean over labels.

    Args:
        criterion: A loss module of torch or a class derived from one; or
            ``torch.nn.functional.cross_entropy`` or ``nll_loss``, alone or in a
            ``functools.partial``.
    """
    if isinstance(criterion, _OF_CLASSES):
        settings, name = criterion, type(criterion).__name__
        values = (settings.reduction, settings.ignore_index, settings.weight)
    else:
        function, given = _function_of(criterion)
        if function not in _FUNCTIONS_OF_CLASSES:
            return None
        name = function.__name__
        default = inspect.signature(function).parameters
        values = tuple(
            given.get(key, default[key].default)
            for key in ("reduction", "ignore_index", "weight")
        )
    reduction, index, weight = values
    return LabelMean(name, index, weight) if reduction == "mean" else None


def is_known_loss(criterion: Any) -> bool:
    """Return whether a criterion treats all batches alike, as far as labels count.

    Args:
        criterion: A module or a function.

    Returns:
        True for a loss of torch as torch made it: a module, or a function alone or in a
        ``functools.partial``; and for ``TokenLoss``.
    """
    if isinstance(criterion, nn.Module):
        kind = type(criterion)
        is_own = kind.__module__ == nn.CrossEntropyLoss.__module__ or kind is TokenLoss
        return (
            is_own
            and "forward" not in vars(criterion)
            and not forward_hooks(criterion)
            and not forward_pre_hooks(criterion)
        )
    function, given = _function_of(criterion)
    name = getattr(function, "__name__", "")
    return (
        (name in _OTHER_FUNCTIONS or name.endswith("_loss"))
        and getattr(functional, name, None) is function
        and getattr(function, "__module__", "") == functional.__name__
        and not _DEPRECATED & set(given)
    )


def _function_of(criterion: Any) -> tuple[Any, dict[str, Any]]:
    """Return the function of a ``partial`` with its keywords, or a function as it is.

    Args:
        criterion: One of them. A ``partial`` with positional arguments is returned as
            it is: it is not called with outputs and targets first.
    """
    if isinstance(criterion, partial) and not criterion.args:
        return criterion.func, criterion.keywords
    return criterion, {}
