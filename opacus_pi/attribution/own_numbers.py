"""Tell whether one number a sample was computed from this sample, or from no sample.

Beside a batch, models are given lengths, labels, flags or ids: one number a sample. It
cannot be looked up, because many samples have the same. If the loop computed it, it may
come from other examples of the batch, as the item of another user does, or the maximum
of a batch. So it is compared with what an honest loop would compute.

*Guarantee.* A number passes if it is a delivered number of its own sample, or the count
or the sum of entries of its own sample, plus a number that is the same for the whole
batch; or if all samples have the same number, which is that of the earlier batches or
the size of an input; or if it counts the samples.

*What breaks it.* Numbers of other examples that happen to be such numbers in every
batch.

>>> import torch
>>> tokens = torch.tensor([[5, 7, 0], [4, 0, 0], [6, 5, 8]])
>>> lengths = torch.tensor([2, 1, 3])
>>> own_numbers = list(_own_numbers(tokens.numpy()))
>>> any(_is_shifted(lengths.numpy(), own) for own in own_numbers)
True
>>> any(_is_shifted(lengths.flip(0).numpy(), own) for own in own_numbers)
False
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from opacus_pi.attribution.delivery import Delivery, Indices
from opacus_pi.attribution.model_inputs import Input
from opacus_pi.attribution.samples import DelayedChecksums

__all__ = ["are_own"]

Numbers = NDArray[np.float32]

_NUM_PADDINGS = 4  # values that are tried as padding of a tensor
# of counts that are equal for all samples, such as a length less 1
_LARGEST_SHIFT = 2.0
_EXACT = 2.0**24  # whole numbers up to here are exact in float32


def are_own(
    given: Input, positions: Indices, inputs: Sequence[Input], delivery: Delivery
) -> bool:
    """Return whether an input of one number a sample has numbers of its own samples.

    Args:
        given: The input.
        positions: Position in the delivery of each sample, int64 ``(b,)``.
        inputs: All inputs of the forward pass with b samples.
        delivery: The delivery that they come from.

    Returns:
        True also for an input of several numbers a sample, and of one sample.
    """
    if given.content.width != 1 or len(given) == 1:
        return True
    if given.is_alike and not given.changes:
        return True
    numbers = given.content.entries[:, 0]
    others = [other for other in inputs if other is not given]
    sizes = {float(size) for other in others for size in other.tensor.shape}
    if given.is_alike and float(numbers[0]) in sizes:
        return True
    steps = numbers[1] - numbers[0]
    counts_samples = np.array_equal(numbers, steps * np.arange(len(numbers)))
    if counts_samples and float(steps) in {1.0, *sizes}:
        return True
    if (positions < 0).any() or np.abs(numbers).max() > _EXACT:
        return False
    # Not those of one number: two of them may be computed alike, from other examples.
    contents = [other.content for other in others if other.content.width > 1]
    rows = [content.entries for content in contents if _is_whole(content)]
    rows += [c.entries[positions] for c in delivery.all_contents() if _is_whole(c)]
    return any(_is_shifted(numbers, own) for one in rows for own in _own_numbers(one))


def _is_whole(content: DelayedChecksums) -> bool:
    """Return whether all entries of the samples are known."""
    return content.width > 0 and content.entries.shape[1] == content.width


def _own_numbers(rows: Numbers) -> Iterator[Numbers]:
    """Yield numbers that loops compute of each sample, ``(b,)`` each.

    Args:
        rows: The entries of each sample, ``(b, k)``.
    """
    if rows.shape[1] == 1:
        yield rows[:, 0]
        return
    yield rows.sum(axis=1)
    for ends in (rows[:, -1], rows[:, 0]):  # padded at the right, or at the left
        values, counts = np.unique(ends, return_counts=True)
        for padding in {0.0, *values[np.argsort(-counts)[:_NUM_PADDINGS]].tolist()}:
            yield (rows != padding).sum(axis=1).astype(np.float32)


def _is_shifted(numbers: Numbers, own: Numbers) -> bool:
    """Return whether numbers are those of the samples, plus one number for all."""
    shifts = numbers - own
    if (shifts != shifts[0]).any():
        return False
    return bool((own != own[0]).any() or abs(shifts[0]) <= _LARGEST_SHIFT)
