"""Find weights that are used on rows of no example, of which there are as many.

A layer that is given a row for each position, not for each example, looks like one that
is given a batch as soon as there are as many positions as examples. With one example
less it does not.

>>> class Positions(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.table, self.head = nn.Embedding(3, 2), nn.Linear(2, 1)
...
...     def forward(self, x):
...         return self.head(x + self.table(torch.arange(3)))
>>> model = Positions()
>>> found = weights_of_shared_rows(model, ((torch.ones(3, 3, 2),), {}), 3)
>>> found == {model.table.weight}
True
"""

from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._torch_compat import pytree
from opacus_pi.gradients.bare import BareParameters, ExampleGradients
from opacus_pi.models.batches import map_tensors
from opacus_pi.models.no_trace import random_state_untouched


def weights_of_shared_rows(
    model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], size: int
) -> set[nn.Parameter]:
    """Run a model on one example less, and see which weights meet as many rows as ever.

    Args:
        model: A copy, whose state may change.
        call: Positional and keyword arguments for ``size`` examples.
        size: At least 2.

    Returns:
        Its parameters that do; none if the model cannot be run so.
    """
    witness = _Witness(size)
    handles = [
        module.register_forward_pre_hook(witness.sees, with_kwargs=True)
        for module in model.modules()
    ]
    args, kwargs = map_tensors(lambda t: t[:-1] if t.shape[:1] == (size,) else t, call)
    try:
        with random_state_untouched(), torch.no_grad(), BareParameters(witness):
            model(*args, **kwargs)
    except Exception:  # of any kind: a model for one number of examples
        return set()
    finally:
        for handle in handles:
            handle.remove()
    return witness.found


class _Witness:
    """Notes the parameters that are used on a number of rows.

    Args:
        num_rows: The number.
    """

    def __init__(self, num_rows: int) -> None:
        self.found: set[nn.Parameter] = set()
        self._num_rows = num_rows

    def sees(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A layer is called."""
        if any(self.wants(value) for value in pytree.tree_leaves((args, kwargs))):
            self.found.update(module.parameters(recurse=False))

    def is_live(self, parameter: Any) -> bool:
        """Whether this is a parameter."""
        return isinstance(parameter, nn.Parameter)

    def wants(self, value: Any) -> bool:
        """Whether this is a tensor of that many rows."""
        return isinstance(value, Tensor) and value.shape[:1] == (self._num_rows,)

    def tap_bare(
        self,
        output: Tensor,
        x: Tensor | None,
        parameter: nn.Parameter,
        gradient: ExampleGradients,
    ) -> Tensor:
        """A parameter is used outside of layers."""
        self.found.add(parameter)
        return output
