"""Compare what a model computes for each example alone with what it does in the batch.

The probe of the model replaces examples by others of the batch, so it misses a
dependence on a quantity that stays then, such as the length of the longest example. An
audit calls the model on each example alone. Where the gradients disagree, the outputs
tell whether the model is the cause.

*Guarantee.* An output, alone, that differs from the one in the batch by more than the
tolerance, or has another shape, is found.

*What breaks it.* A model whose outputs change at every call: it is found by
``repeated_calls`` before. A model that mixes examples only in the gradients.

>>> import torch
>>> class Centred(nn.Module):
...     def forward(self, x):
...         return x - x.mean(0)
>>> x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
>>> compare_alone(nn.Identity(), x, x, 2, 0, 1e-6) is None
True
>>> compare_alone(Centred(), x, Centred()(x), 2, 0, 1e-6).state
'broken'
"""

from typing import Any

from torch import Tensor, nn

from opacus_pi.custody.finding import Finding
from opacus_pi.custody.probed_call import distance
from opacus_pi.models.batches import floating, forward, rows_of

__all__ = ["compare_alone"]

_MIXED = (
    "When the model is given an example alone, its outputs differ from those in the "
    "batch by {share:.1g} times the largest output. So they depend on the other "
    "examples, for example on the length of the longest one, or on the number of "
    "examples. Then no gradient belongs to one example, and max_grad_norm does not "
    "bound what an example contributes. Use layers, lengths and masks that treat each "
    "example alone."
)
_LONGER = (
    "When the model is given an example alone, its outputs have the shapes {alone}; "
    "in the batch they have {in_batch}. So the shape depends on the other examples. "
    "If the loss counts entries that the others add, such as padding, no gradient "
    "belongs to one example. Pad to a fixed length, or mask these entries in the loss."
)


def compare_alone(
    model: nn.Module, x: Any, outputs: Any, size: int, dim: int, tolerance: float
) -> Finding | None:
    """Compare the outputs for single examples with those in the batch.

    Args:
        model: A copy of the model, which gives the same outputs at every call.
        x: Inputs of the batch.
        outputs: What the model returned for them.
        size: The number of examples.
        dim: The dimension of the inputs along which the examples are.
        tolerance: What rounding may change, relative to the largest output.

    Returns:
        None if they do not differ; "unchecked" if they differ in their shapes only.
    """
    share, longer = 0.0, None
    for i in range(size):
        one, there = rows_of((x, outputs), [i], size, dim)
        alone, in_batch = _detached(forward(model, one)), _detached(there)
        if [t.dim() for t in alone] != [t.dim() for t in in_batch]:
            return None
        if _shapes(alone) != _shapes(in_batch):
            texts = {"alone": _shapes(alone), "in_batch": _shapes(in_batch)}
            longer = longer or Finding("unchecked", _LONGER.format(**texts))
        parts = [_common(*pair) for pair in zip(in_batch, alone, strict=True)]
        share = max(share, distance([a for a, _ in parts], [b for _, b in parts]))
    if share > tolerance:
        return Finding("broken", _MIXED.format(share=share))
    return longer


def _detached(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors among outputs."""
    return [tensor.detach() for tensor in floating(outputs).values()]


def _shapes(tensors: list[Tensor]) -> str:
    """Return the shapes of tensors as text."""
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


def _common(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first entries of two tensors, as many as both have.

    Args:
        one: A tensor.
        other: A tensor of as many dimensions.
    """
    place = tuple(slice(min(pair)) for pair in zip(one.shape, other.shape, strict=True))
    return one[place], other[place]
