"""What reads each format, and what it may answer.

A target's ``read`` takes a path and returns what the file says; ``check`` holds an
answer against the invariants of its class; ``equal`` against the original.
"""

from tests.fuzz.mutations import damaged
from tests.fuzz.targets.checkpoints import checkpoint_targets
from tests.fuzz.targets.ledgers import ledger_targets
from tests.fuzz.targets.records import record_targets
from tests.fuzz.targets.target import Refused, Target
from tests.fuzz.targets.weights import weights_targets

__all__ = ["Refused", "Target", "any_damage", "targets"]


def targets():
    """All targets by name; made anew, because they hold the originals."""
    return {
        **ledger_targets(),
        **record_targets(),
        **weights_targets(),
        **checkpoint_targets(),
    }


def any_damage(target, chance, *, seal):
    """A file that is not the original any more."""
    if seal or chance.random() < 0.4:
        return target.edit(target.original, chance, seal=seal)
    return damaged(target.original, chance)
