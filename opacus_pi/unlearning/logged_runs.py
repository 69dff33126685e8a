"""What a deletion log stores about a run: its settings, and a bound only.

In a log only the requests name examples. What only the owner may know stays in the
record of the run, because a log is shown to others.
"""

import math
from collections.abc import Mapping
from typing import Any

from opacus_pi.accounting.guarantee import Guarantee
from opacus_pi.unlearning.unlearner import UnlearningResult

_LISTS_OF_EXAMPLES = {
    "forget_indices": "num_forget",
    "forgotten_before": "num_forgotten_before",
    "forgotten_exactly": "num_forgotten_exactly",
}
# Of a record, for the owner alone: with the seed of a run, and the data that it used,
# its noise and its updates can be computed again; and whoever has all examples but one
# can guess that one, and try it by the fingerprint of the training set.
_OWNER_ONLY = ("seed", "data_set")


def run_facts(result: UnlearningResult) -> dict[str, Any]:
    """Return what the log stores about a run."""
    return {
        "run": to_be_logged(result.record),
        "guarantee": result.guarantee.kind,
        **_bound(result.guarantee),
    }


def to_be_logged(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what may be shown of a run's record, with numbers in place of examples.

    In a log only the requests name examples: when they are redacted, nothing is left.
    The rest stays in the owner's record, because a log is shown to others.

    Args:
        record: Of ``UnlearningResult``.
    """
    left_out = {*_LISTS_OF_EXAMPLES, *_OWNER_ONLY}
    kept = {name: v for name, v in record.items() if name not in left_out}
    counts = {
        counted: len(record[name])
        for name, counted in _LISTS_OF_EXAMPLES.items()
        if isinstance(record.get(name), list)
    }
    return {**kept, **counts}


def _bound(guarantee: Guarantee) -> dict[str, float]:
    """Return ε and δ of a guarantee, for the log; nothing unless it is a bound.

    An estimate depends on the forgotten examples, and a log is shown to others.

    Args:
        guarantee: What may be claimed after a run.
    """
    if not guarantee.kind.startswith("certified"):
        return {}
    delta = guarantee.own_delta
    found = {
        "epsilon": guarantee.epsilon(delta),
        "reverse_epsilon": guarantee.reverse_epsilon(delta),
    }
    known = {name: value for name, value in found.items() if math.isfinite(value)}
    return {**known, "delta": delta} if known else {}
