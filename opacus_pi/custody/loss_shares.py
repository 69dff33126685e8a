"""Find out whether a cross entropy divides by a quantity of the whole batch.

A training loop computes its loss where the engine does not see it. But the gradients
that reach the logits show how much each example counts. A row of logits ``z`` whose
label is ``y`` has the gradient ``s (softmax(z) - onehot(y))``, where ``s`` is its share
in the loss. If all examples count equally, each has the share ``1 / b``. With class
weights and the mean of the weighted losses, the shares of a batch have another sum for
each composition of the batch. But torch's ``CrossEntropyLoss(weight=...)`` divides by
the sum of the weights of the batch, and a mean over all labels that are not ignored
divides by their number: then the shares differ, and have the same sum in every batch.
So an example's gradient depends on the labels of the others.

**Guarantee.** A loop is refused only if the shares of the examples differed, and in at
least three batches had equal sums up to rounding, while the largest share, as a
multiple of the mean, was not the same. Nothing of the training changes.

**What breaks it.** Losses other than cross entropies of one label a row, logits in half
precision or of more than 2²² entries (2¹⁸ on an accelerator, where they are kept until
the ledger is read, so that training does not wait), logits of a correct class that are
certain up to rounding, and runs of fewer than three updates are not judged. Nor are two
batches of the same composition.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opacus_pi.custody.chain import Chain
from opacus_pi.custody.looks import Looks, few_updates
from opacus_pi.models.batches import floating, logits_of
from opacus_pi.models.output_gradients import OutputGradients

__all__ = ["LossShares", "shares_of"]

_NUM_BATCHES = 3
_LARGEST = 2**22  # entries of the logits
_LARGEST_KEPT = 2**18  # entries of logits that are kept on an accelerator
_FITS = 1e-4  # of the gradients, which the form of a cross entropy leaves unexplained
_SAME = 2e-5  # relative difference of sums that rounding may cause
_OTHER = 1e-2  # relative difference of largest shares that is none of rounding
_CERTAIN = 1e-3  # distance of a row of probabilities from its label

_COUPLED = (
    "The training loop computed a cross entropy in which the examples of a batch count "
    "unequally, but their shares in the loss had the same sum in {num} batches. So the "
    "loss divides by a quantity of the whole batch: by the sum of the class weights, "
    'as CrossEntropyLoss(weight=...) does with reduction="mean", by the number of all '
    "labels, or by the number of examples that it selects. Then the gradient of an "
    "example depends on the others, and max_grad_norm does not bound what it "
    "contributes. Train with the mean of one loss for each example: use "
    'reduction="none" and .mean(), or, if an example has several labels, '
    "TokenLoss of opacus_pi.integration.hugging_face (with shift=True for a causal "
    "language model)."
)


@dataclass(frozen=True)
class _Kept:
    """The logits of a forward pass.

    Args:
        logits: A copy, ``(b, ...)``.
        gradients: The gradient that reaches them.
    """

    logits: Tensor
    gradients: OutputGradients


class LossShares:
    """A probe of the loss that a training loop computes from logits.

    ``saw`` is called at every forward pass in training mode, ``run`` before the weights
    are updated; it looks at the first pass of some updates.

    Args:
        chain: The chain of custody of the run; its link "loss" is broken if the loss
            divides by a quantity of the batch.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._looks = Looks(few_updates(random.Random(0)))
        self._kept: _Kept | None = None
        self._awaited: list[tuple[Tensor, Tensor]] = []  # logits and gradients
        self._sums: list[float] = []
        self._largest: list[float] = []
        chain.on_read(self._judge)

    def saw(self, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        """Keep the logits of a pass, if this update is to be looked at.

        Args:
            args: The model's positional inputs.
            kwargs: Its inputs by keyword.
            outputs: Its outputs.
        """
        if not self._looks.is_due or self._kept is not None:
            return
        leaves = list(floating(logits_of(outputs)).values())
        if len(leaves) != 1 or not _may_be_logits(leaves[0]):
            return
        copied = leaves[0].detach().clone()
        self._kept = _Kept(copied, OutputGradients(leaves[0]))

    def run(self) -> None:
        """Judge the shares of the pass that was kept; on an accelerator, later."""
        self._looks.count()
        kept, self._kept = self._kept, None
        gradient = None if kept is None else kept.gradients.tensors().get(0)
        if kept is not None and gradient is not None:
            self._awaited.append((kept.logits, gradient))
            if gradient.is_cpu:
                self._judge()

    def _judge(self) -> None:
        """Judge the shares of all passes that were kept, with those of earlier ones."""
        awaited, self._awaited = self._awaited, []
        for logits, gradient in awaited:
            if not self._chain.is_broken("loss"):
                self._add(shares_of(logits.cpu(), gradient.cpu()))

    def _add(self, shares: Tensor | None) -> None:
        """Compare the shares of the examples of a batch with those of earlier ones.

        Args:
            shares: float64 ``(b,)``; None: they are not known.
        """
        if shares is None or not float(shares.sum()) > 0:
            return
        self._sums.append(float(shares.sum()))
        self._largest.append(float(shares.max() / shares.mean()))
        if len(self._sums) >= _NUM_BATCHES and not _differ(self._sums, _SAME):
            if _differ(self._largest, _OTHER):
                text = _COUPLED.format(num=len(self._sums))
                self._chain.break_link("loss", text)


def shares_of(logits: Tensor, gradient: Tensor) -> Tensor | None:
    """Return the share of each example in a cross entropy.

    Args:
        logits: Logits or logarithms of probabilities of C classes, ``(b, C)``,
            ``(b, ..., C)`` or ``(b, C, ...)``.
        gradient: The gradient of the loss with respect to them.

    Returns:
        float64 ``(b,)``; None if the gradient is not that of a cross entropy with one
        label for each row.

    >>> z = torch.tensor([[1.0, 0.0], [0.5, 2.0]], requires_grad=True)
    >>> weights = torch.tensor([3.0, 1.0])
    >>> loss = torch.nn.functional.cross_entropy(z, torch.tensor([0, 1]), weights)
    >>> shares_of(z.detach(), *torch.autograd.grad(loss, z))
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    for dim in sorted({1, logits.dim() - 1}, reverse=True):
        z, g = (
            x.double().movedim(dim, -1).flatten(1, -2) if x.dim() > 2 else x.double()
            for x in (logits, gradient)
        )
        labels = torch.nn.functional.one_hot(g.argmin(-1), z.shape[-1])
        for direction in (z.softmax(-1) - labels, -labels.double()):
            squares = direction.square().sum(-1)
            rows = (g * direction).sum(-1) / squares.clamp(min=1e-300)
            rest = (g - rows[..., None] * direction).norm()
            is_known = bool((squares > _CERTAIN**2).all() and (rows >= 0).all())
            if is_known and bool(rest <= _FITS * g.norm()):
                return rows.reshape(len(z), -1).sum(1)
    return None


def _may_be_logits(output: Tensor) -> bool:
    """Return whether an output may be logits of at least two examples and classes."""
    return (
        output.dim() > 1
        and len(output) > 1
        and min(output.shape) > 0
        and output.requires_grad
        and output.dtype in (torch.float32, torch.float64)
        and output.numel() <= (_LARGEST if output.is_cpu else _LARGEST_KEPT)
    )


def _differ(values: list[float], tolerance: float) -> bool:
    """Return whether positive values differ by more than a share of the largest."""
    return max(values) - min(values) > tolerance * max(values)
