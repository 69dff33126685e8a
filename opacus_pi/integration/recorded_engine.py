"""An engine of Opacus with parts that record a run, and what it answers about the run.

``RecordedEngine`` owns the parts: ``recorder`` writes the ledger, ``checks`` collects
the reasons why no numbers can be given, and ``checkpoints`` saves and resumes. Its
methods explain what a user may ask, and hand the question over to ``Readings``
(``readings``), which knows when an answer must be refused. How a run is prepared is not
known here: ``PerInstanceMixin`` (``mixin``) adds it.
"""

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import opacus
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from opacus_pi._shown import Shown
from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect
from opacus_pi.accounting import (
    GradNormLedger,
    PrivacyStatement,
    RenyiFilter,
)
from opacus_pi.attribution import observe_like
from opacus_pi.files.atomic_file import replacing
from opacus_pi.integration.accountants import AccountantBound
from opacus_pi.integration.checkpoints import (
    CHECKPOINT_KEY,
    Checkpoints,
    all_or_nothing,
    without_code,
)
from opacus_pi.integration.checks import OutsideChanges, RunChecks
from opacus_pi.integration.derived import Preparation, shown_as
from opacus_pi.integration.opacus_compat import ends_draw, patch_memory_manager
from opacus_pi.integration.readings import Readings
from opacus_pi.integration.runs import CurrentRun
from opacus_pi.recording import Recorder

if TYPE_CHECKING:
    # The class goes before an engine of Opacus in the bases and calls its methods.
    from opacus import PrivacyEngine as OpacusEngine
else:
    OpacusEngine = object

__all__ = ["RecordedEngine"]

# Attributes that are used before anything else of ours.
_PARTS = ("recorder", "renyi_filter", "checks", "checkpoints", "_preparation", "_run")


def observe_parts(source: DataLoader[Any], built: DataLoader[Any]) -> None:
    """Observe a loader that ``BatchMemoryManager`` built, if its source is observed.

    Args:
        source: The loader that the manager was given.
        built: The loader that it built, which delivers parts of batches.

    Raises:
        ValueError: If the manager was given another optimizer than Opacus's, such as a
            wrapper of Accelerate, which cannot postpone a step.
    """
    optimizer = getattr(built.batch_sampler, "optimizer", None)
    expect(
        hasattr(optimizer, "signal_skip_step"),
        "optimizer",
        f"a {type(optimizer).__name__}",
        "must be the optimizer that make_private returned",
        "Accelerator.prepare wraps it: pass BatchMemoryManager the one from before.",
    )
    observe_like(source, built, ends_draw=ends_draw)


class RecordedEngine(Shown, OpacusEngine):
    """What every recording engine owns, and the questions that it answers.

    Args:
        recorder: How to record. Default: ``Recorder()``.
        renyi_filter: The budgets. Default: none.
        *arguments: Those of the engine's class, if it takes any by position.
        **opacus_options: The engine's own options.

    Attributes:
        recorder: Writes the ledger.
        renyi_filter: The budgets, if there are any.
        checks: Collects the reasons why the numbers of a run cannot be given.
        checkpoints: What is added to Opacus's checkpoints.
    """

    def __init__(
        self,
        *arguments: Any,
        recorder: Recorder | None = None,
        renyi_filter: RenyiFilter | None = None,
        **opacus_options: Any,
    ) -> None:
        super().__init__(*arguments, **opacus_options)
        self._add_parts(recorder, renyi_filter)

    def _add_parts(
        self, recorder: Recorder | None = None, renyi_filter: RenyiFilter | None = None
    ) -> None:
        """Add everything that Opacus's engine does not have."""
        expect(
            isinstance(recorder, Recorder | None),
            "recorder",
            repr(recorder),
            "must be a Recorder or None",
            'Pass for example Recorder("swept").',
        )
        self.recorder = Recorder() if recorder is None else recorder
        self.renyi_filter = renyi_filter
        self.checks, self.checkpoints = RunChecks(), Checkpoints()
        self._has_default_recorder = recorder is None
        self._preparation: Preparation | None = None  # within make_private only
        self._run: CurrentRun | None = None  # the run that was prepared last
        patch_memory_manager(observe_parts)

    if not TYPE_CHECKING:  # type checkers would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            """Add our parts to an engine whose class does not call our ``__init__``.

            A class that an engine is mixed with may call Opacus's ``__init__`` itself.
            """
            if name not in _PARTS:
                return object.__getattribute__(self, name)  # raises, and names it
            self._add_parts()
            return vars(self)[name]

    def _shown(self) -> dict[str, Any]:
        recorder = self.recorder
        return {
            "accountant": type(self.accountant).__name__,
            "recorder": recorder.mode,
            "sampling": recorder.sampling or None,
            "num_steps": recorder.num_steps,
            "budgets": self.renyi_filter is not None,
        }

    # ---------------------------------------------------------------- what was recorded
    @property
    def _readings(self) -> Readings:
        """What the engine can say now; each of the methods below asks it."""
        return Readings(self.recorder, self.checks, self.accountant, self._run)

    def _missing_updates(self) -> str:
        """Say which updates the ledger lacks, for the recorder; empty if none."""
        return self._readings.missing_updates()

    @property
    def module(self) -> nn.Module:
        """The module that is being trained, as the user made it.

        Raises:
            AccountingError: If no run was prepared, or the module was deleted: the
                engine does not keep it in memory.
        """
        return self._readings.module()

    @property
    def ledger(self) -> GradNormLedger:
        """The ledger of the run up to now; it shows which examples are unusual.

        It is sensitive, like the training data themselves: do not publish it.

        It stores the SHA-256 of the final weights, those after the last update, so that
        ``Unlearner`` can check that a model has these weights.

        Raises:
            AccountingError: If nothing was recorded, or the run cannot be accounted
                for; the message says why.
        """
        return self._readings.ledger()

    @property
    def attribution(self) -> dict[str, int]:
        """Numbers of samples that were matched to examples, by kind of evidence.

        ``by_storage`` and ``by_content`` are certain. ``by_latest`` is not verified:
        the loop transformed its inputs, and samples are assumed to be in the order of
        the latest batch. ``unattributed`` samples are left out: their examples are
        charged by their other observations, or at the clip norm. After a checkpoint was
        loaded, these count the samples since then, and ``before_loading`` those of the
        updates before it, of any kind: the ledger has both.
        """
        return self._readings.attribution()

    def privacy_losses(self, order: float, **options: Any) -> NDArray[np.float64]:
        """Return each example's Rényi privacy loss of the run.

        Warns if most examples share the largest value.

        Args:
            order: Rényi order, above 1.
            **options: Options of ``opacus_pi.accounting.privacy_losses``.

        Returns:
            float64 ``(n,)``.

        Raises:
            AccountingError: If the run, or a part of it, cannot be accounted for.
        """
        return self._readings.privacy_losses(order, **options)

    def epsilons(self, delta: float, **options: Any) -> NDArray[np.float64]:
        """Return each example's epsilon at ``delta``, estimated from recorded norms.

        With clipping and Poisson sampling no value exceeds ``max(0,
        get_epsilon(delta))``, which holds for every example. With the user's own loader
        (``poisson_sampling=False``) that number assumes a sampling that was not done,
        so the values are not limited by it. Without clipping (``make_monitored``) no
        bound holds for every example, and without noise there is no epsilon.

        Warns if most examples share the largest value.

        Args:
            delta: Failure probability, in (0, 1).
            **options: Options of ``opacus_pi.accounting.epsilons``.

        Returns:
            float64 ``(n,)``.

        Raises:
            AccountingError: If the run, or a part of it, cannot be accounted for.
        """
        return self._readings.epsilons(delta, **options)

    def epsilon_limits(self, delta: float, **options: Any) -> NDArray[np.float64]:
        """Return an upper confidence limit of each example's epsilon.

        ``epsilons`` estimates an example's epsilon from the updates that drew it. The
        norms of the other updates would have given another epsilon. The batches are
        drawn at random: with a probability of 95 %, as measured and not proved, they
        are such that this other epsilon is at most the limit. The limit is no bound
        for other runs of the training: ``get_epsilon`` is.

        Args:
            delta: Failure probability, in (0, 1).
            **options: Options of ``opacus_pi.accounting.epsilon_limits``, such as
                ``confidence``.

        Returns:
            float64 ``(n,)``, limited as the values of ``epsilons`` are.

        Raises:
            AccountingError: If the run, or a part of it, cannot be accounted for.
        """
        return self._readings.epsilon_limits(delta, **options)

    def privacy_statement(
        self, rows: ArrayLike, delta: float, *, subject: str | None = None
    ) -> PrivacyStatement:
        """Return what may be told to one person about the privacy of their examples.

        It is ``opacus_pi.accounting.privacy_statement`` of the ledger up to now. About
        one example, no number is above ``get_epsilon(delta)`` where ``epsilons`` is
        limited by it.

        Args:
            rows: The person's positions in the training set, each once; ``[157]`` for
                one example.
            delta: Failure probability, in (0, 1).
            subject: Name of the person or example; by default the position.

        Returns:
            The statement; print it to read it.

        Raises:
            ValueError: If positions are repeated or out of range, or ``delta`` is not
                in (0, 1).
            AccountingError: If the run cannot be accounted for.
        """
        return self._readings.privacy_statement(rows, delta, subject)

    def accountant_bound(self) -> AccountantBound | None:
        """Return what the engine's accountant guarantees for the recorded run.

        ``Unlearner`` states the accountant's ε beside the Rényi bound if it is smaller.

        Returns:
            A copy of the accountant that answers ``at(delta)``; None if its number is
            not a bound for what was recorded: batches were not Poisson, it is neither
            ``"prv"`` nor ``"rdp"``, or it counted other updates.

        Raises:
            AccountingError: If nothing was recorded, or the run cannot be accounted
                for.
        """
        return self._readings.accountant_bound()

    @shown_as(opacus.PrivacyEngine.get_epsilon, assigned=())
    def get_epsilon(self, delta: float) -> float:
        """Return Opacus's epsilon, which assumes Poisson sampling; 0 before training.

        Warns if batches were not drawn by Poisson sampling, if a link of the chain of
        custody is broken, if the accountant did not count every update, or if the
        loader was used for a whole pass without an update.

        Args:
            delta: Failure probability, in (0, 1).

        Raises:
            AccountingError: After ``make_monitored``: Opacus's accountants do not count
                updates without clipping, for which no epsilon holds. Also if the
                accountant fails because it has counted none of the updates.
        """
        self._readings.judge_epsilon()
        try:
            epsilon: float = super().get_epsilon(delta)
        except ValueError:  # the PRV accountant converts NaN to an integer
            self._readings.require_counted()
            if len(self.accountant):
                raise
            return 0.0  # no update yet: like the other accountants
        return epsilon

    # ---------------------------------------------------------------------- checkpoints
    @shown_as(opacus.PrivacyEngine.save_checkpoint, assigned=())
    def save_checkpoint(
        self,
        *,
        path: Any,
        checkpoint_dict: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Save as Opacus does, with the recorded run and random states under a new key.

        Opacus's engine can load the checkpoint too. After ``make_monitored``, pass the
        plain module and optimizer. In a distributed run in which every process has a
        recorded run of its own, each process saves a file of its own.

        Args:
            path: A file name, or a file object. A named file is replaced only when the
                new one is complete, so an interrupted process leaves the earlier
                checkpoint.
            checkpoint_dict: Entries of your own (epoch, schedules); filled in place.
            **options: Options of Opacus: ``module``, ``optimizer``, and more.
        """
        self._readings.finish_update()
        outside = self._outside_changes()
        if outside is not None:
            outside.checkpoint_is_saved()
        filled = checkpoint_dict or {}
        filled.update(
            self.checkpoints.entries(
                self.recorder,
                self.renyi_filter,
                self.accountant,
                options.get("optimizer"),
            )
        )
        save = super().save_checkpoint
        if not isinstance(path, (str, os.PathLike)):
            save(path=path, checkpoint_dict=filled, **options)
            return
        with replacing(path) as file:
            save(path=file, checkpoint_dict=filled, **options)

    @shown_as(opacus.PrivacyEngine.load_checkpoint, assigned=())
    def load_checkpoint(
        self, *, restore_rng: bool = False, **options: Any
    ) -> dict[str, Any]:
        """Load as Opacus does, and continue the recorded run if the checkpoint has one.

        No code from the file is run: it is read with ``weights_only=True``, which loads
        tensors, containers, numbers and strings (NumPy's too). Opacus itself unpickles
        every checkpoint with ``weights_only=False``, which runs whatever code the file
        holds. A checkpoint with objects of other types needs that: pass
        ``torch_load_kwargs={"weights_only": False}`` if you trust its source, or allow
        the types by ``torch.serialization.add_safe_globals``.

        Resumed with ``restore_rng=True``, a training loop ends with the weights and the
        ledger of the run that was not interrupted, bit for bit, on the same machine:

        * from a checkpoint between epochs, always. The loop goes on with the next
          epoch;
        * from a checkpoint within an epoch, saved after an ``optimizer.step()``: the
          first pass over the loader is the rest of that epoch. This is refused inside
          ``BatchMemoryManager``, and with workers where batches are drawn from torch's
          global generator or by a sampler of your own.

        Not restored: random states inside persistent workers, learning rate schedules
        and other objects of yours (put their states into ``checkpoint_dict``).

        After an error nothing is loaded: module, optimizer, accountant, recorder,
        filter, loader and random states are what they were.

        Args:
            restore_rng: Whether to restore the states of all generators (``random``,
                numpy, torch, CUDA, those of loader, sampler and noise), the position in
                the epoch, and the noise multiplier and clip norm of the saved run, as
                schedules had left them, in place of those that ``make_private`` was
                given. Call ``make_private`` or ``make_monitored`` first.
            **options: Options of Opacus: ``path``, ``module``, ``optimizer``, and more.

        Returns:
            The checkpoint, with your own entries.

        Raises:
            ValueError: If the file has objects that only unpickling can load, or is no
                checkpoint of an engine.
            ValueError: If ``restore_rng`` cannot be done: no run is prepared, or the
                checkpoint has no states, is damaged, or was taken at a moment from
                which a run cannot be resumed exactly; or if a ``RenyiFilter`` cannot go
                on with the budgets that were saved.
            AccountingError: If the recorder is strict, and the recorded run cannot be
                continued.
        """
        self.checkpoints.require_restorable(restore_rng=restore_rng)
        safe = without_code(options)
        with all_or_nothing(self.accountant, **options):
            checkpoint: dict[str, Any] = super().load_checkpoint(**safe)
            has_record = bool(checkpoint.get(CHECKPOINT_KEY))
            resume = self.checkpoints.prepared_resume(
                checkpoint,
                self.recorder,
                self.renyi_filter,
                module=options["module"],
                optimizer=options.get("optimizer"),
                accountant=self.accountant,
                restore_rng=restore_rng,
                checks=self.checks,
                source=str(options["path"]),
            )
            resume()
        outside = self._outside_changes()
        if has_record and outside is not None:
            outside.run_was_resumed()
        return checkpoint

    def _outside_changes(self) -> OutsideChanges | None:
        """Return what compares the weights between two updates, if a run has it."""
        update = None if self._run is None else self._run.present_update()
        return None if update is None else update.outside
