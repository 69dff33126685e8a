"""What may be read of a recorded run, and what its chain of custody says about it.

An engine answers questions with numbers of its ledger and of Opacus's accountant. Both
are worth what is known about how they came to be, so every question passes the same
checks before its answer: was anything recorded, does the ledger hold every update that
was made or counted, and is no link of the chain of custody broken?

**Guarantee.** A number that is wrong for the training that was made is refused with an
``AccountingError``. The accountant's own ε stays Opacus's number, to the bit; where it
is not a bound, a warning says why.

**What breaks it.** Updates that neither the recorder nor the accountant has seen.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from opacus.accountants import GaussianAccountant, IAccountant
from torch import nn

from opacus_pi import accounting
from opacus_pi._errors import AccountingError
from opacus_pi._types import ArrayLike
from opacus_pi.accounting import GradNormLedger, NoisySGD, PrivacyStatement
from opacus_pi.accounting.tied_losses import always_clipped
from opacus_pi.attribution import Tracker
from opacus_pi.difficulty.forget_sets import ties
from opacus_pi.integration.accountants import (
    AccountantBound,
    bound_of,
    gives_bound,
    num_steps_of,
)
from opacus_pi.integration.checks import RunChecks
from opacus_pi.integration.runs import CurrentRun
from opacus_pi.recording import Recorder

__all__ = ["Readings"]

_NO_BOUND = (
    "make_monitored trains without clipping, so no epsilon holds for every example, "
    "and Opacus's accountant has not counted these updates. With noise, "
    "engine.epsilons(delta) estimates the privacy loss of each example of this data "
    "set; train by make_private for a guarantee."
)
_NOT_COUNTED = (
    "The accountant has counted fewer updates than were made, so its epsilon is too "
    "small. The cause is not known: optimizer.attach_step_hook may have replaced the "
    "accountant's own hook (attach one function that calls both hooks), the loop may "
    "call the parts of optimizer.step instead of it, or the accountant's history was "
    "changed."
)
_CHARGED_TOO_LITTLE = (
    "get_epsilon returns Opacus's number, which is too small: the accountant has "
    "counted an update as if it had more noise, a smaller clip norm or a smaller "
    "sample rate than it had. Either max_grad_norm was lowered within an update, so "
    "some examples were clipped to a larger norm than the noise was made for: step a "
    "scheduler of it after updates only, for inside BatchMemoryManager an update has "
    "several batches. Or per-layer clipping was changed by one of its two settings "
    "only: change max_grad_norms, which clips, and max_grad_norm, which scales the "
    "noise, by the same factor. Or a step hook changes the optimizer before the "
    "accountant's own hook counts, or that hook was attached with another sample_rate. "
    "The ledger has the true settings; engine.epsilons(delta) and "
    "engine.privacy_statement use them."
)
_NONE_COUNTED = (
    "The accountant has counted none of {} updates, so it has no epsilon. It counts in "
    "optimizer.step(): call it, and not its parts (clip_and_accumulate, add_noise, "
    "original_optimizer.step). If your loop needs the parts, let it call "
    "optimizer.step_hook(optimizer) after add_noise. If attach_step_hook has replaced "
    "the accountant's hook, attach one function that calls both. "
    "engine.epsilons(delta) covers the recorded updates."
)
_APPROXIMATE = (
    "get_epsilon returns the number of Opacus's GDP accountant. It comes from a limit "
    "theorem, so it is an approximation, and may be too small. The library uses it as "
    "a limit of no other number. "
    'For a bound, use PrivacyEngine(accountant="rdp") or "prv".'
)
_NO_UPDATE = (
    "get_epsilon returns 0: the optimizer that make_private returned has made no "
    "update, although the loader has delivered a whole pass of batches. If a model was "
    "trained with these batches, it was not trained privately: train the model with "
    "the optimizer that make_private returned. If training has not begun, nothing "
    "needs to be done."
)
_NO_LEDGER = (
    "get_epsilon returns Opacus's number. It is not known whether it is a bound for "
    "this training. {}"
)
_BROKEN = (
    "get_epsilon returns Opacus's number, but it cannot be taken as a bound for this "
    "training. {}"
)
_NOT_POISSON = (
    "get_epsilon returns Opacus's number, which assumes Poisson sampling. This loader "
    "draws otherwise (poisson_sampling=False), so the number is no bound. For a bound, "
    "use accounting.worst_case_loss(engine.ledger.mechanism, order): it is a Rényi "
    "divergence, which accounting.rdp_to_epsilon converts to ε."
)
# Of warnings: the line of the user's that has called a method of the engine, which has
# called the method here that warns.
_USERS_LINE = 3


@dataclass(frozen=True)
class Readings:
    """The answers that an engine can give at one moment.

    An engine makes a new one for every question, because its recorder and its
    accountant may be replaced.

    Args:
        recorder: What was recorded.
        checks: The reasons why nothing was, and the updates that are missing.
        accountant: Opacus's, which counts updates by itself.
        run: The run that was prepared last; None: none was.
    """

    recorder: Recorder
    checks: RunChecks
    accountant: IAccountant
    run: CurrentRun | None

    @property
    def is_private(self) -> bool:
        """Whether the last run was prepared by ``make_private``."""
        return self.run is not None and self.run.is_private

    # ---------------------------------------------------------------------- of the run
    def module(self) -> nn.Module:
        """Return the module that is being trained, as the user made it.

        Raises:
            AccountingError: If there is none.
        """
        module = None if self.run is None else self.run.module()
        if module is None:
            raise AccountingError(
                "The engine has no module: none was prepared, it was deleted, or the "
                "engine is a copy, which has no run of its own. Call make_private or "
                "make_monitored, and keep the model that it returns in a variable."
            )
        return module

    def attribution(self) -> dict[str, int]:
        """Return the numbers of samples by kind of evidence; all 0 before a run."""
        tracker = Tracker() if self.run is None else self.run.tracker
        chain = self.recorder.chain
        before = 0 if chain is None else chain.num_samples_before
        return {**tracker.counts, **({"before_loading": before} if before else {})}

    # ------------------------------------------------------------------ of the ledger
    def ledger(self) -> GradNormLedger:
        """Return the ledger of the run up to now, which names the present weights.

        Raises:
            AccountingError: If nothing was recorded, updates are missing, or the run
                cannot be accounted for.
        """
        self._require_begun()
        self.recorder.name_weights()
        return self._unnamed_ledger()

    def _unnamed_ledger(self) -> GradNormLedger:
        """Return the ledger, for numbers that do not depend on its weights.

        The recorder asks ``missing_updates`` as well, once a run was prepared; here it
        is asked for a recorder that was loaded and not prepared.

        Raises:
            AccountingError: As ``ledger``.
        """
        self._require_begun()
        ledger = self.recorder.ledger
        if reason := self.missing_updates():
            raise AccountingError(reason)
        return ledger

    def privacy_losses(self, order: float, **options: Any) -> NDArray[np.float64]:
        """Return each example's Rényi privacy loss, float64 ``(n,)``.

        Args:
            order: Rényi order, above 1.
            **options: Options of ``accounting.privacy_losses``.
        """
        ledger = self._unnamed_ledger()
        losses = accounting.privacy_losses(ledger, order, **options)
        _warn_if_most_are_equal(losses, ledger)
        return losses

    def epsilons(self, delta: float, **options: Any) -> NDArray[np.float64]:
        """Return each example's epsilon, float64 ``(n,)``.

        Args:
            delta: Failure probability, in (0, 1).
            **options: Options of ``accounting.epsilons``.
        """
        ledger = self._unnamed_ledger()
        values = accounting.epsilons(ledger, delta, **options)
        _warn_if_most_are_equal(values, ledger)
        return self._at_most_the_worst_case(values, delta, ledger.mechanism)

    def epsilon_limits(self, delta: float, **options: Any) -> NDArray[np.float64]:
        """Return an upper confidence limit of each example's epsilon, ``(n,)``.

        Args:
            delta: Failure probability, in (0, 1).
            **options: Options of ``accounting.epsilon_limits``.
        """
        ledger = self._unnamed_ledger()
        values = accounting.epsilon_limits(ledger, delta, **options)
        return self._at_most_the_worst_case(values, delta, ledger.mechanism)

    def _at_most_the_worst_case(
        self, values: NDArray[np.float64], delta: float, mechanism: NoisySGD
    ) -> NDArray[np.float64]:
        """Limit epsilons by the accountant's, where that holds for every example."""
        return np.minimum(values, self._accountants_epsilon(delta, mechanism))

    def _accountants_epsilon(self, delta: float, mechanism: NoisySGD) -> float:
        """Return the accountant's ε; ``inf`` unless it holds for every example.

        Args:
            delta: Failure probability, in (0, 1).
            mechanism: That of the ledger.
        """
        counts_all = num_steps_of(self.accountant) == mechanism.num_steps
        charges_all = not self.recorder.is_charged_too_little
        holds = mechanism.sampling == "poisson" and gives_bound(self.accountant)
        if not (holds and counts_all and charges_all):
            return math.inf
        # not the engine's get_epsilon, which a derived class may define otherwise
        return max(0.0, float(self.accountant.get_epsilon(delta)))

    def privacy_statement(
        self, rows: ArrayLike, delta: float, subject: str | None
    ) -> PrivacyStatement:
        """Return the statement for one person, limited as ``epsilons`` are.

        Args:
            rows: The person's positions in the training set.
            delta: Failure probability, in (0, 1).
            subject: Name of the person or example; None: the position.
        """
        ledger = self.ledger()
        found = accounting.privacy_statement(ledger, rows, delta, subject=subject)
        return found.limited(self._accountants_epsilon(delta, ledger.mechanism))

    def finish_update(self) -> None:
        """Count an update in which the loop has written the weights by itself."""
        update = None if self.run is None else self.run.present_update()
        if update is not None:
            update.finish_if_written(waits=True)

    def missing_updates(self) -> str:
        """Say that the ledger holds a part of the updates only; empty: all of them.

        Opacus counts an update before its step, so one that was interrupted there, as
        by the death of another process, is counted although it wrote no weights. If
        the weights were written, it is counted here, too.
        """
        self.finish_update()
        update = None if self.run is None else self.run.present_update()
        interrupted = int(update is not None and update.is_interrupted)
        return self.checks.missing_updates(
            self.recorder.num_steps,
            num_steps_of(self.accountant) - interrupted,
            is_private=self.is_private,
            is_within_update=update is None and self.recorder.is_within_update,
        )

    def _require_begun(self) -> None:
        """Refuse numbers with the reason that is known, if no recording has begun."""
        self.finish_update()
        if not self.recorder.sampling:
            self.checks.require_begun(num_steps_of(self.accountant))

    # -------------------------------------------------------------- of the accountant
    def accountant_bound(self) -> AccountantBound | None:
        """Return what the accountant guarantees for the recorded run, if anything."""
        mechanism = self.recorder.ledger.mechanism
        if not self.is_private or self.recorder.is_charged_too_little:
            return None
        return bound_of(self.accountant, mechanism)

    def require_counted(self) -> None:
        """Say why Opacus's accountant could not compute ε, if it is without updates.

        Raises:
            AccountingError: If it has counted none of the updates that were made.
        """
        num_made = self.recorder.num_steps
        if self.is_private and num_made and not num_steps_of(self.accountant):
            raise AccountingError(_NONE_COUNTED.format(num_made))

    def judge_epsilon(self) -> None:
        """Warn if the accountant's ε is no bound for the training that was made.

        Raises:
            AccountingError: If the training is monitored, and so not counted.
        """
        if self.run is not None and not self.is_private:
            raise AccountingError(_NO_BOUND)
        num_made, num_counted = self.recorder.num_steps, num_steps_of(self.accountant)
        if self.recorder.sampling == "fixed" and self.is_private:
            warnings.warn(_NOT_POISSON, stacklevel=_USERS_LINE)
        if self.is_private and num_counted < num_made:
            warnings.warn(_NOT_COUNTED, stacklevel=_USERS_LINE)
        if self.is_private and self.recorder.is_charged_too_little:
            warnings.warn(_CHARGED_TOO_LITTLE, stacklevel=_USERS_LINE)
        if (
            self.is_private
            and num_made
            and isinstance(self.accountant, GaussianAccountant)
        ):
            warnings.warn(_APPROXIMATE, stacklevel=_USERS_LINE)
        if self.is_private and not num_made and not num_counted and self._has_passed():
            warnings.warn(_NO_UPDATE, stacklevel=_USERS_LINE)
        reason, is_shown = self.recorder.epsilon_reason()
        if reason:
            text = _BROKEN if is_shown else _NO_LEDGER
            warnings.warn(text.format(reason), stacklevel=_USERS_LINE)

    def _has_passed(self) -> bool:
        """Return whether the latest pass over the loader is over."""
        latest = None if self.run is None else self.run.tracker.latest
        return latest is not None and latest.loader_pass.has_ended


def _warn_if_most_are_equal(
    values: NDArray[np.float64], ledger: accounting.GradNormLedger
) -> None:
    """Warn if most examples share the largest value, and name the causes.

    Sorting such values would only reproduce the order of the data set.
    """
    levels = ties(values)
    is_largest = levels == levels.max(initial=0)
    num_equal = int(np.count_nonzero(is_largest))
    if num_equal < 2 or 2 * num_equal <= len(values):
        return
    num_clipped = int(np.count_nonzero(is_largest & always_clipped(ledger)))
    causes = [
        f"{num_equal} of {len(values)} examples share the largest value, so they "
        "cannot be distinguished."
    ]
    if num_clipped:
        causes.append(
            f"{num_clipped} of them had gradients at or above max_grad_norm at every "
            "update for which their norm is known: a larger max_grad_norm with a "
            "smaller learning rate may distinguish these."
        )
    if num_clipped < num_equal:
        causes.append(
            f"{num_equal - num_clipped} had a smaller norm at some update: if the "
            "value is the worst case, their larger estimates were cut to it. Without a "
            "new training, privacy_losses at another order, such as 2, or with "
            "hoelder_p=inf may distinguish these."
        )
    warnings.warn(" ".join(causes), stacklevel=_USERS_LINE + 1)
