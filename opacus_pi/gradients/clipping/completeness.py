"""Whether the examples' gradients are all that a backward pass has made.

Where a parameter's gradients are formed by running the model again, the part of the
loss that came by what the model returned is known, and no other. Autograd then has a
sum that the examples' gradients do not add up to.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BEYOND = (
    "Running the model again for each example does not give what autograd has of {}: "
    "the loss reaches them by other ways than what the model returned, or the model is "
    "random. Return from forward() every tensor that the loss uses, such as one that "
    "the model only keeps as an attribute; instead of a penalty on weights use the "
    "optimizer's weight_decay."
)


@dataclass(frozen=True)
class Owed:
    """The sum over examples that autograd has of a parameter, if nothing is missing.

    Args:
        total: The examples' gradients less what was heard of them, summed.
        slack: How far rounding may take it.
    """

    total: Tensor
    slack: Tensor


def owed(formed: Tensor, heard: Iterable[Tensor], rounding: float) -> Owed:
    """Of one parameter and batch.

    Args:
        formed: All of each example's gradient, ``(b, *shape)``.
        heard: Sums over examples of parts of it, in the parameter's order.
        rounding: What ``autocast_rounding`` was when the model was called.
    """
    rows = formed.flatten(1) if formed.dim() > 1 else formed[:, None]
    total = formed.sum(0)
    for part in heard:
        total = total - part.view_as(total)
    least = 1e-3 if formed.device.type == "cpu" else 1e-2
    tolerance = max(least, 16 * max(rounding, torch.finfo(formed.dtype).eps))
    return Owed(total, tolerance * rows.norm(dim=1).sum())


def autocast_rounding() -> float:
    """The largest relative rounding that autocast now causes, 0 if there is none."""
    kinds = [
        torch.get_autocast_dtype(device)
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]
    return max((torch.finfo(kind).eps for kind in kinds), default=0.0)


def require_complete(
    names: Mapping[nn.Parameter, str],
    batches: Collection[Mapping[nn.Parameter, Owed]],
    unheard: Mapping[nn.Parameter, Tensor],
) -> None:
    """Raise if autograd has something else than what it is owed.

    Args:
        names: The parameters to look at, and what they are called.
        batches: What each batch says that autograd is owed.
        unheard: What autograd has.

    Raises:
        ValueError: If so, with the parameters' names.
    """
    odd = [
        name
        for parameter, name in names.items()
        if _differ(
            parameter, [b[parameter] for b in batches if parameter in b], unheard
        )
    ]
    if odd:
        raise ValueError(BEYOND.format(", ".join(sorted(odd))))


def _differ(
    parameter: nn.Parameter, parts: list[Owed], unheard: Mapping[nn.Parameter, Tensor]
) -> bool:
    """Whether a parameter's sums differ by more than rounding."""
    rest = unheard.get(parameter, torch.zeros_like(parameter))
    rest = rest - sum(part.total for part in parts)
    return bool(rest.norm() > sum(part.slack for part in parts))
