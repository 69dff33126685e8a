"""Replicates of a statistic of many models, by leaving out groups of models in turn.

All examples of a study are attacked with the same models, so what is peculiar to these
models appears in every example and class. Attacks with a few models each would show how
much it matters, but they would be weaker attacks. The jackknife keeps the full attack:
with K groups, the statistic is computed K more times, each time without one group. The
*pseudo-values* K·full - (K - 1)·without are treated as K independent replicates: their
standard error is that of the full statistic. Source: Tukey 1958; Miller 1974.

>>> values = np.array([1.0, 2.0, 6.0])
>>> pseudo_values(values.mean(), [values[group_left(3, k, 3)].mean() for k in range(3)])
array([1., 2., 6.])
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def group_left(number: int, group: int, groups: int) -> NDArray[np.bool_]:
    """Return which models stay when one group of them is left out, ``(number,)``."""
    return np.arange(number) % groups != group


def pseudo_values(full: ArrayLike, without: ArrayLike) -> NDArray[np.float64]:
    """Return the pseudo-values of a statistic.

    Args:
        full: The statistic of all models, any shape.
        without: The statistic without each group, ``(groups, ...)``.
    """
    left = np.asarray(without, dtype=np.float64)
    groups = len(left)
    return groups * np.asarray(full, dtype=np.float64) - (groups - 1) * left
