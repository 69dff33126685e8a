"""Gram matrices of a group's gradients along a run, which group bounds need.

A Gram matrix holds the inner products of all pairs of gradients. For one example the
gradient norm is enough. For a group the bounds also depend on the angles between the
gradients, which the inner products determine. The matrices are computed after training,
from saved weights, for any forget set (``recording.gram_ledger``).

>>> from opacus_pi.ledger.mechanism import NoisySGD
>>> mechanism = NoisySGD(10, sample_rate=0.1, noise_std=2.0, max_grad_norm=1.0)
>>> ledger = GramLedger(mechanism, steps=[10], grams=[[[4.0, 0.0], [0.0, 0.25]]])
>>> ledger.scaled()[0]  # clipped to 1, in units of the noise
array([[0.25  , 0.    ],
       [0.    , 0.0625]])
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices, expect, numbers
from opacus_pi.files.kinds import GRAM_LEDGER
from opacus_pi.ledger.checks import checked_steps, frozen
from opacus_pi.ledger.mechanism import SCHEDULED, NoisySGD
from opacus_pi.ledger.saving import LedgerFile, SavedLedger

__all__ = ["GramLedger", "scaled_gram"]

_SHAPES = {"forget": "(N, m, m)", "minibatch": "(N, R, J, J)"}


@dataclass(frozen=True, eq=False, repr=False)
class GramLedger(SavedLedger):
    """Inner products of a group's gradients at the rows of one run; sensitive data.

    Args:
        mechanism: Number of updates, sample rate, noise and clip norm of the run.
        steps: int64 ``(N,)``, strictly increasing: updates done at each row.
        grams: float64. ``kind="forget"``: ``(N, m, m)``, ⟨g_x, g_y⟩ of the m forget
            examples' own gradients, before clipping. ``kind="minibatch"``: of shape
            ``(N, R, J, J)``, ⟨U_i − U'_r, U_j − U'_r⟩, where U_1 … U_J are the summed
            (clipped) gradients of minibatches of all the data and U'_r that of a
            minibatch of the retain set. Subtract **before** taking products: a
            difference of products may have no correct digit.
        kind: ``"forget"`` for the coupled bound, ``"minibatch"`` for the bound of
            Theorem B.1 (docs/theory.md).
        example_ids: int64 ``(m,)``, the examples of the group.
        data_set: The data set's ``fingerprint``, or a name of your own.

    Raises:
        ValueError: If shapes disagree, or a matrix is not a Gram matrix.
    """

    _note: ClassVar[str] = "sensitive: it shows how unusual the group is"
    _FILE: ClassVar[LedgerFile] = LedgerFile(
        GRAM_LEDGER,
        arrays={"steps": "<i8", "grams": "<f8"},
        texts={"kind": "gram_kind"},
        more_arrays={"example_ids": "<i8"},
        more_texts={"data_set": "data_set"},
    )

    mechanism: NoisySGD
    steps: NDArray[np.int64]
    grams: NDArray[np.float64]
    kind: str = field(default="forget", kw_only=True)
    example_ids: NDArray[np.int64] | None = field(default=None, kw_only=True)
    data_set: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        expect(
            self.kind in _SHAPES,
            "kind",
            repr(self.kind),
            'must be "forget" or "minibatch"',
            'Pass "forget" for gradients of the forget set, "minibatch" for gradients '
            "of minibatches.",
        )
        steps = checked_steps(self.steps, self.mechanism.num_steps)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "grams", _grams(self.grams, self.kind, len(steps)))
        for name in SCHEDULED:
            shape = np.shape(getattr(self.mechanism, name))
            expect(
                shape in ((), steps.shape),
                name,
                f"an array of shape {shape}",
                f"must be a number or have shape {steps.shape}",
                "Pass one number for all rows, or one for each.",
            )
        if self.example_ids is not None:
            self._check_ids()

    def _check_ids(self) -> None:
        """Refuse ids unless there is one for each row of a forget Gram matrix."""
        ids = np.array(self.example_ids, dtype=np.int64)
        distinct_indices("example_ids", ids, np.iinfo(np.int64).max)
        expect(
            self.kind != "forget" or len(ids) == self.grams.shape[-1],
            "example_ids",
            f"{len(ids)} ids",
            f"must be {self.grams.shape[-1]} ids, one per row of a matrix",
            "Give the ids in the order of the matrices' rows.",
        )
        object.__setattr__(self, "example_ids", frozen(ids))

    def _shown(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": self.grams.shape,
            **self.mechanism._shown(),
            "data_set": self.data_set,
        }

    def scaled(self) -> NDArray[np.float64]:
        """Return the matrices, clipped and in units of the noise, K = ⟨g_x, g_y⟩/σ².

        Returns:
            float64, shaped as ``grams``. Clipping scales row and column x by
            min(1, C/‖g_x‖); minibatch sums are clipped already.

        Raises:
            ValueError: If ``noise_std`` is 0.
        """
        rows = range(len(self.steps))
        facts = [self.mechanism.at_row(row) for row in rows]
        if self.kind == "minibatch":
            facts = [replace(fact, max_grad_norm=float("inf")) for fact in facts]
        scaled = [scaled_gram(self.grams[row], facts[row]) for row in rows]
        return np.reshape(scaled, self.grams.shape)

    def with_noise_std(self, noise_std: ArrayLike) -> "GramLedger":
        """Return the same matrices under another, assumed noise level.

        Args:
            noise_std: Standard deviation of the noise on the sum of the gradients, a
                number or ``(N,)``.

        Returns:
            A ledger with the same matrices and ``mechanism.assumed_noise`` set: it
            ranks groups, and no guarantee follows from it.
        """
        return replace(self, mechanism=self.mechanism.with_noise_std(noise_std))


def scaled_gram(gram: NDArray[np.float64], mechanism: NoisySGD) -> NDArray[np.float64]:
    """Return one row's matrix, clipped and in units of a mechanism's noise.

    Args:
        gram: ``(…, m, m)``, inner products.
        mechanism: The run's facts at this row, with numbers and no schedules.

    Returns:
        float64 in the matrix's shape.

    Raises:
        ValueError: If ``noise_std`` is 0.
    """
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    with np.errstate(invalid="ignore"):
        factor = np.where(norms > 0, mechanism.ratios(norms) / norms, 0.0)
    return gram * factor[..., :, None] * factor[..., None, :]


def _grams(value: ArrayLike, kind: str, num_rows: int) -> NDArray[np.float64]:
    """Return Gram matrices, checked and made exactly symmetric."""
    grams = numbers("grams", value).copy()
    rank = _SHAPES[kind].count(",") + 1
    expect(
        grams.ndim == rank
        and grams.shape[0] == num_rows
        and grams.shape[-1] == grams.shape[-2],
        "grams",
        f"an array of shape {grams.shape}",
        f"must have shape {_SHAPES[kind]} with N = {num_rows}",
        f'A ledger of kind "{kind}" holds one matrix for each row'
        + (" and each minibatch of the retain set." if kind == "minibatch" else "."),
    )
    flipped = np.swapaxes(grams, -1, -2)
    diagonal = np.diagonal(grams, axis1=-2, axis2=-1)
    norms = np.sqrt(np.abs(diagonal))  # before the product, which may overflow
    size = norms[..., :, None] * norms[..., None, :]
    sound = (
        np.isfinite(grams)
        & (np.abs(grams) <= size * (1 + 1e-5))
        & (np.abs(grams - flipped) <= 1e-5 * size)
    )
    expect(
        bool(sound.all() and (diagonal >= 0).all()),
        "grams",
        "a matrix with other entries",
        "must contain symmetric matrices of inner products (|K_xy| ≤ √(K_xx·K_yy))",
        "Compute them in float64 as G·Gᵀ, where each row of G is one gradient.",
    )
    return frozen((grams + flipped) / 2)
