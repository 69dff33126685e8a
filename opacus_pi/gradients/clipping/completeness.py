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
    "The loss reaches {} by other ways than what the model returned, and this part of "
    "their gradients cannot be told apart by examples. Return from forward() every "
    "tensor that the loss uses, such as one that the model only keeps as an attribute; "
    "instead of a penalty on weights use the optimizer's weight_decay."
)


@dataclass(frozen=True)
class Owed:
    """The sum over examples that autograd has of a parameter, if nothing is missing.

    Args:
        total: The examples' gradients less what was heard of them, summed.
        length: Sum of the norms of the examples' gradients, which bounds rounding.
    """

    total: Tensor
    length: Tensor


def owed(formed: Tensor, heard: Iterable[Tensor]) -> Owed:
    """Of one parameter and batch.

    Args:
        formed: All of each example's gradient, ``(b, *shape)``.
        heard: Sums over examples of parts of it, in the parameter's order.
    """
    rows = formed.flatten(1) if formed.dim() > 1 else formed[:, None]
    total = formed.sum(0)
    for part in heard:
        total = total - part.view_as(total)
    return Owed(total, rows.norm(dim=1).sum())


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
    length = sum(part.length for part in parts)
    return bool(rest.norm() > _tolerance(parameter) * length)


def _tolerance(parameter: nn.Parameter) -> float:
    """Relative difference that rounding may cause, by what computes."""
    rounding = 8 * torch.finfo(parameter.dtype).eps
    return max(1e-3 if parameter.device.type == "cpu" else 1e-2, rounding)
