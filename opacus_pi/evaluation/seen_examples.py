"""How many examples of a test set are examples of the training set, by their content.

A test set must be unseen: accuracy on it, and membership inference against it, mean
nothing for copies of training examples. The inputs of some test examples are compared
with those of some training examples, whatever their order and labels.

In data with few possible inputs, equal ones occur by chance. So it is also counted how
many training examples equal *another* training example: only what exceeds that is
evidence that the test set was seen.

*What breaks it:* random transforms, which change an input whenever it is read, and
inputs that are neither arrays nor texts. Few copies in a large data set may be missed,
because of more than 4,096 training examples only evenly spaced ones are read.

>>> train = [([0.1 * i], 0) for i in range(50)]
>>> train = [(np.array(x), y) for x, y in train]
>>> seen_in_training(train, train[::-1][:30])
SeenExamples(num_compared=30, num_seen=30, share=1.0)
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from opacus_pi.ledger.stored_arrays import (
    as_array,
    evenly_spaced,
    hash_arrays,
    real_numbers,
    strided,
)
from opacus_pi.models.no_trace import random_state_untouched

__all__ = ["SeenExamples", "seen_in_training"]

_MOST_OF_TRAINING, _MOST_OF_TEST = 1 << 12, 1 << 10
_FEWEST = 3.0  # standard deviations above chance


@dataclass(frozen=True)
class SeenExamples:
    """What a comparison of a test set with the training set has found.

    Args:
        num_compared: Test examples whose content was compared.
        num_seen: Those that equal a training example that was read.
        share: Estimated share of the test set that was seen, without what is expected
            by chance; 0 if chance explains it.
    """

    num_compared: int
    num_seen: int
    share: float


def seen_in_training(train_set: Any, test_set: Any) -> SeenExamples:
    """Return how many test examples are training examples, by their content.

    Random states are as before afterwards.

    Args:
        train_set: A data set with positions.
        test_set: Another one.
    """
    with random_state_untouched():
        train = Counter(_contents(train_set, _MOST_OF_TRAINING))
        test = list(_contents(test_set, _MOST_OF_TEST))
    read = train.total()
    seen = sum(content in train for content in test)
    if not seen:
        return SeenExamples(len(test), 0, 0.0)
    repeated = sum(number for number in train.values() if number > 1)
    chance = len(test) * repeated / read
    if seen <= chance + _FEWEST * np.sqrt(chance):
        return SeenExamples(len(test), seen, 0.0)
    share = (seen - chance) / len(test) * len(train_set) / read
    return SeenExamples(len(test), seen, float(min(1.0, share)))


def _contents(data_set: Any, most: int) -> Iterator[str]:
    """Yield hashes of the inputs of evenly spaced examples, where they can be read."""
    for place in evenly_spaced(np.arange(len(data_set)), most).tolist():
        content = _content(data_set[place])
        if content is not None:
            yield content


def _content(item: Any) -> str | None:
    """Return a hash of the input of an item; None if it is no array and no text.

    Args:
        item: A tuple that begins with the input, a dict of inputs, or the input.
    """
    if isinstance(item, dict):
        found = [_content(value) for _, value in sorted(item.items(), key=str)]
        return "".join(filter(None, found)) or None
    if isinstance(item, tuple | list):
        item = item[0] if len(item) else None
    if isinstance(item, str):
        return hashlib.sha256(item.encode(errors="surrogatepass")).hexdigest()[:16]
    if isinstance(item, dict):
        return _content(item)
    array = as_array(real_numbers(item)) if _is_input(item) else None
    return None if array is None or not array.size else hash_arrays(array)


def _is_input(item: Any) -> bool:
    """Return whether an object is an array, a tensor or a picture."""
    return strided(item) or hasattr(item, "__array_interface__")
