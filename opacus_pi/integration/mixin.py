"""A mixin that makes any engine of Opacus record each example's gradient norms.

``make_private`` stays Opacus's. The methods that it calls to prepare model, loader and
optimizer are overridden: each lets Opacus prepare the object and notes it
(``opacus_compat.OVERRIDDEN_METHODS`` lists them). When all are there, a ``PreparedRun``
(``runs``) has them observed. From then on the optimizer reports its updates by itself
(``optimizers``, ``update``), and the engine only answers questions about what was
recorded.

The engine owns its parts (``recorded_engine``), and its methods hand over to them.
This file says how a run comes to be; what may be asked about it is said there.
"""

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import opacus
import torch
from opacus.grad_sample import AbstractGradSampleHooks
from opacus.optimizers import DPOptimizer
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.utils.data import DataLoader

from opacus_pi.integration.accountants import PerInstanceAccountant
from opacus_pi.integration.audit import Audit
from opacus_pi.integration.audited_run import audited_run
from opacus_pi.integration.checkpoints import RunState
from opacus_pi.integration.compatible import make_compatible
from opacus_pi.integration.derived import (
    Preparation,
    record_overrides,
    records,
    shown_as,
)
from opacus_pi.integration.explanations import (
    REPLACE_LAYERS,
    add_note,
    explain_ghost_losses,
)
from opacus_pi.integration.fast import MODE as FAST_MODE
from opacus_pi.integration.fast import prepare_model, require_fast
from opacus_pi.integration.filtering import NO_BUDGETS, begin_budgets
from opacus_pi.integration.first_batch import explain_first_batch
from opacus_pi.integration.group_accountant import GroupAccountant
from opacus_pi.integration.missing_values import require_given
from opacus_pi.integration.misspelt_options import misspelt
from opacus_pi.integration.monitor import monitor
from opacus_pi.integration.opacus_compat import module_of
from opacus_pi.integration.recorded_engine import RecordedEngine
from opacus_pi.integration.run_audit import audit_run
from opacus_pi.integration.runs import (
    CurrentRun,
    PreparedRun,
    new_tracker,
    require_fitting_recorder,
)
from opacus_pi.integration.schedules import replaced_sampler
from opacus_pi.recording import Recorder

__all__ = ["PerInstanceMixin"]

_EVALUATION_MODE = "Call module.train() before make_private."
_TRAIN_BATCH_NORM = (
    "To keep such layers, train without clipping: engine.make_monitored(...). To train "
    f"with differential privacy, replace them first: {REPLACE_LAYERS}"
)


class PerInstanceMixin(RecordedEngine):
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

    # --------------------------------------------------------------------- make_private
    def __init_subclass__(cls, **options: Any) -> None:
        """Have a derived class record, whatever it overrides or is mixed with."""
        super().__init_subclass__(**options)
        record_overrides(cls, opacus.PrivacyEngine)

    @shown_as(opacus.PrivacyEngine.make_private)
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
            TypeError: If an argument without which nothing can be prepared is ``None``.
            ValueError: If the filter or the fast mode cannot serve these arguments.

        Warns:
            UserWarning: If an option resembles one that it has, and is ignored.
        """
        require_given("make_private", options)
        if self.renyi_filter is not None:
            begin_budgets(self.renyi_filter, self, **options)
        if options.get("grad_sample_mode") == FAST_MODE:
            require_fast(**options)
        for name, meant in misspelt(options, type(self)).items():
            warnings.warn(
                f"make_private has no option {name}, and ignores it as Opacus does. "
                f"Did you mean {meant}?",
                stacklevel=5,  # the caller, before two functions that record
            )
        prepared: tuple[Any, ...] = super().make_private(**options)
        self._preparing.asked = options
        return prepared

    @shown_as(opacus.PrivacyEngine.make_private_with_epsilon)
    @records
    def make_private_with_epsilon(self, **options: Any) -> tuple[Any, ...]:
        """Prepare as Opacus does, after checking that no argument is missing.

        Args:
            **options: The arguments of Opacus.

        Returns:
            As ``make_private``, which Opacus calls.

        Raises:
            TypeError: If an argument without which nothing can be prepared is ``None``.
            ValueError: As ``make_private``.
        """
        require_given("make_private_with_epsilon", options)
        prepared: tuple[Any, ...] = super().make_private_with_epsilon(**options)
        return prepared

    @classmethod
    @shown_as(opacus.PrivacyEngine.get_compatible_module.__func__)
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
            TypeError: If module, optimizer or data loader is ``None``.
            ValueError: If an argument cannot be monitored.

        Source: paper, section 5.1 and Appendix D.
        """
        prepared_from = {"module": module, "optimizer": optimizer}
        require_given("make_monitored", prepared_from | {"data_loader": data_loader})
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
        tracker = new_tracker(self.recorder)
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
        audited = audited_run(prepared[-1], recorder=self.recorder)
        run = CurrentRun(tracker, weakref.ref(module), None, run_state, audited)
        self._replace_run(run, steps_before)
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
        It takes examples from the data set and trains a copy of the model on them for
        one update. Training goes on as it would have without an audit: the criterion
        and the ``collate_fn`` are copied, too, and random states are put back. What
        cannot be put back is what reading an item changes in the data set (a generator
        of NumPy or Python of its own, a counter), and the state of a ``collate_fn`` or
        a criterion that cannot be copied. ``print`` shows the result as a table.
        What it finds about loss, model, norms and ``collate_fn`` enters the chain of
        custody: the ledger is refused if one of them fails. Of the updates that follow,
        the first and a few later ones are compared with the criterion, so that the
        ledger is also refused if the training loop computes another loss. So are those
        whose batch has labels that the criterion ignores. A criterion that is not one
        of torch's losses may couple examples in other batches only, so the link "loss"
        stays unchecked for it. Differences of less than 0.001 (0.01 on an accelerator),
        relative, count as rounding, and a coupling as weak as that is not found.

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
        return audit_run(
            self._run,
            self.module,
            criterion,
            batches,
            recorder=self.recorder,
            new_engine=_auditing_engine,
        )

    # ------------------------------------------------ what Opacus calls in make_private
    @property
    def _preparing(self) -> Preparation:
        """The run that is being prepared; outside ``make_private`` nothing reads it."""
        return self._preparation or Preparation()

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
        self._preparing.hooks = hooks
        return hooks

    def _prepare_data_loader(
        self, data_loader: DataLoader[Any], **options: Any
    ) -> DataLoader[Any]:
        """Prepare the loader as Opacus does, and note it.

        Warns if Poisson sampling replaces a sampler that draws otherwise. An empty
        first batch is explained when it is drawn.
        """
        loader: DataLoader[Any] = super()._prepare_data_loader(data_loader, **options)
        if options.get("poisson_sampling"):
            replaced = replaced_sampler(data_loader)
            if replaced is not None:
                warnings.warn(replaced, stacklevel=7)
        explain_first_batch(loader)
        self._preparing.loader = loader
        return loader

    def _prepare_optimizer(self, **options: Any) -> DPOptimizer:
        """Prepare the optimizer as Opacus does, and note it.

        Opacus attaches the accountant's hook to the optimizer after this.
        """
        optimizer = super()._prepare_optimizer(**options)
        self._preparing.optimizer = optimizer
        return optimizer

    def _prepare_criterion(self, **options: Any) -> Any:
        """Prepare ghost clipping's criterion as Opacus does; its errors get notes."""
        criterion = super()._prepare_criterion(**options)
        self._preparing.criterion = criterion
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
        self._preparation = preparation = outer or Preparation()
        try:
            result = prepare()
        finally:
            self._preparation = outer
        if preparation.take(result):
            self._record(preparation)
        reason = preparation.unrecordable(self) if outer is None else None
        if reason is not None and self.renyi_filter is not None:
            raise ValueError(NO_BUDGETS.format(reason=reason))
        if reason is not None:
            warnings.warn(f"This run has no ledger. {reason}", stacklevel=3)
            self.checks.refuse(reason)
        return result

    def _record(self, preparation: Preparation) -> None:
        """Record a run, or refuse its numbers if it clips in a way that is not known.

        Args:
            preparation: Model, optimizer and loader of the run.
        """
        recorder = self.recorder
        if self.renyi_filter is not None:
            own_rule = preparation.own_rule()
            if own_rule is not None:
                raise ValueError(NO_BUDGETS.format(reason=own_rule))
            begin_budgets(self.renyi_filter, self, **preparation.options())
        require_fitting_recorder(recorder, module_of(preparation.hooks))
        run = PreparedRun(preparation, recorder, is_secure=self.secure_mode)
        run_state, steps_before = run.observe(), recorder.num_steps
        try:
            run.begin_record(recorder, run_state)
        except ValueError as error:  # what was loaded is of another run
            self.checks.add(str(error))
        run.begin_chain(self)
        update = run.first_update(recorder, self.renyi_filter)
        engine = weakref.ref(self)
        update.accountant = lambda: getattr(engine(), "accountant", None)
        current = CurrentRun(
            run.tracker,
            weakref.ref(run.module),
            weakref.ref(update),
            run_state,
            run.audited(recorder),
        )
        self._replace_run(current, steps_before)
        if isinstance(self.accountant, PerInstanceAccountant | GroupAccountant):
            self.accountant.follow(recorder)
        run.report_to(update)

    def _replace_run(self, run: CurrentRun, steps_before: int) -> None:
        """Make a run that was prepared the one that the engine answers for.

        An optimizer of an earlier run may still be used. Its updates are then no longer
        recorded, and the ledger is refused.

        Args:
            run: The run, whose recording has begun.
            steps_before: Updates that the recorder had recorded before that.
        """
        update = None if self._run is None else self._run.present_update()
        if update is not None:
            update.is_superseded = True
        before, self._run = self._run, run
        self.checkpoints.begin(run.run_state, run.tracker)
        self.checks.begin(
            self.recorder,
            run.module,
            steps_before=steps_before,
            were_counted=before is None or before.is_private,
        )
        self.recorder.refuse_while(self._missing_updates)


class _AuditingEngine(PerInstanceMixin, opacus.PrivacyEngine):
    """The engine with which an audit trains a copy of the model."""


def _auditing_engine(recorder: Recorder) -> _AuditingEngine:
    """Return an engine that reports to a recorder, and to nothing else."""
    return _AuditingEngine(recorder=recorder)
