"""Detect parameters applied to tensors whose rows do not index examples.

Rules assume that the first dimension of a layer's input counts the examples. A position
table is looked up for position numbers ``(t,)`` instead, which look like a batch as
soon as there are as many positions as examples. With one example fewer the batch
shrinks and the position numbers do not: so the model is run once on one example fewer,
and a layer or operation whose input still has the old number of rows is not indexed by
examples.

The guarantee: such a parameter is found if it is applied to such rows in this forward
pass. What breaks it: control flow that depends on values, and a model that cannot run
on fewer examples, for which nothing is found. The comparison of the first batch with
plain autograd then remains (:class:`~opacus_pi.gradients.norm_engine.NormEngine`).

>>> class Positions(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.table, self.head = nn.Embedding(3, 2), nn.Linear(2, 1)
...
...     def forward(self, x):
...         return self.head(x + self.table(torch.arange(3)))
>>> model = Positions()
>>> found = parameters_not_indexed_by_example(model, ((torch.ones(3, 3, 2),), {}), 3)
>>> found == {model.table.weight}
True
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._quiet import quiet
from opacus_pi._torch_compat import pytree
from opacus_pi.gradients.fallback import MODEL_ERRORS, raise_if_out_of_memory
from opacus_pi.gradients.parameters_outside_layers import ParametersOutsideLayers
from opacus_pi.gradients.taps import Call, TapRule
from opacus_pi.models.batches import map_tensors
from opacus_pi.models.no_trace import random_state_untouched


def parameters_not_indexed_by_example(
    model: nn.Module, call: Call, size: int
) -> set[nn.Parameter]:
    """Run a model on one example fewer; return parameters whose inputs do not shrink.

    Args:
        model: A copy, whose state may change.
        call: Positional and keyword arguments for ``size`` examples.
        size: Number of examples, at least 2.

    Returns:
        The model's parameters that are applied to tensors of ``size`` rows even so; the
        empty set if the model cannot be run on one example fewer.
    """
    observer = _RowObserver(size)
    handles = [
        module.register_forward_pre_hook(observer.before_layer, with_kwargs=True)
        for module in model.modules()
    ]
    args, kwargs = map_tensors(lambda t: t[:-1] if t.shape[:1] == (size,) else t, call)
    try:
        with (
            random_state_untouched(),
            quiet(),  # the user has not made this pass, and could not act on warnings
            torch.no_grad(),
            ParametersOutsideLayers(observer, model),
        ):
            model(*args, **kwargs)
    except MODEL_ERRORS as error:  # the model is made for one number of examples
        raise_if_out_of_memory(error)
        return set()
    finally:
        for handle in handles:
            handle.remove()
    return observer.found


class _RowObserver:
    """Taps that only note which parameters are applied to a given number of rows.

    Attributes:
        found: These parameters.
        shared_uses: Parameters used in a computation without a batch.

    Args:
        num_rows: The number of rows.
    """

    def __init__(self, num_rows: int) -> None:
        self.found: set[nn.Parameter] = set()
        self.shared_uses: set[nn.Parameter] = set()
        self._num_rows = num_rows

    def before_layer(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of every module."""
        if any(self.wants(value) for value in pytree.tree_leaves((args, kwargs))):
            self.found.update(module.parameters(recurse=False))

    def is_live(self, parameter: Any) -> bool:
        """Return whether this is a parameter."""
        return isinstance(parameter, nn.Parameter)

    def wants(self, value: Any) -> bool:
        """Return whether this is a tensor of that many rows."""
        return isinstance(value, Tensor) and value.shape[:1] == (self._num_rows,)

    def tap(
        self,
        output: Tensor,
        call: Call,
        parameters: Mapping[str, nn.Parameter],
        rule: TapRule,
    ) -> Tensor:
        """Note the parameters of an operation outside of layers."""
        self.miss(parameters)
        return output

    def miss(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note parameters."""
        self.found.update(parameters.values())
