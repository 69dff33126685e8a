"""Batches that are collated again: an example among other items than in training.

An audit of a ``collate_fn`` (:mod:`~opacus_pi.integration.collate_audit`) asks whether
what it makes of an example depends on the others of its batch. So it collates each item
in other company: with copies of the smallest item, with copies of the largest, and
alone.

*Guarantee.* Random numbers start in the same state for each call, a copy of
``collate_fn`` is called on copies of the items, and all random states are restored.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from opacus_pi.attribution.collate_identity import FollowingCollate
from opacus_pi.attribution.delivery import sample_dim
from opacus_pi.attribution.item_fingerprints import fingerprint_items
from opacus_pi.attribution.samples import tensors_in
from opacus_pi.custody.function_copies import copy_of_function
from opacus_pi.integration.audited_run import Examples
from opacus_pi.models.batches import tensors_of
from opacus_pi.models.no_trace import random_state_untouched

__all__ = ["Collated", "Collation", "Company"]


@dataclass(frozen=True)
class Company:
    """The items with which one item is collated.

    Attributes:
        chosen: The items of the batch, by their numbers.
        place: Where the item is among them.
    """

    chosen: tuple[int, ...]
    place: int

    @property
    def is_alone(self) -> bool:
        """Whether the item is the only one."""
        return len(self.chosen) == 1


@dataclass(frozen=True)
class Collation:
    """A collated batch, and where its items are in it.

    Attributes:
        batch: What ``collate_fn`` returned.
        places: For each item its position, or -1; None: not known.
        size: The number of samples.
        num_left_out: How many items are in no sample.
        has_more: Whether the batch has entries that its items do not have.
    """

    batch: Any
    places: Sequence[int] | None
    size: int
    num_left_out: int = 0
    has_more: bool = False

    def place_of(self, item: int) -> int:
        """Return the position of an item; -1 if it is not known.

        Args:
            item: Its position among the items.
        """
        return item if self.places is None else self.places[item]

    def is_left_out(self, item: int) -> bool:
        """Return whether an item is known to be in no sample.

        Args:
            item: Its position among the items.
        """
        missing = [] if self.places is None else [i for i in self.places if i < 0]
        is_clear = len(missing) == self.num_left_out
        return is_clear and self.place_of(item) < 0

    def rows(self, place: int, batch_dim: int) -> list[Tensor] | None:
        """Return the row of each tensor that one sample has.

        Args:
            place: The position of the sample.
            batch_dim: The dimension that should run over the samples.

        Returns:
            None if the batch has anything besides such rows.
        """
        found = []
        for tensor in tensors_in(self.batch):
            dim = sample_dim(tensor, self.size, batch_dim)
            if dim is None:
                return None
            found.append(tensor.select(dim, place))
        is_pair = isinstance(self.batch, list | tuple) and all(
            isinstance(part, Tensor) for part in self.batch
        )
        return found if is_pair else None


class Collated:
    """Collates the items of a batch again, each in other company.

    Args:
        items: The items.
        examples: Has the ``collate_fn``.
        batch_dim: The dimension that runs over the samples.
    """

    def __init__(self, items: list[Any], examples: Examples, batch_dim: int) -> None:
        self.items = items
        self._function = examples.collate_fn or default_collate
        self._batch_dim = batch_dim
        self._fingerprints = fingerprint_items(items)
        self._by_width = np.argsort(
            self._fingerprints.widths.sum(axis=1), kind="stable"
        ).tolist()

    @property
    def has_one_shape(self) -> bool:
        """Whether all items are known to have the same shapes."""
        shapes = self._fingerprints.shapes
        widths = self._fingerprints.widths
        return bool((widths > 0).all()) and all(len(set(part)) == 1 for part in shapes)

    def among_its_own(self) -> Collation:
        """Return the batch of the items."""
        return self.with_company(Company(tuple(range(len(self.items))), 0))

    def companies(self, item: int, *, may_be_alone: bool) -> Iterator[Company]:
        """Yield the companies in which an item is collated.

        Args:
            item: Which item.
            may_be_alone: Whether a batch of it alone is one of them.
        """
        size, others = len(self.items), [i for i in self._by_width if i != item]
        for filling in (others[0], others[-1]):
            chosen = [filling] * size
            chosen[item] = item
            yield Company(tuple(chosen), item)
        if may_be_alone:
            yield Company((item,), 0)

    def is_random(self) -> bool:
        """Return whether two calls on the same items return different batches."""
        collate = copy_of_function(self._function)
        with random_state_untouched():
            one, other = (
                tensors_of(collate(copy.deepcopy(self.items))) for _ in range(2)
            )
        return len(one) != len(other) or not all(map(torch.equal, one, other))

    def has_moved(self, collation: Collation, item: int) -> bool:
        """Return whether the one sample that is not like the others is elsewhere.

        Args:
            collation: A batch in which an item is among copies of another one.
            item: The position of the item that was not replaced.
        """
        found = set()
        for tensor in tensors_in(collation.batch):
            dim = sample_dim(tensor, collation.size, self._batch_dim)
            if dim is not None and collation.size > 2:
                found |= _odd_row(tensor.movedim(dim, 0))
        return bool(found) and item not in found

    def with_company(self, company: Company) -> Collation:
        """Collate items, from the same state of all generators in each call.

        Args:
            company: Which items.
        """
        collate = FollowingCollate(
            copy_of_function(self._function),
            is_single=False,
            batch_dim=self._batch_dim,
        )
        chosen = company.chosen
        items = [copy.deepcopy(self.items[item]) for item in chosen]
        with random_state_untouched():
            batch, identity = collate(items)
        if identity.notes:
            return Collation(batch, None, len(chosen), has_more=True)
        order = list(range(len(chosen)))
        if identity.items is not None:
            order = identity.items.tolist()
        places = [order.index(i) if i in order else -1 for i in range(len(chosen))]
        return Collation(
            batch, places, len(order), identity.num_left_out, identity.has_more
        )


def _odd_row(rows: Tensor) -> set[int]:
    """Return the row that differs from all others, which are equal; else nothing.

    Args:
        rows: ``(b, ...)`` with b at least 3.
    """
    usual = (
        rows[0] if any(torch.equal(rows[0], other) for other in rows[1:]) else rows[1]
    )
    differs = [i for i, row in enumerate(rows) if not torch.equal(row, usual)]
    return set(differs) if len(differs) == 1 else set()
