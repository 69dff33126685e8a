"""A ``collate_fn`` for sweeps, whose batches have the order of the data set.

A sweep takes the examples in order, and the norm of sample i of a batch is stored for
example i. A ``collate_fn`` of the user may sort, shuffle or drop examples. So the items
of each batch are fingerprinted before it runs, as in training, and its samples are put
back in the order of the items.

*Guarantee.* If each sample matches one item, its norm is stored for this item.

*What breaks it.* Samples that match no item, because ``collate_fn`` changes them. They
are assumed to be in the order of the items, which the chain of custody says.

>>> import torch
>>> def reversed_rows(items):
...     return torch.stack(items[::-1])
>>> InItemOrder(reversed_rows)([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
tensor([[1., 2.],
        [3., 4.]])
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import default_collate

from opacus_pi.attribution import keeps_order
from opacus_pi.attribution.causes import ADDED_IN_COLLATE
from opacus_pi.attribution.collate_identity import FollowingCollate
from opacus_pi.custody import Chain
from opacus_pi.models.batches import rows_of

__all__ = ["InItemOrder"]

_ASSUMED = (
    "In sweeps over the data set it could not be checked whether collate_fn keeps the "
    "order of its items. Their order is assumed. Change examples in the data set "
    "instead of in collate_fn; their order can then be compared."
)
_NOT_EACH_ONCE = (
    "In a sweep over the data set, collate_fn returned a batch without some of its "
    "items, or with one of them several times. So norms are stored for the wrong "
    "examples. Use a collate_fn that returns each item once."
)


class InItemOrder:
    """A ``collate_fn`` whose samples are in the order of its items.

    Args:
        collate_fn: The loader's own; None: torch's.

    Attributes:
        chain: The chain of custody of the run; gets doubts as its links "identity" and
            "rows".
    """

    def __init__(self, collate_fn: Callable[[Any], Any] | None) -> None:
        self._collate_fn = collate_fn or default_collate
        self._follow: FollowingCollate | None = None
        if not keeps_order(collate_fn):
            self._follow = FollowingCollate(self._collate_fn, is_single=False)
        self.chain: Chain | None = None

    def __call__(self, items: list[Any]) -> Any:
        """Collate items, and put the samples in their order."""
        if self._follow is None:
            return self._collate_fn(items)
        batch, identity = self._follow(items)
        order = identity.items
        if identity.notes and self.chain is not None:
            self.chain.leave_unchecked("identity", _ASSUMED)
        if identity.has_more and self.chain is not None:
            added = ADDED_IN_COLLATE
            self.chain.leave_unchecked(added.link, added.explanation, warn=False)
        if order is None:
            return batch
        if sorted(order.tolist()) != list(range(len(items))):
            if self.chain is not None:
                self.chain.break_link(
                    "identity", _NOT_EACH_ONCE, rules_out_epsilon=False
                )
            return batch
        return rows_of(batch, np.argsort(order).tolist(), len(items))
