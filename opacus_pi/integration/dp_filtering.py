"""Leaves out of a private update the examples whose budget does not allow it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from opacus.optimizers.optimizer import _check_processed_flag
from torch import Tensor, nn

from opacus_pi._errors import AccountingError
from opacus_pi._validate import positive
from opacus_pi.accounting import NoisySGD, RenyiFilter
from opacus_pi.attribution import NOBODY, Tracker
from opacus_pi.attribution.evidence import Rows
from opacus_pi.integration import refusals

_BELIEVED = (
    "A RenyiFilter charges examples, so whose rows these are must be certain. The "
    "model's inputs are neither the tensors that the data loader delivered nor copies "
    "of them. Transform inputs in the data set or in collate_fn instead."
)
_LESS_NOISE = (
    "The noise was lowered between the physical batches of one update, so its examples "
    "were charged too little. Step schedulers after optimizer.step() has updated the "
    "weights."
)


@dataclass(eq=False)
class FilterGate:
    """Lets rows into the updates of one run as its filter says.

    Args:
        renyi_filter: Whose budgets hold.
        tracker: How certain the rows are.
        batch_norms: Layers that mix examples while they are in training mode.
    """

    renyi_filter: RenyiFilter
    tracker: Tracker
    batch_norms: Sequence[nn.Module]
    _seen: list[Rows] = field(init=False, default_factory=list)
    _noise_std: float = field(init=False, default=0.0)

    def enter(
        self,
        parameters: Sequence[nn.Parameter],
        rows: Rows,
        norms: Tensor,
        *,
        noise_std: float,
        max_grad_norm: float,
    ) -> tuple[Rows, Tensor]:
        """Zero the per-example gradients of the rows that may not enter.

        A row is left out if its example's budget does not allow it, if it is no
        known example's, if its norm is not finite, and from an example's second row
        in one update on.

        Args:
            parameters: With ``grad_sample``, to be clipped next.
            rows: Whose rows they are, ``(b,)``.
            norms: Of each row, before clipping, ``(b,)``.
            noise_std: Of the noise on the sum that this update will draw.
            max_grad_norm: What the rows will be clipped to.

        Returns:
            Rows and norms as they entered: nobody's from an example's second row on,
            norm 0 where left out.

        Raises:
            AccountingError: If the examples behind the rows are not certain, or a
                gradient depends on several examples.
            ValueError: If there is no noise.
        """
        mixed = refusals.batch_statistics(self.batch_norms)
        if mixed or self.tracker.counts["by_latest"]:
            raise AccountingError(mixed or _BELIEVED)
        positive(noise_std=noise_std, remedy="No budget covers a noiseless step.")
        rows = self._once(rows)
        lengths = norms.detach().double().cpu().numpy()
        asking = (rows >= 0) & np.isfinite(lengths)
        step = NoisySGD(1, 1.0, noise_std, max_grad_norm)
        admitted = np.zeros(len(rows), dtype=np.bool_)
        admitted[asking] = self.renyi_filter.admit(
            rows[asking], step.ratios(lengths[asking])
        )
        self._noise_std = max(self._noise_std, noise_std)
        if not admitted.all():
            left_out = torch.from_numpy(~admitted)
            _zero_rows(parameters, left_out)
            norms = norms.masked_fill(left_out.to(norms.device), 0.0)
        return rows, norms

    def _once(self, rows: Rows) -> Rows:
        """The rows; from an example's second one in an update on they are nobody's."""
        everyone = np.concatenate([*self._seen, rows])
        _, firsts = np.unique(everyone, return_index=True)
        is_first = np.zeros(len(everyone), dtype=np.bool_)
        is_first[firsts] = True
        is_first = is_first[len(everyone) - len(rows) :]
        self._seen.append(rows[rows >= 0])
        return np.where(is_first | (rows < 0), rows, NOBODY)

    def leave(self, noise_std: float) -> None:
        """The update is complete and its noise about to be drawn.

        Args:
            noise_std: Of that noise.

        Raises:
            AccountingError: If it is less than what the rows were charged for.
        """
        if noise_std < self._noise_std:
            raise AccountingError(_LESS_NOISE)
        self._seen, self._noise_std = [], 0.0


def _zero_rows(parameters: Sequence[Any], left_out: Tensor) -> None:
    """Replace per-example gradients by copies with zeros; they may share storage."""
    for p in parameters:
        _check_processed_flag(p.grad_sample)  # which the copies do not carry
        is_list = isinstance(p.grad_sample, list)
        passes = p.grad_sample if is_list else [p.grad_sample]
        parts = left_out.split([len(g) for g in passes])
        kept = [
            g.masked_fill(part.to(g.device).view(-1, *[1] * (g.dim() - 1)), 0.0)
            for g, part in zip(passes, parts, strict=True)
        ]
        p.grad_sample = kept if is_list else kept[0]
