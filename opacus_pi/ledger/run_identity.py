"""How a saved result says from which recorded training it comes.

Results of unlearning are files apart from the ledger, so a report could put the result
of one training beside the privacy losses of another. A result therefore stores the
identity of its ledgers: the hash of the last weights, and a hash of the norms.

*Guarantee.* Ledgers with the same norms, or of trainings that left the same weights,
count as one training; all others do not. *What breaks it:* a ledger that names no
weights, of which only some columns are used later, is taken for another one.

>>> from opacus_pi.accounting import GradNormLedger, NoisySGD
>>> mechanism = NoisySGD(100, sample_rate=0.1, noise_std=2.0, max_grad_norm=1.0)
>>> ledger = GradNormLedger(mechanism, steps=[100], grad_norms=[[0.1, 5.0, 0.4]])
>>> other = GradNormLedger(mechanism, steps=[100], grad_norms=[[0.1, 5.0, 0.5]])
>>> identity = RunIdentity.of(ledger)
>>> identity.is_of(ledger.with_noise_std(1.0)), identity.is_of(other)
(True, False)
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi.files.arrays_file import checksum
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger

__all__ = ["RunIdentity", "named_weights", "row_hash"]


@dataclass(frozen=True)
class RunIdentity:
    """What identifies a recorded training run, also under another assumed noise.

    Args:
        norms: ``"sha256:…"`` of steps, norms and positions of the examples.
        weights: ``"sha256:…"`` of the last weights; None if the ledger does not name
            them.
    """

    norms: str
    weights: str | None = None

    @classmethod
    def of(cls, ledger: GradNormLedger) -> "RunIdentity":
        """Return the identity of a ledger.

        Args:
            ledger: The ledger.
        """
        ids = ledger.example_ids
        arrays: dict[str, NDArray[Any]] = {
            "example_ids": np.arange(ledger.num_examples) if ids is None else ids,
            "grad_norms": ledger.grad_norms,
            "steps": ledger.steps,
        }
        described = (
            (name, array.dtype.str, array.shape, [array.tobytes()])
            for name, array in arrays.items()
        )
        return cls(f"sha256:{checksum(described, {})}", named_weights(ledger))

    def is_of(self, ledger: GradNormLedger) -> bool:
        """Return whether a ledger is of the same training.

        Args:
            ledger: The ledger.
        """
        weights = named_weights(ledger)
        if self.weights is not None and weights is not None:
            return self.weights == weights
        return self.norms == RunIdentity.of(ledger).norms


def named_weights(ledger: GradNormLedger) -> str | None:
    """Return the hash of the last weights of a run, or None if it is not known.

    Args:
        ledger: The ledger. One whose weights were changed later names none.
    """
    named = ledger.weights
    return named if named is not None and named.startswith("sha256:") else None


def row_hash(grad_norms: NDArray[np.float32]) -> str:
    """Return the hash of the norms of one row of a ledger.

    Args:
        grad_norms: float32 ``(n,)``, of all examples; NaN where none was measured.

    Returns:
        ``"sha256:…"``. Two runs differ in it unless they measured the same norms.
    """
    norms = np.asarray(grad_norms, dtype="<f4")
    same_nan = np.where(np.isnan(norms), np.float32(np.nan), norms)
    return f"sha256:{hashlib.sha256(same_nan.tobytes()).hexdigest()}"
