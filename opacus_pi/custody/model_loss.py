"""Find out whether a loss that the model returns is the mean of the examples' own.

Models of Hugging Face, and many others, are given the targets and return the loss of
the batch. The library then knows neither a criterion nor the examples' own losses, but
it can run the model on parts of the batch. If each example has a loss of its own, the
loss of a batch is the weighted mean of the losses of its halves. A loss that divides by
the number of tokens of the whole batch is not, and the gradient of an example then
depends on the lengths of the others.

A copy of the model in evaluation mode, which shares its weights, runs on the batch and
on its halves, in some of the updates (:mod:`~opacus_pi.custody.looks`). The
examples are ordered by their numbers of labels before they are halved, so that the
halves have the same number only if all examples have it. Only losses through which a
backward pass has run are looked at.

**Guarantee.** The model, its gradients and random states stay as they are.

**What breaks it.** A loss that differs from the mean by less than rounding, for example
because all tokens have the same loss; a loss that couples examples in training mode
only; and what the loop adds to the loss or multiplies it by, which is not seen.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi.custody.chain import Chain
from opacus_pi.custody.looks import Looks, few_updates
from opacus_pi.custody.probed_call import num_examples
from opacus_pi.gradients.fallback import MODEL_ERRORS
from opacus_pi.models.batches import NUM_ITEMS, floating, rows_of, tensors_of
from opacus_pi.models.copies import evaluation_copy
from opacus_pi.models.forward_call import ForwardCall
from opacus_pi.models.no_trace import random_state_untouched
from opacus_pi.models.precision import Precision

__all__ = ["ModelLossProbe"]

_TOLERANCE = 5e-5  # relative, in float32
_ROUGH = 2e-2  # in half precision
_REMEDY = (
    "Compute the loss from the logits: the mean over each example's own labels, then "
    "the mean over the examples. TokenLoss of opacus_pi.integration.hugging_face does "
    "this, in your loop or as Trainer(compute_loss_func=...): TokenLoss(shift=True) "
    "for a causal language model, TokenLoss() for other labels of tokens."
)
_NOT_THE_MEAN = (
    "The model returned a loss of {got:.6g} for a batch of {size} examples, but the "
    "{how} of the losses of its halves is {expected:.6g}. So the loss divides by "
    "a quantity of the whole batch, as language models do that divide by the number of "
    "tokens that are not padding. Then no example has a loss of its own, and "
    "max_grad_norm does not bound what it contributes. " + _REMEDY
)
_ITEMS_VARY = (
    "The training loop passes num_items_in_batch to the model, which divides the loss "
    "by it. This multiplied the loss of an example by {now:.6g} in a batch, and by "
    "{before:.6g} in another. So the gradient of an example depends on the others of "
    "its batch. " + _REMEDY
)
_SEEN = (
    "The model returns its loss itself. In {count} update(s), the losses of the two "
    "halves of the batch gave the loss of the batch. Whether the training loop changes "
    "it before backward() was not seen. Call engine.audit(criterion) before training "
    "to have it checked."
)
_NOT_SEEN = (
    "The model returns its loss itself, and running it on a part of the batch failed: "
    "{error}. Call engine.audit(criterion), which compares gradients instead."
)


@dataclass
class _Kept:
    """A forward pass that returned a loss.

    Args:
        call: The pass.
        size: Its number of examples.
        place: Which of the floating outputs is the loss.
        was_used: Whether a backward pass has run through the loss.
    """

    call: ForwardCall
    size: int
    place: int
    was_used: bool = False

    def use(self, _: Tensor) -> None:
        """Record that a backward pass has reached the loss: a hook of the tensor."""
        self.was_used = True


class ModelLossProbe:
    """A probe of the losses that a model returns in training.

    ``saw`` is called at every forward pass in training mode, ``run`` before the weights
    are updated.

    Args:
        model: A weak reference to the user's module, unwrapped.
        chain: The chain of custody of the run; gets the result as its link "loss".
        takes_sum: Whether the run was prepared with ``loss_reduction="sum"``.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module | None],
        chain: Chain,
        *,
        takes_sum: bool = False,
    ) -> None:
        self._model, self._chain, self._takes_sum = model, chain, takes_sum
        self._looks = Looks(few_updates(random.Random(0)))
        self._num_seen = 0
        self._factor: float | None = None
        self._kept: _Kept | None = None

    def saw(self, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        """Keep a pass that returned a loss, if this update is to be looked at.

        Args:
            args: The model's positional inputs.
            kwargs: Its inputs by keyword.
            outputs: Its outputs.
        """
        if not self._looks.is_due or self._kept is not None:
            return
        model = self._model()
        if model is None or (isinstance(outputs, Tensor) and outputs.dim()):
            return  # nearly always: the loop computes the loss
        losses = [
            (place, leaf)
            for place, leaf in floating(outputs).items()
            if leaf.dim() == 0 and leaf.requires_grad
        ]
        size = num_examples(tensors_of((args, kwargs)), 0) if losses else 0
        if size < 2:
            return
        place, loss = losses[0]
        self._kept = _Kept(ForwardCall.now(model, args, kwargs), size, place)
        loss.register_hook(self._kept.use)

    def run(self) -> None:
        """Compare the loss of the pass that was kept with those of its halves."""
        kept, self._kept = self._kept, None
        was_used = kept is not None and kept.was_used
        self._looks.count(is_done=was_used)
        model = self._model() if was_used else None
        if kept is None or model is None:
            return
        try:
            reason = self._compare(evaluation_copy(model), kept)
        except MODEL_ERRORS as error:
            lines = str(error).splitlines() or [""]
            what = f"{type(error).__name__}: {lines[0]}".rstrip(":. ")
            self._chain.leave_unchecked("loss", _NOT_SEEN.format(error=what))
            self._looks.end()
            return
        if reason:
            self._chain.break_link("loss", reason)
            self._looks.end()
            return
        self._num_seen += 1
        self._chain.await_check("loss", _SEEN.format(count=self._num_seen))

    def _compare(self, model: nn.Module, kept: _Kept) -> str:
        """Return what is wrong with the loss; empty if nothing is.

        Args:
            model: A copy of the model in evaluation mode.
            kept: The pass.
        """
        batch = (kept.call.args, dict(kept.call.kwargs))
        items = batch[1].get(NUM_ITEMS)
        takes_sum, found = self._takes_sum, None
        with Precision() as precision:
            if items is not None and not takes_sum:
                found = self._without_items(model, kept, batch)
            if found is None:  # as the loop called the model
                takes_sum = takes_sum or items is not None
                found = _losses(model, kept, batch)
                factor = None if items is None else kept.size / float(items)
            else:
                factor = _loss(model, kept, batch) / found[0]
        tolerance = _ROUGH if precision.is_half else _TOLERANCE
        reason = _reason(found, kept.size, tolerance, takes_sum=takes_sum)
        before, self._factor = self._factor, factor
        if reason or factor is None or before is None:
            return reason
        if abs(factor - before) <= tolerance * abs(factor):
            return ""
        return _ITEMS_VARY.format(now=factor, before=before)

    def _without_items(
        self, model: nn.Module, kept: _Kept, batch: tuple[Any, Any]
    ) -> tuple[float, list[float]] | None:
        """Return the losses where the model counts its items itself; None if it fails.

        Args:
            model: A copy of the model in evaluation mode.
            kept: The pass.
            batch: Its positional inputs and inputs by keyword.
        """
        try:
            return _losses(model, kept, (batch[0], {**batch[1], NUM_ITEMS: None}))
        except MODEL_ERRORS:
            return None


def _losses(
    model: nn.Module, kept: _Kept, batch: tuple[Any, Any]
) -> tuple[float, list[float]]:
    """Return the loss of a batch, and those of its halves.

    Args:
        model: A copy of the model in evaluation mode.
        kept: The pass.
        batch: Positional inputs and inputs by keyword.
    """
    order, middle = _by_number_of_labels(batch, kept.size), kept.size // 2
    halves = [
        _loss(model, kept, rows_of(batch, part, kept.size, elsewhere=False))
        for part in (order[:middle].tolist(), order[middle:].tolist())
    ]
    return _loss(model, kept, batch), halves


def _reason(
    losses: tuple[float, list[float]], size: int, tolerance: float, *, takes_sum: bool
) -> str:
    """Return what is wrong with the loss of a batch; empty if nothing is.

    Args:
        losses: The loss of the batch, and those of its halves.
        size: The number of examples.
        tolerance: The relative difference that rounding may explain.
        takes_sum: Whether losses of halves are added, and not averaged.
    """
    whole, halves = losses
    sizes = size // 2, size - size // 2
    weights = (1.0, 1.0) if takes_sum else [part / size for part in sizes]
    expected = sum(w * half for w, half in zip(weights, halves, strict=True))
    scale = max(abs(whole), *map(abs, halves))
    if not math.isfinite(whole) or abs(whole - expected) <= tolerance * scale:
        return ""
    how = "sum" if takes_sum else "mean"
    return _NOT_THE_MEAN.format(got=whole, size=size, how=how, expected=expected)


def _loss(model: nn.Module, kept: _Kept, batch: tuple[Any, Any]) -> float:
    """Return the loss of a batch.

    Args:
        model: The copy.
        kept: The pass, in whose precision the copy runs.
        batch: Positional inputs and inputs by keyword.
    """
    with torch.no_grad(), random_state_untouched(), kept.call.surroundings():
        outputs = model(*batch[0], **batch[1])
    return float(floating(outputs)[kept.place])


def _by_number_of_labels(batch: Any, size: int) -> Tensor:
    """Return the order of the examples by their numbers of labels, ``(size,)``.

    Labels that are ignored are negative in every loss of transformers, and in torch.

    Args:
        batch: The inputs, among them the labels.
        size: The number of examples.
    """
    counts = torch.zeros(size, dtype=torch.int64)
    for tensor in tensors_of(batch):
        if tensor.dim() and len(tensor) == size and not tensor.is_floating_point():
            counts += (tensor.reshape(size, -1) >= 0).sum(1).cpu()
    return counts.argsort(stable=True)
