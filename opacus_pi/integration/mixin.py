"""A mixin that makes any engine of Opacus record each example's gradient norms.

``make_private`` stays Opacus's. The methods that it calls to prepare model, loader and
optimizer are overridden: each lets Opacus prepare the object and then has it observed
(``opacus_compat.OVERRIDDEN_METHODS`` lists them). From then on the optimizer reports
its updates by itself (``optimizers``, ``update``), and the engine only answers
questions about what was recorded.

The engine owns its parts: ``recorder`` writes the ledger, ``checks`` collects the
reasons why no numbers can be given, ``checkpoints`` saves and resumes.
"""

import os
import warnings
import weakref
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import opacus
import torch
from numpy.typing import NDArray
from opacus.grad_sample import AbstractGradSampleHooks
from opacus.optimizers import DPOptimizer
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.utils.data import DataLoader

from opacus_pi import accounting
from opacus_pi._errors import AccountingError
from opacus_pi._shown import Shown
from opacus_pi.accounting import GradNormLedger, RenyiFilter, fingerprint
from opacus_pi.attribution import Tracker, keeps_order, observe, observe_like
from opacus_pi.custody import Chain
from opacus_pi.difficulty.forget_sets import num_at_top
from opacus_pi.files.atomic_file import replacing
from opacus_pi.integration.accountants import (
    AccountantBound,
    PerInstanceAccountant,
    bound_of,
    num_steps_of,
)
from opacus_pi.integration.audit import (
    Audit,
    AuditedRun,
    audited_run,
    finding_of,
    joined,
)
from opacus_pi.integration.checkpoints import (
    Checkpoints,
    RunState,
    all_or_nothing,
    without_code,
)
from opacus_pi.integration.checks import (
    RunChecks,
)
from opacus_pi.integration.collate_audit import audit_items, tell_of_collate
from opacus_pi.integration.compatible import make_compatible
from opacus_pi.integration.derived import Preparation, record_overrides, records
from opacus_pi.integration.explanations import (
    REPLACE_LAYERS,
    add_note,
    explain_ghost_losses,
    explain_in_place,
)
from opacus_pi.integration.fast import MODE as FAST_MODE
from opacus_pi.integration.fast import (
    FastHooks,
    clip_from_cache,
    prepare_model,
    require_fast,
)
from opacus_pi.integration.filtering import require_filterable
from opacus_pi.integration.group_accountant import GroupAccountant
from opacus_pi.integration.loop_loss import LoopLoss, not_compared
from opacus_pi.integration.monitor import monitor
from opacus_pi.integration.opacus_compat import module_of, patch_memory_manager
from opacus_pi.integration.optimizers import report_updates
from opacus_pi.integration.runs import (
    CurrentRun,
    PreparedRun,
    called_module,
    new_model_probe,
    probe_losses,
    probe_model,
    require_fitting_recorder,
)
from opacus_pi.integration.schedules import user_collate_fn
from opacus_pi.integration.training_states import TrainingStates
from opacus_pi.integration.update import UpdateUnderWay
from opacus_pi.integration.wrong_layers import layers_opacus_gets_wrong, watch_inputs
from opacus_pi.recording import Recorder

if TYPE_CHECKING:
    # The mixin goes before an engine of Opacus in the bases and calls its methods.
    from opacus import PrivacyEngine as OpacusEngine
else:
    OpacusEngine = object

__all__ = ["PerInstanceMixin"]

Method = TypeVar("Method", bound=Callable[..., Any])

_EVALUATION_MODE = "Call module.train() before make_private."
_TRAIN_BATCH_NORM = (
    "To keep such layers, train without clipping: engine.make_monitored(...). To train "
    f"with differential privacy, replace them first: {REPLACE_LAYERS}"
)
# Attributes that are used before anything else of ours.
_PARTS = (
    "recorder",
    "renyi_filter",
    "checks",
    "checkpoints",
    "_preparation",
    "_run",
    "_audited",
)
_NO_BUDGETS = "A RenyiFilter cannot keep budgets here. {reason}"
_NO_BOUND = (
    "make_monitored trains without clipping, so no epsilon holds for every example, "
    "and Opacus's accountant has not counted these updates. With noise, "
    "engine.epsilons(delta) estimates the privacy loss of each example of this data "
    "set; train by make_private for a guarantee."
)
_NOT_COUNTED = (
    "The accountant has counted {} of {} updates, so its epsilon is too small. The "
    "cause is not known: optimizer.attach_step_hook may have replaced the "
    "accountant's own hook (attach one function that calls both hooks), or its "
    "history was changed."
)
_BROKEN = (
    "get_epsilon returns Opacus's number, but it is not a bound for this training. {}"
)
_NOT_POISSON = (
    "get_epsilon returns Opacus's number, which assumes Poisson sampling. This loader "
    "draws otherwise (poisson_sampling=False), so the number is no bound. For a bound, "
    "use accounting.worst_case_loss(engine.ledger.mechanism, order): it is a Rényi "
    "divergence, which accounting.rdp_to_epsilon converts to ε."
)


def _shown_as(original: Any, **options: Any) -> Callable[[Method], Method]:
    """Give a method the signature of Opacus's for ``inspect`` and ``help``.

    Programs and tests that compare signatures, or fill arguments by them, then see no
    difference. Type checkers see the annotations of the method itself, which
    ``functools.wraps`` would replace by a type that cannot be bound to an instance.

    Args:
        original: Opacus's method.
        **options: Options of ``functools.wraps``; ``assigned=()`` keeps the docstring.
    """

    def decorate(method: Method) -> Method:
        return cast(Method, wraps(original, **options)(method))

    return decorate


class PerInstanceMixin(Shown, OpacusEngine):
    """Mixin that makes an engine of Opacus record per-example norms.

    List it before the engine: ``class Mine(PerInstanceMixin, TheirEngine)``.

    Args:
        recorder: How to record. Default: ``Recorder()``, the norms that training
            computes anyway; ``make_monitored`` sweeps by default.
        renyi_filter: Budgets; an example is left out of the updates that would exceed
            its own. Default: none.
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
        self.recorder = Recorder() if recorder is None else recorder
        self.renyi_filter = renyi_filter
        self.checks, self.checkpoints = RunChecks(), Checkpoints()
        self._has_default_recorder = recorder is None
        self._preparation: Preparation | None = None  # within make_private only
        self._run: CurrentRun | None = None  # the run that was prepared last
        self._audited: AuditedRun | None = None  # what an audit of it repeats
        patch_memory_manager(observe_like)

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
    def module(self) -> nn.Module:
        """The module that is being trained, as the user made it.

        Raises:
            AccountingError: If no run was prepared, or the module was deleted: the
                engine does not keep it in memory.
        """
        module = None if self._run is None else self._run.module()
        if module is None:
            raise AccountingError(
                "The engine has no module: none was prepared, it was deleted, or the "
                "engine is a copy, which has no run of its own. Call make_private or "
                "make_monitored, and keep the model that it returns in a variable."
            )
        return module

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
        self._require_begun()
        self.recorder.name_weights()
        reason = self.checks.missing_updates(
            self.recorder.num_steps,
            num_steps_of(self.accountant),
            is_private=self._is_private,
        )
        if reason and self.recorder.chain is not None:
            self.recorder.chain.leave_unchecked("schedule", reason)
        return self.recorder.ledger

    @property
    def attribution(self) -> dict[str, int]:
        """Numbers of samples that were matched to examples, by kind of evidence.

        ``by_storage`` and ``by_content`` are certain. ``by_latest`` is not verified:
        the loop transformed its inputs, and samples are assumed to be in the order of
        the latest batch. ``unattributed`` samples are left out: their examples are
        charged by their other observations, or at the clip norm.
        """
        tracker = Tracker() if self._run is None else self._run.tracker
        return dict(tracker.counts)

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
        losses = accounting.privacy_losses(self._complete_ledger(), order, **options)
        _warn_if_most_are_equal(losses)
        return losses

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
        values = accounting.epsilons(self._complete_ledger(), delta, **options)
        _warn_if_most_are_equal(values)
        return self._at_most_the_worst_case(values, delta)

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
        values = accounting.epsilon_limits(self._complete_ledger(), delta, **options)
        return self._at_most_the_worst_case(values, delta)

    def _at_most_the_worst_case(
        self, values: NDArray[np.float64], delta: float
    ) -> NDArray[np.float64]:
        """Limit epsilons by the accountant's, where that holds for every example."""
        mechanism = self.recorder.ledger.mechanism
        num_counted = num_steps_of(self.accountant)
        if mechanism.sampling == "poisson" and num_counted == mechanism.num_steps:
            # not self.get_epsilon, which a derived class may define in another way
            worst = float(self.accountant.get_epsilon(delta))
            values = np.minimum(values, max(0.0, worst))
        return values

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
        mechanism = self.recorder.ledger.mechanism
        return bound_of(self.accountant, mechanism) if self._is_private else None

    @_shown_as(opacus.PrivacyEngine.get_epsilon, assigned=())
    def get_epsilon(self, delta: float) -> float:
        """Return Opacus's epsilon, which assumes Poisson sampling.

        Warns if batches were not drawn by Poisson sampling, if a link of the chain of
        custody is broken, or if the accountant did not count every update.

        Args:
            delta: Failure probability, in (0, 1).

        Raises:
            AccountingError: After ``make_monitored``: Opacus's accountants do not count
                updates without clipping, for which no epsilon holds.
        """
        if self._run is not None and not self._is_private:
            raise AccountingError(_NO_BOUND)
        if self.recorder.sampling == "fixed" and self._is_private:
            warnings.warn(_NOT_POISSON, stacklevel=2)
        self._warn_of_doubts()
        epsilon: float = super().get_epsilon(delta)
        return epsilon

    def _warn_of_doubts(self) -> None:
        """Warn if Opacus's epsilon is not that of the run that was made."""
        num_made, num_counted = self.recorder.num_steps, num_steps_of(self.accountant)
        if self._is_private and num_counted < num_made:
            warnings.warn(_NOT_COUNTED.format(num_counted, num_made), stacklevel=3)
        refusal = self.recorder.refusal
        if refusal:
            warnings.warn(_BROKEN.format(refusal), stacklevel=3)

    def _complete_ledger(self) -> GradNormLedger:
        """Return the ledger, if it holds every update that was made or counted.

        Raises:
            AccountingError: If updates are missing, or the run cannot be accounted for.
        """
        self._require_begun()
        ledger = self.recorder.ledger  # not self.ledger: its weights need no name
        num_counted = num_steps_of(self.accountant)
        self.checks.require_all_updates(
            ledger, num_counted, is_private=self._is_private
        )
        return ledger

    def _require_begun(self) -> None:
        """Refuse numbers with the reason that is known, if no recording has begun."""
        if not self.recorder.sampling:
            self.checks.require_begun(num_steps_of(self.accountant))

    @property
    def _is_private(self) -> bool:
        """Return whether the last run was prepared by ``make_private``."""
        return self._run is not None and self._run.update is not None

    # --------------------------------------------------------------------- make_private
    def __init_subclass__(cls, **options: Any) -> None:
        """Have a derived class record, whatever it overrides or is mixed with."""
        super().__init_subclass__(**options)
        record_overrides(cls, opacus.PrivacyEngine)

    @_shown_as(opacus.PrivacyEngine.make_private)
    @records
    def make_private(self, **options: Any) -> tuple[Any, ...]:
        """Prepare as Opacus does, after checking the options that Opacus does not have.

        A ``RenyiFilter`` needs a run whose charges can be known, and the fast mode
        supports only some arguments. The error is raised before anything is changed.
        ``help`` shows Opacus's documentation of this method.

        Args:
            **options: The arguments of Opacus.

        Returns:
            What Opacus returns: model, optimizer and loader; in the ghost modes also
            the criterion.

        Raises:
            ValueError: If the filter or the fast mode cannot serve these arguments.
        """
        if self.renyi_filter is not None:
            self._require_budgets(**options)
        if options.get("grad_sample_mode") == FAST_MODE:
            require_fast(**options)
        prepared: tuple[Any, ...] = super().make_private(**options)
        self._audited = audited_run(prepared[-1], recorder=self.recorder, **options)
        return prepared

    @classmethod
    @_shown_as(opacus.PrivacyEngine.get_compatible_module.__func__)
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """Replace layers as Opacus does, and in-place operations as well."""
        compatible: nn.Module = super().get_compatible_module(make_compatible(module))
        return compatible

    # ------------------------------------------------------------------- make_monitored
    def make_monitored(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        noise_std: float,
        criterion: Callable[[Any, Any], torch.Tensor],
        poisson_sampling: bool = True,
        **options: Any,
    ) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
        """Record a training run without clipping: plain SGD, or with noise on the mean.

        ``save_checkpoint`` and ``load_checkpoint(..., restore_rng=True)`` work for this
        training too; pass them the plain module and optimizer.

        Args:
            module: The model, with any layers; returned as it is. May be wrapped in
                ``DistributedDataParallel`` if there is no noise.
            optimizer: Any torch optimizer of its parameters. Norms are over those that
                it holds, whatever their learning rate.
            data_loader: A loader of a data set with a length, yielding ``(x, y)``.
            noise_std: Standard deviation of the noise on the MEAN gradient; 0 for plain
                SGD.
            criterion: Returns one loss per example; a torch loss module will do.
            poisson_sampling: True: batches are drawn by Poisson sampling, as Opacus
                does. False: as the loader draws them.
            **options: Options of ``opacus_pi.integration.monitor.monitor``.

        Returns:
            Module, optimizer, and the loader to iterate over.

        Raises:
            ValueError: If an argument cannot be monitored.

        Source: paper, section 5.1 and Appendix D.
        """
        if self.renyi_filter is not None:
            raise ValueError(
                "make_monitored cannot keep the budgets of renyi_filter, because it "
                "computes no per-example gradients. Use make_private to keep budgets."
            )
        if self.secure_mode:
            options = self._with_secure_generators(options)
        steps_before = self.recorder.num_steps
        if self._has_default_recorder and self.recorder.mode != "swept":
            self.recorder = Recorder("swept")
        tracker = self._new_tracker()
        prepared = monitor(
            recorder=self.recorder,
            tracker=tracker,
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            noise_std=noise_std,
            criterion=criterion,
            poisson_sampling=poisson_sampling,
            **options,
        )
        run_state = RunState(
            prepared[2],
            noise_generator=options.get("noise_generator"),
            is_secure=self.secure_mode,
        )
        run = CurrentRun(tracker, weakref.ref(module), None, run_state)
        self._replace_run(run, steps_before)
        self._audited = audited_run(prepared[-1], recorder=self.recorder)
        return prepared

    def _with_secure_generators(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options in which noise and batches use the engine's secure random numbers."""
        for name in ("noise_generator", "sampling_generator"):
            if options.get(name) is not None:
                raise ValueError(
                    f"{name} was given, but an engine with secure_mode=True draws all "
                    f"random numbers from a secure source. Leave {name} out, or make "
                    "the engine with secure_mode=False."
                )
            options = {**options, name: self.secure_rng}
        return options

    # ---------------------------------------------------------------------------- audit
    def audit(self, criterion: Any, batches: int = 1) -> Audit:
        """Compare the norms that are recorded with gradients of single examples.

        Call it after ``make_private`` or ``make_monitored``, before training or later.
        It takes examples from the data set, trains a copy of the model on them for one
        update, and leaves no trace on the run. ``print`` shows the result as a table.
        What it finds about loss, model, norms and ``collate_fn`` enters the chain of
        custody: the ledger is refused if one of them fails. Of the updates that follow,
        the first and a few later ones are compared with the criterion, so that the
        ledger is also refused if the training loop computes another loss.

        Args:
            criterion: What the training loop calls as ``criterion(model(x), y)``.
            batches: How many batches of at most 32 examples to look at.

        Returns:
            The comparisons; ``.passed`` tells whether none failed.

        Raises:
            AccountingError: If no run is prepared.
            ValueError: If ``grad_sample_mode="no_op"``, or the data set has fewer than
                two examples.
        """
        module, run = self.module, self._audited
        if run is None or run.examples is None:
            raise AccountingError(
                "There is nothing to audit. Call make_private or make_monitored first."
            )
        found = [
            audit_items(module, criterion, items, run=run, new_engine=_auditing_engine)
            for items in run.examples.items(batches)
        ]
        audit = joined(found)
        chain = self.recorder.chain
        if chain is not None:
            if not (audit["loss"].passed and self._compare_loop(criterion, chain)):
                finding_of(audit["loss"]).tell(chain, "loss")
            for name, link in (("model", "model"), ("norms", "norm")):
                finding_of(audit[name]).tell(chain, link)
            tell_of_collate(audit, chain)
        return audit

    def _compare_loop(self, criterion: Any, chain: Chain) -> bool:
        """Have a few updates compared with a criterion that was audited.

        Args:
            criterion: The criterion.
            chain: The chain of custody of the run.

        Returns:
            Whether the link "loss" waits for the loop; False after ``make_monitored``,
            which compares gradients of the loop by itself.
        """
        run, audited = self._run, self._audited
        update = None if run is None or run.update is None else run.update()
        if update is None or audited is None:
            return False
        if audited.is_swept:
            not_compared(chain)
            return True
        num_steps = self.recorder.num_steps
        num_before = 0 if chain.is_checked("loss") else num_steps
        if update.loop_loss is not None:
            update.loop_loss.end()
            if update.loop_loss.num_compared:
                num_before = update.loop_loss.num_before
        if update.has_begun:
            num_before = num_steps + 1
        update.loop_loss = LoopLoss(
            criterion,
            audited,
            update.tracker,
            chain,
            _auditing_engine,
            num_steps=num_steps,
            num_before=num_before,
        )
        update.loop_loss.optimizer = update.optimizer
        update.loop_loss.begin(called_module(update.hooks), self.module)
        return True

    # ---------------------------------------------------------------------- checkpoints
    @_shown_as(opacus.PrivacyEngine.save_checkpoint, assigned=())
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
        filled = checkpoint_dict or {}
        filled.update(
            self.checkpoints.entries(self.recorder, self.renyi_filter, self.accountant)
        )
        save = super().save_checkpoint
        if not isinstance(path, (str, os.PathLike)):
            save(path=path, checkpoint_dict=filled, **options)
            return
        with replacing(path) as file:
            save(path=file, checkpoint_dict=filled, **options)

    @_shown_as(opacus.PrivacyEngine.load_checkpoint, assigned=())
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

        Args:
            restore_rng: Whether to restore the states of all generators (``random``,
                numpy, torch, CUDA, those of loader, sampler and noise), the position in
                the epoch, and the noise multiplier and clip norm that schedules had
                reached. Call ``make_private`` or ``make_monitored`` first.
            **options: Options of Opacus: ``path``, ``module``, ``optimizer``, and more.

        Returns:
            The checkpoint, with your own entries.

        Raises:
            ValueError: If the file has objects that only unpickling can load, or is no
                checkpoint of an engine (nothing is loaded then).
            ValueError: If ``restore_rng`` cannot be done: no run is prepared (nothing
                is loaded then), or the checkpoint has no states, is damaged, or was
                taken at a moment from which a run cannot be resumed exactly; or if a
                ``RenyiFilter`` cannot go on with the budgets that were saved.
        """
        self.checkpoints.require_restorable(restore_rng=restore_rng)
        safe = without_code(options)
        parts = (options["module"], options.get("optimizer"), self.accountant)
        with all_or_nothing(*parts):
            checkpoint: dict[str, Any] = super().load_checkpoint(**safe)
        self.checkpoints.resume(
            checkpoint,
            self.recorder,
            self.renyi_filter,
            module=options["module"],
            accountant=self.accountant,
            restore_rng=restore_rng,
            refuse=self.checks.refuse,
        )
        return checkpoint

    # ------------------------------------------------ what Opacus calls in make_private
    def _prepare_model(
        self, module: nn.Module, **options: Any
    ) -> AbstractGradSampleHooks:
        """Prepare the model as Opacus does, and observe its forward passes.

        What cannot be recorded is refused first: a module that Opacus has prepared
        carries hooks, which would be left behind.
        """
        require_fitting_recorder(self.recorder, module)
        try:
            if options.get("grad_sample_mode") == FAST_MODE:
                hooks = prepare_model(self, module, **options)
            else:
                hooks = super()._prepare_model(module, **options)
        except UnsupportedModuleError as error:
            add_note(error, _TRAIN_BATCH_NORM if module.training else _EVALUATION_MODE)
            raise
        if self._preparation is not None:
            self._preparation.hooks = hooks
        return hooks

    def _prepare_data_loader(
        self, data_loader: DataLoader[Any], **options: Any
    ) -> DataLoader[Any]:
        """Prepare the loader as Opacus does, and note it."""
        loader: DataLoader[Any] = super()._prepare_data_loader(data_loader, **options)
        if self._preparation is not None:
            self._preparation.loader = loader
        return loader

    def _prepare_optimizer(self, **options: Any) -> DPOptimizer:
        """Prepare the optimizer as Opacus does, and note it.

        Opacus attaches the accountant's hook to the optimizer after this.
        """
        optimizer = super()._prepare_optimizer(**options)
        if self._preparation is not None:
            self._preparation.optimizer = optimizer
        return optimizer

    def _prepare_criterion(self, **options: Any) -> Any:
        """Prepare ghost clipping's criterion as Opacus does; its errors get notes."""
        criterion = super()._prepare_criterion(**options)
        if self._preparation is not None:
            self._preparation.criterion = criterion
        explain_ghost_losses(criterion)
        return criterion

    # ----------------------------------------------------------------- begin recording
    def _prepare_and_record(self, prepare: Callable[[], Any]) -> Any:
        """Call a method that prepares a run, and begin recording the run.

        Args:
            prepare: A method of the engine, or of a class derived from it; it may call
                other methods that call this one.

        Returns:
            What ``prepare`` returned.

        Raises:
            ValueError: If there is a filter, and its budgets cannot be kept.
        """
        outer = self._preparation
        if outer is None:
            self._audited = None
        self._preparation = preparation = outer or Preparation()
        try:
            result = prepare()
        finally:
            self._preparation = outer
        if preparation.take(result):
            self._record(preparation)
        reason = preparation.unrecordable(self) if outer is None else None
        if reason is not None and self.renyi_filter is not None:
            raise ValueError(_NO_BUDGETS.format(reason=reason))
        if reason is not None:
            warnings.warn(f"This run has no ledger. {reason}", stacklevel=3)
            self.checks.refuse(reason)
        return result

    def _record(self, preparation: Preparation) -> None:
        """Record a run, or refuse its numbers if it clips in a way that is not known.

        Args:
            preparation: Model, optimizer and loader of the run.
        """
        hooks: Any = preparation.hooks
        optimizer: Any = preparation.optimizer
        loader: Any = preparation.loader
        own_rule = preparation.own_rule()
        if self.renyi_filter is not None:
            if own_rule is not None:
                raise ValueError(_NO_BUDGETS.format(reason=own_rule))
            self._require_budgets(**preparation.options())
        require_fitting_recorder(self.recorder, module_of(hooks))
        tracker = self._new_tracker(batch_first=hooks.batch_first)
        model_probe = new_model_probe(
            self.recorder, hooks, batch_first=hooks.batch_first
        )
        run = PreparedRun(hooks, tracker, loader, optimizer, model_probe)
        probe_model(hooks, tracker, model_probe, run.loss_probe)
        explain_in_place(hooks)
        is_own_collate = not keeps_order(user_collate_fn(loader))
        observe(loader, tracker, follow_items=is_own_collate)
        if isinstance(hooks, FastHooks):
            clip_from_cache(optimizer, hooks)
        run_state = RunState(
            loader,
            optimizer=optimizer,
            noise_generator=optimizer.generator,
            is_secure=self.secure_mode,
        )
        run.training = TrainingStates(run.module, optimizer, run_state)
        update = self._begin(run, run_state)
        for reason in filter(None, [own_rule, *layers_opacus_gets_wrong(hooks)]):
            update.chain.break_link("norm", reason)
        watch_inputs(hooks, update.chain)
        if preparation.criterion is not None:
            probe_losses(preparation.criterion, update.chain, tracker)
        if self._audited is None:  # a derived class has not called our make_private
            self._audited = audited_run(
                loader,
                recorder=self.recorder,
                grad_sample_mode=preparation.options()["grad_sample_mode"],
                loss_reduction=hooks.loss_reduction,
                batch_first=hooks.batch_first,
            )
        if own_rule is None:  # else training goes on without any of our code in it
            report_updates(optimizer, update)

    def _require_budgets(self, **options: Any) -> None:
        """Begin the filter, if its budgets can be kept with these arguments.

        Args:
            **options: Those of ``make_private``.
        """
        renyi_filter = cast(RenyiFilter, self.renyi_filter)
        require_filterable(self, **options)
        data_set = options["data_loader"].dataset
        renyi_filter.begin(len(data_set), fingerprint(data_set))

    def _new_tracker(self, *, batch_first: bool = True) -> Tracker:
        """A tracker with the recorder's options."""
        verify, strict = self.recorder.verify, self.recorder.strict
        return Tracker(verify=verify, strict=strict, batch_first=batch_first)

    def _begin(self, run: PreparedRun, run_state: RunState) -> UpdateUnderWay:
        """Begin recording a run that Opacus has prepared."""
        recorder = self.recorder
        steps_before = recorder.num_steps
        try:
            run.begin_record(recorder)
        except ValueError as error:  # what was loaded is of another run
            self.checks.add(str(error))
        run.begin_chain(self)
        update = run.first_update(recorder, self.renyi_filter)
        module = weakref.ref(run.module)
        current = CurrentRun(run.tracker, module, weakref.ref(update), run_state)
        self._replace_run(current, steps_before)
        if isinstance(self.accountant, PerInstanceAccountant | GroupAccountant):
            self.accountant.follow(recorder)
        return update

    def _replace_run(self, run: CurrentRun, steps_before: int) -> None:
        """Make a run that was prepared the one that the engine answers for.

        An optimizer of an earlier run may still be used. Its updates are then no longer
        recorded, and the ledger is refused.

        Args:
            run: The run, whose recording has begun.
            steps_before: Updates that the recorder had recorded before that.
        """
        earlier = None if self._run is None else self._run.update
        update = None if earlier is None else earlier()
        if update is not None:
            update.is_superseded = True
        self._run = run
        self.checkpoints.run_state = run.run_state
        self.checks.begin(self.recorder, steps_before=steps_before)


class _AuditingEngine(PerInstanceMixin, opacus.PrivacyEngine):
    """The engine with which an audit trains a copy of the model."""


def _auditing_engine(recorder: Recorder) -> _AuditingEngine:
    """Return an engine that reports to a recorder, and to nothing else."""
    return _AuditingEngine(recorder=recorder)


def _warn_if_most_are_equal(values: NDArray[np.float64]) -> None:
    """Warn if most examples share the largest value.

    Sorting such values would only reproduce the order of the data set.
    """
    num_equal = num_at_top(values)
    if 1 < num_equal and len(values) < 2 * num_equal:
        warnings.warn(
            f"{num_equal} of {len(values)} examples share the largest value, that of "
            "an example that is clipped in every update. Estimates above it are cut to "
            "it, so these examples cannot be distinguished. Use a larger max_grad_norm "
            "with a smaller learning rate, or a lower order.",
            stacklevel=3,
        )
