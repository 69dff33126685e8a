"""What a recording engine can be asked after, or during, training."""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from opacus.accountants import IAccountant
from torch import nn

from opacus_pi import accounting
from opacus_pi._errors import AccountingError
from opacus_pi.accounting import GradNormLedger
from opacus_pi.attribution import Tracker
from opacus_pi.difficulty.forget_sets import num_at_top
from opacus_pi.integration.accountants import num_steps_of
from opacus_pi.integration.opacus_engine import Engine
from opacus_pi.recording import Recorder

_NO_BOUND = (
    "make_monitored trains without clipping, so no epsilon holds for every example, "
    "and Opacus's accountant has not counted these updates. With noise, "
    "engine.epsilons(delta) estimates what each example of this data set cost; train "
    "by make_private for a guarantee."
)


class EngineReadings(Engine):
    """The questions of an engine that has a recorder, a tracker and an accountant."""

    recorder: Recorder
    accountant: IAccountant
    _tracker: Tracker
    _begun: bool
    _is_private: bool
    _earlier_steps: int

    @property
    def module(self) -> nn.Module:
        """The module that is being trained, as the user made it.

        Raises:
            AccountingError: If there is none, or it is gone: it is referred to weakly.
        """
        module: nn.Module | None = self._module()
        if module is None:
            raise AccountingError(
                "The engine has no module: none was prepared, or it was deleted. Call "
                "make_private or make_monitored, and keep the model."
            )
        return module

    @property
    def ledger(self) -> GradNormLedger:
        """The record up to now; sensitive, because it says who is unusual.

        It names the weights that the last update left, by a hash of the model's state
        dict, so that ``Unlearner`` can tell whether a model has them.

        Raises:
            AccountingError: If nothing was recorded, or what was run cannot be
                accounted; it says why.
        """
        self.recorder.name_weights()
        return self.recorder.ledger

    @property
    def attribution(self) -> dict[str, int]:
        """How many rows were attributed to examples by which evidence.

        ``by_storage`` and ``by_content`` are certain; ``by_latest`` is believed: the
        loop transformed its inputs, and their order is taken to be the loader's.
        ``unattributed`` rows are left out: their examples are charged by their other
        observations, or at the clip norm.
        """
        return dict(self._tracker.counts)

    def privacy_losses(self, order: float, **options: Any) -> NDArray[np.float64]:
        """Each example's Rényi privacy loss of the run.

        Warns where most examples share the largest.

        Args:
            order: Rényi order, above 1.
            **options: Of ``opacus_pi.accounting.privacy_losses``.

        Returns:
            float64 ``(n,)``.

        Raises:
            AccountingError: If the run, or a part of it, cannot be accounted.
        """
        losses = accounting.privacy_losses(self._whole_ledger(), order, **options)
        _say_if_most_tie(losses)
        return losses

    def epsilons(self, delta: float) -> NDArray[np.float64]:
        """Each example's epsilon at ``delta``: an estimate from the norms on record.

        Without clipping (``make_monitored``) it is all there is: no bound holds for
        everybody, and without noise it is refused. With clipping, under Poisson
        sampling, never above ``max(0, get_epsilon(delta))``, which holds for every
        example. With the user's own loader (``poisson_sampling=False``) Opacus's number
        assumes a sampling that was not done, and is no bound here.
        Warns where most examples share the largest.

        Args:
            delta: Failure probability, in (0, 1).

        Returns:
            float64 ``(n,)``.

        Raises:
            AccountingError: If the run, or a part of it, cannot be accounted.
        """
        ledger = self._whole_ledger()
        values = accounting.epsilons(ledger, delta)
        _say_if_most_tie(values)
        mechanism = ledger.mechanism
        counted = num_steps_of(self.accountant)
        if mechanism.sampling == "poisson" and counted == mechanism.num_steps:
            worst: float = self.get_epsilon(delta)  # type: ignore[no-untyped-call]
            values = np.minimum(values, max(0.0, worst))
        return values

    # without annotations, so that the signature is Opacus's
    def get_epsilon(self, delta):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        """Opacus's number, which assumes Poisson sampling; warns where it was not done.

        Args:
            delta: Failure probability, in (0, 1).

        Raises:
            AccountingError: After ``make_monitored``: Opacus's accountants do not know
                of updates without clipping, for which no number holds.
        """
        if self._begun and not self._is_private:
            raise AccountingError(_NO_BOUND)
        if self.recorder.sampling == "fixed" and self._is_private:
            warnings.warn(
                "get_epsilon is Opacus's number, and assumes Poisson sampling. This "
                "loader draws otherwise (poisson_sampling=False), so it is no bound. "
                "engine.epsilons accounts for the sampling that was done.",
                stacklevel=2,
            )
        epsilon: float = super().get_epsilon(delta)
        return epsilon

    def _whole_ledger(self) -> GradNormLedger:
        """The ledger, if it holds every update that was made or counted."""
        ledger = self.recorder.ledger  # whose weights need not be hashed
        recorded = ledger.mechanism.num_steps
        counted = num_steps_of(self.accountant)
        others = self._earlier_steps + counted - (recorded if self._is_private else 0)
        if others > 0:
            raise AccountingError(
                f"The ledger holds {recorded} updates, but there were others: the "
                f"accountant has counted {counted}, and {self._earlier_steps} were "
                "recorded before the last make_private or make_monitored call. Use one "
                "engine for each run, and resume from its own checkpoints; "
                "engine.ledger holds what was recorded last."
            )
        return ledger


def _say_if_most_tie(values: NDArray[np.float64]) -> None:
    """Whoever ranks such values by hand would get the data set's order."""
    num_tied = num_at_top(values)
    if 1 < num_tied and len(values) < 2 * num_tied:
        warnings.warn(
            f"{num_tied} of {len(values)} examples share the largest value, that of an "
            "example which is always clipped, to which larger estimates are cut: "
            "nothing tells them apart. A larger max_grad_norm, with a smaller learning "
            "rate, would; a lower order may.",
            stacklevel=3,
        )
