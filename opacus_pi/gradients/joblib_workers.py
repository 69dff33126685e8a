"""Share a sweep among the workers of joblib: processes, or those of a cluster.

Inside ``joblib.parallel_config(backend=..., n_jobs=...)`` a data set is cut into one
run of whole batches for each worker, and the results are joined in the data set's
order. Every batch holds the same examples as without workers, so the numbers are the
same; if torch uses another number of threads in a worker, they may differ by rounding.

joblib is used only if the caller has entered such a context, for which it must have
been imported already. So nothing here imports it.

What breaks this: a data set or a ``collate_fn`` that keeps a state between its calls,
or draws random numbers. Each worker has a copy of its own.

>>> runs_of_batches(10, batch_size=3, num_runs=2)
[range(0, 6), range(6, 10)]
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")
S = TypeVar("S")

__all__ = ["num_joblib_workers", "run_in_workers", "runs_of_batches"]


def num_joblib_workers() -> int:
    """Return the number of workers of the active joblib context; 1 without one."""
    joblib = sys.modules.get("joblib")
    return 1 if joblib is None else int(joblib.effective_n_jobs(None))


def runs_of_batches(num_examples: int, batch_size: int, num_runs: int) -> list[range]:
    """Cut a data set into runs of whole batches, of almost equal length.

    Args:
        num_examples: Length of the data set.
        batch_size: Examples of a batch; the last batch may have fewer.
        num_runs: Number of runs at most.

    Returns:
        The positions of each run, in order; none is empty.
    """
    num_batches = -(-num_examples // batch_size)
    num_runs = min(num_runs, num_batches)
    cuts = [batch_size * (k * num_batches // num_runs) for k in range(num_runs)]
    return [range(*ends) for ends in pairwise([*cuts, num_examples])]


def run_in_workers(function: Callable[[T], S], tasks: Sequence[T]) -> list[S]:
    """Return the function's value for each task, computed by joblib's workers.

    Warnings of the workers are given in this process, each once.

    Args:
        function: Pickled, with everything that it refers to.
        tasks: Its arguments, pickled; one is sent to each worker.

    Raises:
        Exception: What the function raises in a worker, or joblib where it cannot
            pickle the function or a task.
    """
    joblib = sys.modules["joblib"]
    call = joblib.delayed(_with_warnings)
    done = joblib.Parallel(batch_size=1)(call(function, task) for task in tasks)
    found = {(str(w), type(w)): w for _, given in done for w in given}
    for warning in found.values():
        warnings.warn(warning, stacklevel=4)
    return [value for value, _ in done]


def _with_warnings(function: Callable[[T], S], task: T) -> tuple[S, list[Warning]]:
    """Return the function's value for a task, and the warnings that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = function(task)
    return value, [w.message for w in caught if isinstance(w.message, Warning)]
