"""One loss per example, in float64, and the gradients of the losses by the outputs.

A user's criterion returns the mean over a batch, or one loss per example; here it is
always the latter (:mod:`~opacus_pi.models.own_losses`). Two steps keep the gradient
norms of well-fitted examples accurate:

* In float32, softmax minus one-hot cancels for an example that is fitted well, so that
  its norm would consist of rounding errors. The loss is therefore computed on float64
  outputs (:func:`float64_losses`).
* A vanishing gradient would underflow on its way through a float32 network. The
  gradient of the weights is proportional to the gradient by the outputs, so each
  example's output gradient is divided by its length before it enters the network, and
  the norm is multiplied by that length afterwards (:func:`unit_cotangents`).

Float64 logits over a large vocabulary would be the largest tensors of a sweep, so a
large batch of outputs is differentiated some examples at a time, once it is known that
the criterion does not mix examples. Where cross entropy has many labels for each
example, even one example is differentiated some labels at a time.

What breaks this: a criterion that mixes the examples of a batch. ``own_losses`` checks
this on the first batch, and raises an error.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._torch_compat import forward_hooks, forward_pre_hooks
from opacus_pi.models.batches import floating, map_tensors, to_float64
from opacus_pi.models.copies import made_by_opacus
from opacus_pi.models.own_losses import Criterion, OwnLosses

# Output entries that are differentiated at once; on the CPU they stay in its cache
_CPU_PART, _GPU_PART = 1 << 18, 1 << 26
_SAFE = 1e-100  # squares of lengths from it to 1/_SAFE do not underflow or overflow
_TINY = torch.finfo(torch.float64).tiny  # the least divisor: zeros stay zeros


def float64_losses(criterion: Criterion) -> "Losses":
    """Return ``(outputs, targets) -> losses [b]``, computed in float64.

    A criterion that cannot take float64 (it holds float32 tensors of its own) is
    called in the outputs' type instead, with a warning.

    Args:
        criterion: As for :func:`~opacus_pi.models.own_losses.per_example_criterion`;
            the wrapper that Opacus's ghost clipping puts around it is taken off.

    Returns:
        The function, as an object that also computes the gradient by the outputs where
        that has a closed form.
    """
    is_of_ghost_clipping = False
    while made_by_opacus(criterion) and hasattr(criterion, "criterion"):
        criterion, is_of_ghost_clipping = criterion.criterion, True
    return Losses(criterion, averages_each_example=is_of_ghost_clipping)


class Losses:
    """Per-example losses in float64, and their gradients where they have a formula.

    Args:
        criterion: As for ``per_example_criterion``.
        averages_each_example: As for ``OwnLosses``.
    """

    def __init__(
        self, criterion: Criterion, *, averages_each_example: bool = False
    ) -> None:
        self._has_closed_form = _is_plain_cross_entropy(criterion)
        self._reduction = str(getattr(criterion, "reduction", "none"))
        if isinstance(criterion, nn.Module):
            criterion = copy.deepcopy(criterion).double()
        self._evaluate = OwnLosses(
            criterion, averages_each_example=averages_each_example
        )

    @property
    def may_be_split(self) -> bool:
        """Return whether the losses of some examples may be computed without the rest.

        This holds for torch's cross entropy, and for any other criterion once a whole
        batch has shown that it does not mix examples.
        """
        return self._has_closed_form or self._evaluate.is_checked

    def check_targets(self, targets: Any) -> None:
        """Refuse targets as ``OwnLosses.check_targets`` does."""
        self._evaluate.check_targets(targets)

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Return the losses ``(b,)``."""
        try:
            return self._evaluate(to_float64(outputs), to_float64(targets))
        except RuntimeError:
            values = self._evaluate(outputs, targets)
        warnings.warn(
            "The criterion refused float64 outputs, so it was called with the outputs "
            "in the type that the model returns. In this type the gradient norms of "
            "well-fitted examples are inaccurate. Let the criterion compute in "
            "outputs.dtype.",
            stacklevel=2,
        )
        return values

    def closed_form(self, outputs: Any, targets: Any) -> Tensor | None:
        r"""Return the gradients with respect to the logits: softmax minus one-hot.

        The label's entry :math:`p_y - 1` is computed as minus the sum of the others,
        which does not cancel.

        The loss of an example with several labels is their sum, or their mean where
        training takes the mean.

        Returns:
            float64, in the shape of the outputs; ``None`` for other criteria, other
            kinds of targets, and labels out of range (such as ignored labels). ``None``
            also on an accelerator, where checking the labels would make the CPU wait.
        """
        if not self._is_known(outputs, targets):
            return None
        has_many_labels = outputs.dim() > 2
        logits: Tensor = outputs.detach()
        if has_many_labels:
            # The logits of a label are neighbours in memory then, if the model has
            # transposed them, as language models do.
            logits = logits.movedim(1, -1)
        gradients, labels = logits.double().softmax(-1), targets[..., None]
        try:
            gradients.scatter_(-1, labels, 0.0)
        except RuntimeError:  # a label out of range
            return None
        gradients.scatter_(-1, labels, -gradients.sum(-1, keepdim=True))
        if has_many_labels and self._reduction == "mean":
            gradients /= max(1, outputs[0, 0].numel())
        return gradients.movedim(-1, 1) if has_many_labels else gradients

    def _is_known(self, outputs: Any, targets: Any) -> bool:
        """Return whether the closed form holds, if the labels are in range."""
        return (
            self._has_closed_form
            and isinstance(outputs, Tensor)
            and isinstance(targets, Tensor)
            and outputs.dim() >= 2
            and targets.dtype is torch.int64
            and targets.shape == (*outputs.shape[:1], *outputs.shape[2:])
            and outputs.is_cpu
            and targets.is_cpu
            and (outputs.dim() == 2 or self._reduction != "none")
        )

    def of_each_label(
        self, outputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, float] | None:
        """Return the labels of one example as if each were an example of its own.

        Args:
            outputs: The logits of one example, ``(1, classes, ...)``.
            targets: Its labels, ``(1, ...)``.

        Returns:
            Logits ``(n, classes)``, labels ``(n,)``, and the factor of each label's
            loss in the loss of the example; ``None`` where the closed form does not
            hold.
        """
        if outputs.dim() < 3 or not self._is_known(outputs, targets):
            return None
        logits, labels = outputs[0].movedim(0, -1).flatten(0, -2), targets.flatten()
        if not bool(((labels >= 0) & (labels < logits.shape[1])).all()):
            return None
        is_mean = self._reduction == "mean"
        return logits, labels, 1 / max(1, len(labels)) if is_mean else 1.0


def _is_plain_cross_entropy(criterion: Criterion) -> bool:
    """Return whether a criterion is torch's, without weights, smoothing or hooks."""
    return (
        type(criterion) is nn.CrossEntropyLoss
        and criterion.weight is None
        and criterion.label_smoothing == 0.0
        and criterion.ignore_index < 0
        and not (forward_hooks(criterion) or forward_pre_hooks(criterion))
        and "forward" not in vars(criterion)
    )


def unit_cotangents(
    losses: Losses, outputs: Any, targets: Any
) -> tuple[dict[int, Tensor], Tensor]:
    r"""Differentiate each example's loss by its outputs, scaled to unit length.

    :math:`u_i = \nabla_{f} \ell_i / s_i` with :math:`s_i = \|\nabla_{f} \ell_i\|_2`.

    Args:
        losses: Per-example losses, from :func:`float64_losses`.
        outputs: The model's outputs, a tensor or a tree of tensors ``(b, ...)``.
        targets: Its targets, length ``b``.

    Returns:
        ``u`` for each tensor of ``floating(outputs)``, in the tensor's type, and the
        lengths ``s``, float64 ``(b,)``.
    """
    if not _is_worth_splitting(losses, outputs, targets):
        return _of_batch(losses, outputs, targets)
    losses.check_targets(targets)
    outputs = outputs.detach()
    units, scales = torch.empty_like(outputs), []
    step = max(1, _part(outputs) // outputs[0].numel())
    for start in range(0, len(outputs), step):
        rows = slice(start, start + step)
        units[rows], lengths = _of_part(losses, outputs[rows], targets[rows])
        scales.append(lengths)
    return {0: units}, torch.cat(scales)


def _of_part(losses: Losses, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit gradients and lengths of some examples, or of one large example.

    The gradient of an example consists of those of its labels by their own logits.
    """
    is_large = len(outputs) == 1 and outputs.numel() > _part(outputs)
    labels = losses.of_each_label(outputs, targets) if is_large else None
    if labels is None:
        found, lengths = _of_batch(losses, outputs, targets)
        return found[0], lengths
    logits, own, factor = labels
    found, lengths = unit_cotangents(losses, logits, own)
    length = _lengths(lengths[None])
    units = found[0].mul_(_divided(lengths[None], length).mT.to(logits.dtype))
    units = units.unflatten(0, outputs.shape[2:]).movedim(-1, 0)[None]
    return units, factor * length


def _part(outputs: Tensor) -> int:
    """Return how many entries of these outputs are differentiated at once."""
    return _CPU_PART if outputs.is_cpu else _GPU_PART


def _is_worth_splitting(losses: Losses, outputs: Any, targets: Any) -> bool:
    """Return whether a batch is one large tensor of outputs that may be split."""
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and outputs.is_floating_point()
        and outputs.dim() > 1
        and outputs.numel() > _part(outputs)
        and targets.shape[:1] == outputs.shape[:1]
        and losses.may_be_split
    )


def _of_batch(
    losses: Losses, outputs: Any, targets: Any
) -> tuple[dict[int, Tensor], Tensor]:
    """Compute the result of ``unit_cotangents`` for all examples together."""
    known = losses.closed_form(outputs, targets)
    if known is not None:
        lengths = _lengths(known)
        return {0: _divided(known, lengths).to(outputs.dtype)}, lengths
    outputs = map_tensors(_leaf, outputs)
    inputs = floating(outputs)
    with torch.enable_grad():
        values = losses(outputs, targets)
        if inputs and values.requires_grad:
            gradients = torch.autograd.grad(
                values,
                list(inputs.values()),
                torch.ones_like(values),
                allow_unused=True,
                materialize_grads=True,
            )
        else:
            gradients = tuple(torch.zeros_like(v) for v in inputs.values())
    units, scales = _normalised(gradients, len(values))
    return dict(zip(inputs, units, strict=True)), scales.to(values.device)


def _leaf(values: Tensor) -> Tensor:
    """Return a tensor detached from its graph, as a leaf that requires gradients."""
    values = values.detach()
    return values.requires_grad_() if values.is_floating_point() else values


def _normalised(
    gradients: Sequence[Tensor], batch_size: int
) -> tuple[list[Tensor], Tensor]:
    """Divide each example's gradients by their joint length.

    If an output does not have one row for each example, it cannot be scaled example by
    example; the lengths are then 1.
    """
    separate = all(g.dim() > 0 and len(g) == batch_size for g in gradients)
    if not gradients or not separate:
        return list(gradients), torch.ones(batch_size, dtype=torch.float64)
    flat = [g.double().reshape(batch_size, -1) for g in gradients]
    joint = flat[0] if len(flat) == 1 else torch.cat(flat, 1)
    scales = _lengths(joint)
    units = [
        _divided(f, scales).to(g.dtype).view_as(g)
        for f, g in zip(flat, gradients, strict=True)
    ]
    return units, scales


def _lengths(rows: Tensor) -> Tensor:
    """Return the Euclidean length of each row ``(...)`` of ``(b, ...)``.

    The squares of small entries do not underflow.
    """
    entries = tuple(range(1, rows.dim()))
    lengths: Tensor
    if rows.is_cpu:  # elsewhere the CPU would have to wait for the comparison
        lengths = torch.linalg.vector_norm(rows, dim=entries)
        if len(rows) == 0:
            return lengths
        least, greatest = lengths.aminmax()
        if float(least) > _SAFE and float(greatest) < 1 / _SAFE:
            return lengths
    largest = rows.abs().amax(entries, keepdim=True).clamp(min=_TINY)
    lengths = torch.linalg.vector_norm(rows / largest, dim=entries)
    return lengths * largest.flatten()


def _divided(rows: Tensor, lengths: Tensor) -> Tensor:
    """Divide rows by their lengths; rows of zeros stay zero."""
    return rows / lengths.clamp(min=_TINY).view(-1, *[1] * (rows.dim() - 1))
