"""Notice that inputs which are assumed to be the latest batch are other examples.

A loop may train on batches of another loader over the same data, or on batches that it
kept from earlier. Such inputs are not recognised, because only the recent deliveries
are compared, and they may be as many as the latest batch. But the first content of each
index is known (``item_contents``). So samples that are assumed to be of the latest
batch are looked up among the contents of all other indices.

*Guarantee.* Inputs are reported only if a sample in them has the content that exactly
one other index had, if more samples have contents of others than chance explains, and
if half of the samples do, or eight different examples were found so far. So a loop that
changes samples, and now and then gets another example of a data set with few possible
contents, is not reported. What the loop evaluates between updates does not count
against the inputs of an update.

*What breaks it.* Examples that were not delivered yet, or are of another data set.
Inputs that the loop changed, such as kept batches that it augments. A data set that has
augmented its items, or has items of fewer than four entries. A data set that holds
mirror images of its own items is reported if the loop mirrors most samples.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, is_grad_enabled

from opacus_pi.attribution.delivery import ForwardPass
from opacus_pi.attribution.item_contents import SMALL, ItemContents, content_sums
from opacus_pi.attribution.samples import DelayedChecksums

__all__ = ["OtherBatches"]

_MOST_BY_ACCIDENT = 8  # different examples that were found


class OtherBatches:
    """The examples of other batches that were found in inputs that were assumed.

    Attributes:
        entered_update: Whether an update used such inputs. Inputs that are assumed are
            then not trusted any more.
    """

    def __init__(self) -> None:
        self.entered_update = False
        self._num_compared = self._num_found = 0
        self._found: set[int] = set()  # the contents of different examples

    def are_given(
        self,
        tensors: Sequence[Tensor],
        dim: int,
        forward: ForwardPass,
        contents: ItemContents,
    ) -> bool:
        """Return whether samples that are assumed to be of a batch are of others.

        Args:
            tensors: The model's inputs.
            dim: Their dimension that runs over the samples.
            forward: The pass, some or all of whose samples are assumed.
            contents: The first content of each index.
        """
        indices = forward.indices
        if self.entered_update or indices is None or not is_grad_enabled():
            return self.entered_update
        (rows,) = (indices >= 0).nonzero()
        if forward.is_assumed is not None:
            rows = rows[forward.is_assumed[rows]]
        given = [t for t in tensors if t.shape[dim] == len(indices) and len(rows)]
        for content in (DelayedChecksums(tensor, dim) for tensor in given):
            if content.width < SMALL:
                continue
            sums = content_sums(content.entries)[rows]
            are_known, are_unique = contents.of_others(indices[rows], sums)
            self._num_compared += len(rows)
            self._num_found += int(np.count_nonzero(are_known))
            num_clear = int(np.count_nonzero(are_unique))
            if not num_clear:
                continue
            self._found.update(sums[are_unique].tolist())
            is_much = 2 * num_clear >= len(rows)
            if (is_much or len(self._found) >= _MOST_BY_ACCIDENT) and (
                contents.is_beyond_chance(self._num_found, self._num_compared)
            ):
                return True
        return False
