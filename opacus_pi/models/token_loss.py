"""The cross entropy of token labels, averaged over each example before the batch.

Models of Hugging Face divide the loss of a batch by the number of all its labels. An
example's gradient then depends on how long the others are, and clipping it bounds
nothing. Here each example has a loss of its own, the mean over its own labels, and the
loss of the batch is the mean of these.

>>> import torch
>>> logits = torch.zeros(2, 3, 5)
>>> labels = torch.tensor([[1, 2, 3], [4, -100, -100]])
>>> TokenLoss(reduction="none")(logits, labels)
tensor([1.6094, 1.6094])
"""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from opacus_pi._validate import expect
from opacus_pi.models.batches import logits_of

__all__ = ["TokenLoss", "warn_of_copied_labels"]

_CAUSAL = "CausalLM"  # in the names of what causal models of transformers return
_NOT_SHIFTED = (
    "{reason}, but TokenLoss() compares the logits at each position with the label at "
    "the same position, so the model learns to repeat its input. Use "
    "TokenLoss(shift=True): then they are compared with the label at the next one."
)
_IS_CAUSAL = "The model returned a {kind}, the outputs of a causal language model"
_SHIFTED = (
    " If your labels are those of the next position, pass TokenLoss(shift=False)."
)
_IS_COPIED = "The labels are the input_ids, as for a causal language model"


class TokenLoss(nn.Module):
    """The mean over examples of the mean cross entropy of an example's labels.

    It is a criterion for ``audit``, ``Unlearner`` and ``predict``, and can be passed as
    ``Trainer(compute_loss_func=...)``. An example without labels has the loss 0.

    Args:
        shift: Whether the logits at a position predict the label at the next one, as
            in causal language models. False for token classification and masked
            language models, where they predict the label at the same position. The
            default, None, is the same as False, with a warning if the outputs are those
            of a causal language model of transformers.
        ignore_index: The label of padding and of tokens that do not count.
        reduction: ``"mean"``, or ``"none"`` for one loss for each example.

    Raises:
        ValueError: If ``reduction`` is neither.
    """

    def __init__(
        self,
        *,
        shift: bool | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        expect(
            reduction in ("mean", "none"),
            "reduction",
            repr(reduction),
            'must be "mean" or "none"',
            'Use "mean" to train, and "none" for the losses of single examples.',
        )
        self.shift, self.ignore_index, self.reduction = shift, ignore_index, reduction

    def forward(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the loss of a batch.

        Args:
            outputs: Logits ``(b, tokens, classes)``, or a mapping with ``"logits"``.
            labels: Classes ``(b, tokens)``.
            num_items_in_batch: Passed by ``Trainer``: the number of labels of the
                batch, by which nothing may be divided. Not used.

        Returns:
            The mean loss, shape ``()``, or the losses ``(b,)`` with
            ``reduction="none"``.
        """
        if self.shift is None and _CAUSAL in type(outputs).__name__:
            reason = _IS_CAUSAL.format(kind=type(outputs).__name__)
            text = _NOT_SHIFTED.format(reason=reason) + _SHIFTED
            warnings.warn(text, stacklevel=2)
        logits = logits_of(outputs).float()
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2),
            labels,
            ignore_index=self.ignore_index,
            reduction="none",
        )
        num_labels = (labels != self.ignore_index).sum(1).clamp(min=1)
        own = losses.sum(1) / num_labels
        return own.mean() if self.reduction == "mean" else own


def warn_of_copied_labels(criterion: Any, inputs: Any, labels: Any) -> None:
    """Warn if a ``TokenLoss`` without a shift is given the inputs as labels.

    Args:
        criterion: Any criterion.
        inputs: Of a batch; a mapping with ``"input_ids"``, or anything.
        labels: Of the batch.
    """
    if not isinstance(criterion, TokenLoss) or criterion.shift:
        return
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not (isinstance(ids, Tensor) and isinstance(labels, Tensor)):
        return
    counts = labels != criterion.ignore_index
    if ids.shape == labels.shape and bool(counts.any()):
        if bool((ids == labels)[counts].all()):
            warnings.warn(_NOT_SHIFTED.format(reason=_IS_COPIED), stacklevel=2)
