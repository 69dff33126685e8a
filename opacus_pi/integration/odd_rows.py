"""Says which parameter has no gradient for each example, where Opacus just fails.

>>> model = nn.ModuleDict({"words": nn.Linear(2, 1), "position": nn.Linear(2, 1)})
>>> counts = {p: 1 if n.startswith("position") else 4 for n, p in named(model).items()}
>>> odd_rows(model, counts)
{'position.weight': 1, 'position.bias': 1}
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

from opacus_pi._class_swap import swap_class
from opacus_pi.integration.compatible import add_note
from opacus_pi.models.copies import unwrap

_ODD = (
    "Of each example one gradient is needed for every parameter. The batch has {size}, "
    "but there are {odd}. A layer that is given one row for the whole batch does that, "
    "such as the position embedding of a model that makes its position ids by itself. "
    "Give each example its own row (position_ids=torch.arange(length).expand(batch, "
    "-1)), or freeze these parameters (requires_grad_(False)). "
    'grad_sample_mode="fast" needs that too, unless torch.func.vmap can run the whole '
    "model: without dropout, without an attention mask, the loss made outside of it."
)
_SPREAD = (
    "Ghost clipping cannot read indices that are one row spread over the batch, such "
    "as the token types that a model makes by itself. Put them into each example "
    "(token_type_ids=torch.zeros_like(input_ids)), or freeze that embedding "
    "(requires_grad_(False))."
)
_VIEW = "view size is not compatible"


def explain_rows(
    error: RuntimeError, model: nn.Module, num_rows: Mapping[nn.Parameter, int]
) -> None:
    """Add to an error which parameters have too few or too many gradients.

    Args:
        error: What came of it, changed in place; of another cause it stays as it is.
        model: Whose parameters they are, plain or wrapped.
        num_rows: How many per-example gradients each has.
    """
    odd = odd_rows(model, num_rows)
    if odd:
        told = ", ".join(f"{number} for {name!r}" for name, number in odd.items())
        add_note(error, _ODD.format(size=_usual(num_rows), odd=told))


def odd_rows(model: nn.Module, num_rows: Mapping[nn.Parameter, int]) -> dict[str, int]:
    """Names and numbers of those parameters that differ from most.

    Args:
        model: Whose parameters they are, plain or wrapped.
        num_rows: How many per-example gradients each has.
    """
    usual = _usual(num_rows)
    return {
        name: num_rows[parameter]
        for name, parameter in named(model).items()
        if num_rows.get(parameter, usual) != usual
    }


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by the user's names."""
    return dict(unwrap(model).named_parameters())


def _usual(num_rows: Mapping[nn.Parameter, int]) -> int:
    """The number that most have; of several the largest."""
    counts = Counter(num_rows.values())
    return max(counts, key=lambda number: (counts[number], number))


def explain_ghost_losses(criterion: DPLossFastGradientClipping) -> None:
    """Have the errors of ghost clipping's backward passes say the same.

    Args:
        criterion: What Opacus made of the user's, changed in place.
    """
    swap_class(criterion, _giving_explained)


def _giving_explained(base: type) -> type:
    """A criterion whose losses explain their errors."""

    class GivingExplained(base):
        def __call__(self, *args: Any, **options: Any) -> Any:
            return swap_class(super().__call__(*args, **options), _explained)

    return GivingExplained


def _explained(base: type) -> type:
    """A loss that explains an error of its backward passes."""

    class Explained(base):
        def backward(self) -> None:
            try:
                super().backward()
            except RuntimeError as error:
                self._pi_explain(error)
                raise

        def _pi_explain(self, error: RuntimeError) -> None:
            """Add what is known of the error."""
            model = self.module._module
            norms = {p: getattr(p, "_norm_sample", None) for p in model.parameters()}
            known = {p: len(found) for p, found in norms.items() if found is not None}
            if _VIEW in str(error):
                add_note(error, _SPREAD)
            elif known:
                explain_rows(error, model, known)

    return Explained
