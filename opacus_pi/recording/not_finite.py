"""Say why norms that are not finite have no ledger: one bad item, or a divergence.

The first update with such a norm decides. If other norms of that update are finite, the
weights were still finite, so the examples themselves are looked at. In later updates
every norm is NaN, which says nothing.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["why_not_finite"]

_NUM_NAMED = 5  # examples that the message lists


def why_not_finite(
    indices: NDArray[np.int64], norms: NDArray[np.float32], steps: NDArray[np.int64]
) -> str:
    """Return the reason of a refusal, with the examples if they are the cause.

    >>> print(why_not_finite(np.array([3, 8]), np.array([1.0, np.nan]), np.ones(2)))
    ... # doctest: +ELLIPSIS
    A gradient norm was not finite at or before update 1: that of example 8...

    Args:
        indices: The example of each norm, its position in the data set, ``(m,)``.
        norms: ``(m,)``, of which at least one is infinite or NaN.
        steps: The update of each norm, ``(m,)``.
    """
    odd = ~np.isfinite(norms)
    step = int(steps[odd].min())
    what = f"A gradient norm was not finite at or before update {step}: "
    examples = np.unique(indices[odd & (steps == step)])
    num_others = int(np.count_nonzero(~odd & (steps == step)))
    if not num_others:
        return (
            f"{what}the training has diverged, and the privacy loss is infinite. "
            "Lower the learning rate."
        )
    listed = ", ".join(map(str, examples[:_NUM_NAMED].tolist()))
    more = f" and {len(examples) - _NUM_NAMED} more" * (len(examples) > _NUM_NAMED)
    many = len(examples) > 1
    return (
        f"{what}{'those' if many else 'that'} of example{'s' * many} {listed}{more} of "
        f"the data set, while {num_others} other{'s' * (num_others > 1)} of the same "
        f"update {'were' if num_others > 1 else 'was'} finite. The privacy loss is "
        "infinite. Look at what the data set returns there: NaN or infinite values in "
        "the input or in the label make all weights NaN after one update. Correct or "
        "leave out such items, and train again. If they are ordinary, lower the "
        "learning rate."
    )
