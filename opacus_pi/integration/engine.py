"""Opacus's ``PrivacyEngine`` that also records each example's gradient norms.

Change the import and nothing else: training, its random numbers and ``get_epsilon``
stay Opacus's. Afterwards ``engine.ledger`` holds the record of the run, and
``engine.privacy_losses`` and ``engine.epsilons`` compute each example's privacy loss
from it.

>>> import torch
>>> from torch import nn
>>> from torch.utils.data import DataLoader, TensorDataset
>>> _ = torch.manual_seed(0)
>>> data = TensorDataset(torch.randn(8, 2), torch.randint(0, 2, (8,)))
>>> net = nn.Linear(2, 2)
>>> engine = PrivacyEngine(accountant="rdp")
>>> model, optimizer, loader = engine.make_private(
...     module=net,
...     optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
...     data_loader=DataLoader(data, batch_size=4),
...     noise_multiplier=1.0,
...     max_grad_norm=1.0,
... )
>>> for x, y in loader:
...     optimizer.zero_grad()
...     nn.functional.cross_entropy(model(x), y).backward()
...     optimizer.step()
>>> engine.ledger.num_examples
8

How it works: ``make_private`` is Opacus's. The methods that it calls to prepare model,
loader and optimizer are overridden; each lets Opacus prepare the object and then has it
observed (``opacus_compat.OVERRIDDEN_METHODS`` lists them). From then on the optimizer
reports its updates by itself (``optimizers`` and ``update``); the engine only answers
questions.
"""

import os
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast, overload

import numpy as np
import opacus
import torch
from numpy.typing import NDArray
from opacus.grad_sample import AbstractGradSampleHooks, AbstractGradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from opacus_pi import accounting
from opacus_pi._errors import AccountingError
from opacus_pi._validate import expect
from opacus_pi.accounting import GradNormLedger, RenyiFilter, fingerprint
from opacus_pi.attribution import Tracker, probe, watch, watch_memory_manager
from opacus_pi.attribution.loader_position import follow_memory_manager
from opacus_pi.difficulty.forget_sets import num_at_top
from opacus_pi.files.atomic_file import replacing
from opacus_pi.integration.accountants import PerInstanceAccountant, num_steps_of
from opacus_pi.integration.checkpoints import Checkpoints, RunState
from opacus_pi.integration.checks import (
    OutsideChanges,
    RunChecks,
    batch_norms,
    clipping_without_effect,
)
from opacus_pi.integration.compatible import (
    OUT_OF_PLACE,
    add_note,
    explain_in_place,
    make_compatible,
)
from opacus_pi.integration.explanations import explain_ghost_losses
from opacus_pi.integration.fast import MODE as FAST_MODE
from opacus_pi.integration.fast import (
    FastHooks,
    clip_from_cache,
    prepare_model,
    require_fast,
)
from opacus_pi.integration.filtering import FilterGate, require_filterable
from opacus_pi.integration.monitor import monitor
from opacus_pi.integration.opacus_compat import DISTRIBUTED, module_of
from opacus_pi.integration.optimizers import report_updates
from opacus_pi.integration.schedules import (
    is_poisson,
    overlapping,
    unknown_schedule,
    user_collate_fn,
)
from opacus_pi.integration.update import UpdateUnderWay
from opacus_pi.models.batches import size_of
from opacus_pi.models.losses import Criterion
from opacus_pi.recording import Recorder
from opacus_pi.recording.last_weights import LastWeights
from opacus_pi.recording.processes import Processes
from opacus_pi.recording.shared_sweep import shared_sweep

if TYPE_CHECKING:
    # The mixin goes before an engine of Opacus in the bases and calls its methods.
    from opacus import PrivacyEngine as OpacusEngine
else:
    OpacusEngine = object

__all__ = ["PerInstanceMixin", "PrivacyEngine"]

Method = TypeVar("Method", bound=Callable[..., Any])
Hooks: TypeAlias = AbstractGradSampleModule | AbstractGradSampleHooks
Prepared: TypeAlias = tuple[Hooks, DPOptimizer, DataLoader[Any]]
PreparedGhost: TypeAlias = tuple[
    Hooks, DPOptimizer, DPLossFastGradientClipping, DataLoader[Any]
]

_TRAIN_BATCH_NORM = (
    "To keep such layers, train without clipping: engine.make_monitored(...). To train "
    f"with differential privacy, replace them first: {OUT_OF_PLACE}"
)
_NO_BOUND = (
    "make_monitored trains without clipping, so no epsilon holds for every example, "
    "and Opacus's accountant has not counted these updates. With noise, "
    "engine.epsilons(delta) estimates the privacy loss of each example of this data "
    "set; train by make_private for a guarantee."
)
_NOT_POISSON = (
    "get_epsilon is Opacus's number, and assumes Poisson sampling. This loader draws "
    "otherwise (poisson_sampling=False), so it is no bound. engine.epsilons accounts "
    "for the sampling that was done."
)


def _shown_as(original: Any, **options: Any) -> Callable[[Method], Method]:
    """Give a method the signature of Opacus's for ``inspect`` and ``help``.

    Type checkers see the annotations of the method itself, which ``functools.wraps``
    would replace by a type that cannot be bound to an instance.
    """

    def decorate(method: Method) -> Method:
        return cast(Method, wraps(original, **options)(method))

    return decorate


@dataclass
class _Preparation:
    """What ``make_private`` has prepared so far: the model, then the loader."""

    hooks: AbstractGradSampleHooks
    tracker: Tracker
    loader: DataLoader[Any] | None = None


def _no_module() -> None:
    """Stand in for a reference to a module before there is one."""


def _no_update() -> None:
    """Stand in for a reference to updates, which only a private run has."""


class PerInstanceMixin(OpacusEngine):
    """Makes an engine of Opacus a recording one; goes before it in the bases.

    Args:
        recorder: How to record. Default: ``Recorder()``, the norms that training
            computes anyway; ``make_monitored`` sweeps by default.
        renyi_filter: Budgets; an example is left out of the updates that would exceed
            its own. Default: none.
        **opacus_options: The engine's own options.

    Attributes:
        recorder: Writes the ledger.
        renyi_filter: The budgets, if there are any.
        checks: Collects the reasons why the numbers of a run cannot be given.
        checkpoints: What is added to Opacus's checkpoints.
    """

    def __init__(
        self,
        *,
        recorder: Recorder | None = None,
        renyi_filter: RenyiFilter | None = None,
        **opacus_options: Any,
    ) -> None:
        super().__init__(**opacus_options)
        self.recorder = Recorder() if recorder is None else recorder
        self.renyi_filter = renyi_filter
        self.checks, self.checkpoints = RunChecks(), Checkpoints()
        self._has_default_recorder = recorder is None
        # The run that was prepared last. Models and optimizers are the user's: the
        # engine does not keep them in memory.
        self._tracker = Tracker()
        self._module: Callable[[], nn.Module | None] = _no_module
        self._update: Callable[[], UpdateUnderWay | None] = _no_update
        self._preparation: _Preparation | None = None
        watch_memory_manager()
        follow_memory_manager()

    # ---------------------------------------------------------------- what was recorded
    @property
    def module(self) -> nn.Module:
        """The module that is being trained, as the user made it.

        Raises:
            AccountingError: If no run was prepared, or the module was deleted: the
                engine does not keep it in memory.
        """
        module = self._module()
        if module is None:
            raise AccountingError(
                "The engine has no module: none was prepared, or it was deleted. Call "
                "make_private or make_monitored, and keep the model."
            )
        return module

    @property
    def ledger(self) -> GradNormLedger:
        """The record up to now. It is sensitive: it shows which examples are unusual.

        It names the weights that the last update left, by a hash of the model's state
        dict, so that ``Unlearner`` can check that a model has these weights.

        Raises:
            AccountingError: If nothing was recorded, or the run cannot be accounted;
                the message says why.
        """
        self.recorder.name_weights()
        return self.recorder.ledger

    @property
    def attribution(self) -> dict[str, int]:
        """How many samples were matched to examples, by kind of evidence.

        ``by_storage`` and ``by_content`` are certain. ``by_latest`` is not verified:
        the loop transformed its inputs, and samples are assumed to be in the order of
        the latest batch. ``unattributed`` samples are left out: their examples are
        charged by their other observations, or at the clip norm.
        """
        return dict(self._tracker.counts)

    def privacy_losses(self, order: float, **options: Any) -> NDArray[np.float64]:
        """Return each example's Rényi privacy loss of the run.

        Warns if most examples share the largest value.

        Args:
            order: Rényi order, above 1.
            **options: Options of ``opacus_pi.accounting.privacy_losses``.

        Returns:
            float64 ``(n,)``.

        Raises:
            AccountingError: If the run, or a part of it, cannot be accounted.
        """
        losses = accounting.privacy_losses(self._complete_ledger(), order, **options)
        _warn_if_most_are_equal(losses)
        return losses

    def epsilons(self, delta: float) -> NDArray[np.float64]:
        """Return each example's epsilon at ``delta``, estimated from recorded norms.

        With clipping and Poisson sampling no value exceeds ``max(0,
        get_epsilon(delta))``, which holds for every example. With the user's own loader
        (``poisson_sampling=False``) that number assumes a sampling that was not done,
        so the values are not limited by it. Without clipping (``make_monitored``) no
        bound holds for every example, and without noise there is no epsilon.

        Warns if most examples share the largest value.

        Args:
            delta: Failure probability, in (0, 1).

        Returns:
            float64 ``(n,)``.

        Raises:
            AccountingError: If the run, or a part of it, cannot be accounted.
        """
        ledger = self._complete_ledger()
        values = accounting.epsilons(ledger, delta)
        _warn_if_most_are_equal(values)
        mechanism = ledger.mechanism
        num_counted = num_steps_of(self.accountant)
        if mechanism.sampling == "poisson" and num_counted == mechanism.num_steps:
            worst = float(self.get_epsilon(delta))
            values = np.minimum(values, max(0.0, worst))
        return values

    @_shown_as(opacus.PrivacyEngine.get_epsilon, assigned=())
    def get_epsilon(self, delta: float) -> float:
        """Return Opacus's epsilon, which assumes Poisson sampling.

        Warns if another sampling was done.

        Args:
            delta: Failure probability, in (0, 1).

        Raises:
            AccountingError: After ``make_monitored``: Opacus's accountants do not count
                updates without clipping, for which no epsilon holds.
        """
        if self._has_begun and not self._is_private:
            raise AccountingError(_NO_BOUND)
        if self.recorder.sampling == "fixed" and self._is_private:
            warnings.warn(_NOT_POISSON, stacklevel=2)
        epsilon: float = super().get_epsilon(delta)
        return epsilon

    def _complete_ledger(self) -> GradNormLedger:
        """The ledger, if it holds every update that was made or counted."""
        ledger = self.recorder.ledger  # not self.ledger: its weights need no name
        num_counted = num_steps_of(self.accountant)
        self.checks.require_all_updates(
            ledger, num_counted, is_private=self._is_private
        )
        return ledger

    @property
    def _has_begun(self) -> bool:
        """Whether a run has been prepared."""
        return self.checkpoints.run_state is not None

    @property
    def _is_private(self) -> bool:
        """Whether the last run was prepared by ``make_private``."""
        return self._update is not _no_update

    # --------------------------------------------------------------------- make_private
    @overload
    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = ...,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | list[float],
        batch_first: bool = ...,
        loss_reduction: str = ...,
        poisson_sampling: bool = ...,
        clipping: str = ...,
        noise_generator: torch.Generator | None = ...,
        grad_sample_mode: Literal["ghost", "ghost_fsdp", "ghost_tp"],
        wrap_model: bool = ...,
        rand_on_empty: bool = ...,
        **kwargs: Any,
    ) -> PreparedGhost: ...

    @overload
    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = ...,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | list[float],
        batch_first: bool = ...,
        loss_reduction: str = ...,
        poisson_sampling: bool = ...,
        clipping: str = ...,
        noise_generator: torch.Generator | None = ...,
        grad_sample_mode: str = ...,
        wrap_model: bool = ...,
        rand_on_empty: bool = ...,
        **kwargs: Any,
    ) -> Prepared: ...

    @_shown_as(opacus.PrivacyEngine.make_private)
    def make_private(self, **options: Any) -> Prepared | PreparedGhost:
        """Prepare as Opacus does, once it is clear that budgets can be kept.

        Opacus's documentation is shown by ``help``. ``grad_sample_mode="fast"`` is
        available too; the ghost modes return four objects, the others three.
        """
        if self.renyi_filter is not None:
            require_filterable(self, **options)
            data_set = options["data_loader"].dataset
            self.renyi_filter.begin(len(data_set), fingerprint(data_set))
        if options.get("grad_sample_mode") == FAST_MODE:
            require_fast(**options)
        prepared: Prepared | PreparedGhost = super().make_private(**options)
        return prepared

    @overload
    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = ...,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | list[float],
        batch_first: bool = ...,
        loss_reduction: str = ...,
        poisson_sampling: bool = ...,
        clipping: str = ...,
        noise_generator: torch.Generator | None = ...,
        grad_sample_mode: Literal["ghost", "ghost_fsdp", "ghost_tp"],
        wrap_model: bool = ...,
        **kwargs: Any,
    ) -> PreparedGhost: ...

    @overload
    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = ...,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | list[float],
        batch_first: bool = ...,
        loss_reduction: str = ...,
        poisson_sampling: bool = ...,
        clipping: str = ...,
        noise_generator: torch.Generator | None = ...,
        grad_sample_mode: str = ...,
        wrap_model: bool = ...,
        **kwargs: Any,
    ) -> Prepared: ...

    @_shown_as(opacus.PrivacyEngine.make_private_with_epsilon)
    def make_private_with_epsilon(self, **options: Any) -> Prepared | PreparedGhost:
        """Find the noise for a target as Opacus does, which calls ``make_private``."""
        prepared: Prepared | PreparedGhost
        prepared = super().make_private_with_epsilon(**options)
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
        """Record a training without clipping: plain SGD, or with noise on the mean.

        ``save_checkpoint`` and ``load_checkpoint(..., restore_rng=True)`` work for this
        training too; pass them the plain module and optimizer.

        Args:
            module: The model, with any layers; returned as it is. May be wrapped in
                ``DistributedDataParallel`` if there is no noise.
            optimizer: Any torch optimizer of its parameters.
            data_loader: A loader of a data set with a length, yielding ``(x, y)``.
            noise_std: Standard deviation of the noise on the MEAN gradient; 0 for plain
                SGD.
            criterion: Returns one loss per example; a torch loss module will do.
            poisson_sampling: Whether batches are drawn as Opacus does, or as the
                loader does.
            **options: Options of ``opacus_pi.integration.monitor.monitor``.

        Returns:
            Module, optimizer, and the loader to iterate over.

        Raises:
            ValueError: If an argument cannot be monitored.

        Source: paper, section 5.1 and Appendix D.
        """
        expect(
            self.renyi_filter is None,
            "renyi_filter",
            self.renyi_filter,
            "to be None: a monitored training has no per-example gradients",
            "Use make_private to keep budgets.",
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
        self._replace_run(tracker, module, _no_update, run_state, steps_before)
        return prepared

    def _with_secure_generators(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options in which noise and batches use the engine's secure random numbers."""
        for name in ("noise_generator", "sampling_generator"):
            expect(
                options.get(name) is None,
                name,
                options.get(name),
                "to be None: the engine's secure_mode draws from a secure source",
                "Leave it out, or make the engine with secure_mode=False.",
            )
            options = {**options, name: self.secure_rng}
        return options

    # ---------------------------------------------------------------------- checkpoints
    @_shown_as(opacus.PrivacyEngine.save_checkpoint, assigned=())
    def save_checkpoint(
        self,
        *,
        path: Any,
        checkpoint_dict: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Save as Opacus does, with record and random states under a key of its own.

        Opacus's engine can load the checkpoint too. After ``make_monitored``, pass the
        plain module and optimizer. In a distributed run in which every process has a
        record of its own, each process saves a file of its own.

        Args:
            path: A file name, or a file object. A named file is replaced only when the
                new one is complete, so an interrupted process leaves the earlier
                checkpoint.
            checkpoint_dict: Entries of your own (epoch, schedules); filled in place.
            **options: Options of Opacus: ``module``, ``optimizer``, and more.
        """
        filled = checkpoint_dict or {}
        filled.update(self.checkpoints.entries(self.recorder, self.renyi_filter))
        save = super().save_checkpoint
        if not isinstance(path, (str, os.PathLike)):
            save(path=path, checkpoint_dict=filled, **options)
            return
        with replacing(path) as temporary:
            save(path=temporary, checkpoint_dict=filled, **options)

    @_shown_as(opacus.PrivacyEngine.load_checkpoint, assigned=())
    def load_checkpoint(
        self, *, restore_rng: bool = False, **options: Any
    ) -> dict[str, Any]:
        """Load as Opacus does, and continue the record if the checkpoint has one.

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
            ValueError: If ``restore_rng`` cannot be done: no run is prepared (nothing
                is loaded then), or the checkpoint has no states, is damaged, or was
                taken at a moment from which a run cannot be resumed exactly; or if a
                ``RenyiFilter`` cannot go on with the budgets that were saved.
        """
        self.checkpoints.require_restorable(restore_rng=restore_rng)
        checkpoint: dict[str, Any] = super().load_checkpoint(**options)
        self.checkpoints.resume(
            checkpoint,
            self.recorder,
            self.renyi_filter,
            num_steps=num_steps_of(self.accountant),
            restore_rng=restore_rng,
            refuse=self.checks.refuse,
        )
        return checkpoint

    # ------------------------------------------------ what Opacus calls in make_private
    def _prepare_model(
        self, module: nn.Module, **options: Any
    ) -> AbstractGradSampleHooks:
        self._require_fitting_recorder(module)
        try:
            if options.get("grad_sample_mode") == FAST_MODE:
                hooks = prepare_model(self, module, **options)
            else:
                hooks = super()._prepare_model(module, **options)
        except UnsupportedModuleError as error:
            add_note(error, _TRAIN_BATCH_NORM)
            raise
        tracker = self._new_tracker(batch_first=options.get("batch_first", True))
        probe(hooks, tracker)
        explain_in_place(hooks)
        self._preparation = _Preparation(hooks, tracker)
        return hooks

    def _prepare_data_loader(
        self, data_loader: DataLoader[Any], **options: Any
    ) -> DataLoader[Any]:
        loader: DataLoader[Any] = super()._prepare_data_loader(data_loader, **options)
        if self._preparation is not None:
            watch(loader, self._preparation.tracker)
            self._preparation.loader = loader
        return loader

    def _prepare_optimizer(self, **options: Any) -> DPOptimizer:
        optimizer = super()._prepare_optimizer(**options)
        preparation, self._preparation = self._preparation, None
        if preparation is None:
            return optimizer
        if isinstance(preparation.hooks, FastHooks):
            clip_from_cache(optimizer, preparation.hooks)
        if preparation.loader is not None:
            run_state = RunState(
                preparation.loader,
                optimizer=optimizer,
                noise_generator=optimizer.generator,
                is_secure=self.secure_mode,
            )
            update = self._begin(preparation, preparation.loader, run_state)
            report_updates(optimizer, update)
        return optimizer

    def _prepare_criterion(self, **options: Any) -> Any:
        criterion = super()._prepare_criterion(**options)
        explain_ghost_losses(criterion)
        return criterion

    # --------------------------------------------------------------- beginning a record
    def _require_fitting_recorder(self, module: nn.Module) -> None:
        """Refuse a recorder that cannot record this module, before it is changed."""
        recorder = self.recorder
        expect(
            recorder.mode != "swept" or recorder.criterion is not None,
            "Recorder(criterion=...)",
            None,
            "to be given: a swept recorder computes losses itself",
            'Pass Recorder("swept", criterion=nn.CrossEntropyLoss()).',
        )
        expect(
            not isinstance(module, FSDPModule)
            or (recorder.mode == "observed" and recorder.weights_dir is None),
            "Recorder",
            "one that sweeps or keeps weights",
            "to observe norms: no process has the weights of an FSDP module",
            "Use Recorder() without weights_dir, or DistributedDataParallel.",
        )

    def _new_tracker(self, *, batch_first: bool = True) -> Tracker:
        """A tracker with the recorder's options."""
        verify, strict = self.recorder.verify, self.recorder.strict
        return Tracker(verify=verify, strict=strict, batch_first=batch_first)

    def _begin(
        self,
        preparation: _Preparation,
        loader: DataLoader[Any],
        run_state: RunState,
    ) -> UpdateUnderWay:
        """Begin the record of a run that Opacus has prepared."""
        recorder, hooks = self.recorder, preparation.hooks
        module, tracker = module_of(hooks), preparation.tracker
        is_distributed = isinstance(module, DISTRIBUTED)
        processes = Processes() if is_distributed else None
        steps_before = recorder.num_steps
        try:
            self._begin_recorder(module, loader, processes)
        except ValueError as error:  # the record that was loaded is of another run
            self.checks.add(str(error))
        self.checks.add(clipping_without_effect(self))
        self.checks.add(unknown_schedule(loader))
        if processes is not None:
            self.checks.add(overlapping(loader, processes.size))
        update = UpdateUnderWay(recorder, tracker, hooks, sample_rate=1 / len(loader))
        if self.renyi_filter is not None:
            update.gate = FilterGate(self.renyi_filter, tracker, batch_norms(hooks))
        if not is_distributed:
            update.outside = OutsideChanges(loader, recorder.refuse)
        self._replace_run(tracker, module, weakref.ref(update), run_state, steps_before)
        if isinstance(self.accountant, PerInstanceAccountant):
            self.accountant.follow(recorder)
        return update

    def _begin_recorder(
        self,
        module: nn.Module,
        loader: DataLoader[Any],
        processes: Processes | None,
    ) -> None:
        """Tell the recorder what is trained, and how it can measure and name it."""
        recorder, data_set = self.recorder, loader.dataset
        trained = weakref.ref(module)
        collate_fn = user_collate_fn(loader)
        recorder.begin(
            num_examples=size_of(data_set),
            sample_rate=1 / len(loader),
            sampling="poisson" if is_poisson(loader) else "fixed",
            data_set=fingerprint(data_set),
            sweep=lambda: shared_sweep(
                cast(nn.Module, trained()),
                cast(Criterion, recorder.criterion),
                data_set,
                processes=processes,
                batch_size=recorder.batch_size,
                collate_fn=collate_fn,
            ),
            weights=lambda: cast(nn.Module, trained()).state_dict(),
            processes=processes,
            # no process of FSDP has all weights to name
            last_weights=None
            if isinstance(module, FSDPModule)
            else LastWeights(module),
        )

    def _replace_run(
        self,
        tracker: Tracker,
        module: nn.Module,
        update: Callable[[], UpdateUnderWay | None],
        run_state: RunState,
        steps_before: int,
    ) -> None:
        """Make a run that was prepared the one that the engine answers for."""
        earlier = self._update()
        if earlier is not None:
            earlier.is_superseded = True
        self._tracker, self._module, self._update = tracker, weakref.ref(module), update
        self.checkpoints.run_state = run_state
        self.checks.begin(self.recorder, steps_before=steps_before)


class PrivacyEngine(PerInstanceMixin, opacus.PrivacyEngine):
    """Drop-in replacement of Opacus's ``PrivacyEngine`` that records every example.

    Args:
        recorder: How to record. Default: ``Recorder()``.
        renyi_filter: Individual budgets, see below. Default: none.
        **opacus_options: ``accountant`` and ``secure_mode``, as in Opacus;
            ``accountant="per_instance"`` is available too.

    Recording changes no weight and no random number. Opacus trains some runs that
    cannot be accounted: frozen BatchNorm in training mode, samplers that weight
    examples, ghost clipping with a clip scheduler or with two backward passes a step.
    These train on as with Opacus; only ``ledger``, ``privacy_losses`` and ``epsilons``
    raise an error, which says why.

    Recorded norms are the norms that Opacus clips. They are the norms of each example's
    own loss if the criterion's reduction is ``loss_reduction`` and the loss is not
    scaled. With clipping by layer the recorded clip norm is the root of the sum of
    squares, an upper bound. With adaptive clipping the recorded noise is that of the
    gradient and of the noisy count of unclipped examples together, as Opacus accounts
    for it: the count is part of the worst case, and of per-example values in proportion
    to the gradient.

    ``make_private(grad_sample_mode="fast")`` makes the updates of ``"hooks"``, up to
    rounding, from one backward pass and without per-example gradients. The training
    loop and the returned objects stay the same. Until ``optimizer.step()`` it keeps the
    inputs and output gradients of all layers for one physical batch. It supports flat
    clipping in one process only.

    Under ``torch.distributed`` (``DistributedDataParallel``, Opacus's
    ``DifferentiallyPrivateDistributedDataParallel``, FSDP2 with ``ghost_fsdp``) every
    process has the same ledger. Observations are merged, and sweeps shared, when a row
    is written; ``recorder.merge()``, called by all processes, merges what was observed
    since. If a process dies, the others still have their ledgers. ``attribution``
    counts the samples of one process. Each process resumes from its own checkpoint.

    With a ``RenyiFilter`` an example is left out of every update that would exceed its
    budget: its per-example gradient is set to zero, and 0 is recorded as its norm. The
    same happens to unattributed samples, to samples whose norm is not finite, and to
    padding. The guarantee is then ``renyi_filter.epsilons`` (Feldman and Zrnic 2021,
    arXiv:2008.11193). ``get_epsilon`` still holds for every example, and ``epsilons``
    stays an estimate, from the norms that entered. Which examples were left out is
    sensitive. An ``AccountingError`` stops a training whose charges would be wrong:
    samples that are attributed without verification, BatchNorm in training mode, noise
    that is lowered within an update.
    """


def _warn_if_most_are_equal(values: NDArray[np.float64]) -> None:
    """Warn if most examples share the largest value.

    Sorting such values would only reproduce the order of the data set.
    """
    num_equal = num_at_top(values)
    if 1 < num_equal and len(values) < 2 * num_equal:
        warnings.warn(
            f"{num_equal} of {len(values)} examples share the largest value, that of "
            "an example that is clipped in every update. Estimates above it are cut to "
            "it, so these examples cannot be told apart. Use a larger max_grad_norm "
            "with a smaller learning rate, or a lower order.",
            stacklevel=3,
        )
