"""Check that the examples' gradients include everything that a backward pass produced.

Where a parameter's gradients are formed by running the model again, only the part of
the loss that was computed from the model's outputs is known. A loss may have another
part, such as a penalty on the weights, that no example's gradient contains and clipping
would drop silently.

The idea: the parameter was not frozen, so autograd has accumulated a sum. It must equal
the *remainder*: the sum over examples of their whole gradients, minus the parts that
taps intercepted. The guarantee: a difference above rounding raises an error. Where the
terms of a parameter's gradient cancel, such as those of a bias before a softmax, only
rounding is left of them, so the rounding is also measured by the examples' whole
gradients. What breaks it: a part of the loss smaller than the rounding.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opacus_pi.models.accelerators import kinds_in_use

BEYOND_THE_OUTPUTS = (
    "Running the model again for each example does not give the gradients that "
    "autograd computed for {}. Either the loss depends on them in other ways than "
    "through the model's outputs, or the model is random, or it treats an example "
    "alone in another way than in its batch, as a model does that splits the batch. "
    "Return from forward() every tensor that the loss uses, also those that the model "
    "stores as attributes. Replace a penalty on weights by the optimizer's "
    "weight_decay. Let the model treat each example in the same way, whatever its "
    "position in the batch."
)


@dataclass(frozen=True)
class Remainder:
    """The sum that autograd must have for a parameter, if nothing is missing.

    Args:
        total: The sum of the examples' gradients, minus the parts that taps
            intercepted.
        tolerance: The distance that rounding may cause.
    """

    total: Tensor
    tolerance: Tensor


def expected_remainder(
    formed: Tensor, intercepted: Iterable[Tensor], rounding: float, whole: Tensor
) -> Remainder:
    """Return the sum that autograd must have for one parameter and one batch.

    Args:
        formed: Each example's whole gradient, ``(b, *shape)``.
        intercepted: Sums over examples of parts of it, in the parameter's order.
        rounding: The value of ``autocast_rounding()`` when the model was called.
        whole: The sum over examples of the norms of their gradients by all trained
            parameters, a scalar.
    """
    rows = formed.flatten(1) if formed.dim() > 1 else formed[:, None]
    total = formed.sum(0)
    for part in intercepted:
        total = total - part.view_as(total)
    of_own, of_whole = (1e-3, 1e-5) if formed.device.type == "cpu" else (1e-2, 1e-2)
    least = 16 * max(rounding, torch.finfo(formed.dtype).eps)
    own = rows.norm(dim=1).sum()
    tolerance = max(of_own, least) * own + max(of_whole, least) * whole.to(own)
    return Remainder(total, tolerance)


def autocast_rounding() -> float:
    """Return the largest relative rounding that autocast now causes, 0 without it."""
    kinds = [
        torch.get_autocast_dtype(device)
        for device in kinds_in_use()
        if torch.is_autocast_enabled(device)
    ]
    return max((torch.finfo(kind).eps for kind in kinds), default=0.0)


def require_complete(
    names: Mapping[nn.Parameter, str],
    batches: Collection[Mapping[nn.Parameter, Remainder]],
    accumulated: Mapping[nn.Parameter, Tensor],
) -> None:
    """Raise if autograd's sums differ from those that the examples' gradients predict.

    Args:
        names: The parameters to compare, with their names.
        batches: The remainders of each batch: the sums that are predicted.
        accumulated: The sums that autograd has.

    Raises:
        ValueError: If they differ by more than rounding, with the parameters' names.
    """
    differing = [
        name
        for parameter, name in names.items()
        if _differ(
            parameter, [b[parameter] for b in batches if parameter in b], accumulated
        )
    ]
    if differing:
        raise ValueError(BEYOND_THE_OUTPUTS.format(", ".join(sorted(differing))))


def _differ(
    parameter: nn.Parameter,
    parts: list[Remainder],
    accumulated: Mapping[nn.Parameter, Tensor],
) -> bool:
    """Return whether a parameter's sums differ by more than rounding."""
    rest = accumulated.get(parameter, torch.zeros_like(parameter))
    rest = rest - sum(part.total for part in parts)
    return bool(rest.norm() > sum(part.tolerance for part in parts))
