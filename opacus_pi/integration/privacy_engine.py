"""Opacus's ``PrivacyEngine`` that also keeps each example's gradient norms.

Change the import, nothing else: training, its random numbers and ``get_epsilon`` stay
Opacus's. Afterwards ``engine.ledger`` holds the record, and ``privacy_losses`` and
``epsilons`` are what each example costs.

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
"""

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import opacus
import torch
from opacus.grad_sample import AbstractGradSampleHooks
from opacus.optimizers import DPOptimizer
from opacus.privacy_engine import DDP, DPDDP, FSDPModule
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.utils.data import DataLoader

from opacus_pi._validate import expect
from opacus_pi.accounting import RenyiFilter, fingerprint
from opacus_pi.attribution import Tracker, probe, watch, watch_memory_manager
from opacus_pi.attribution.loader_position import follow_memory_manager
from opacus_pi.integration import fast, refusals
from opacus_pi.integration.accountants import PerInstanceAccountant
from opacus_pi.integration.checkpoints import Checkpoints
from opacus_pi.integration.compatible import (
    OUT_OF_PLACE,
    add_note,
    explain_in_place,
    make_compatible,
)
from opacus_pi.integration.dp_recording import PrivateRun, record
from opacus_pi.integration.filter_setup import require_filterable
from opacus_pi.integration.monitor import monitor
from opacus_pi.integration.odd_rows import explain_ghost_losses
from opacus_pi.integration.outside_changes import OutsideChanges
from opacus_pi.integration.readings import EngineReadings
from opacus_pi.integration.run_state import RunState
from opacus_pi.models.batches import size_of
from opacus_pi.models.losses import Criterion
from opacus_pi.recording import Recorder
from opacus_pi.recording.last_weights import LastWeights
from opacus_pi.recording.processes import Processes
from opacus_pi.recording.shared_sweep import shared_sweep

__all__ = ["PerInstanceMixin", "PrivacyEngine"]

_HOW_TO_GO_ON = (
    "To keep such layers, train without clipping: engine.make_monitored(...). To train "
    f"with differential privacy, replace them first: {OUT_OF_PLACE}"
)


class PerInstanceMixin(Checkpoints, EngineReadings):
    """What makes an engine of Opacus a recording one; goes before it in the bases.

    Args:
        recorder: How to record. Default: ``Recorder()``, the norms that training
            computes anyway; ``make_monitored`` sweeps by default.
        renyi_filter: Budgets; an example is left out of the updates that would exceed
            its own. Default: none.
        **opacus_options: The engine's own options.
    """

    def __init__(
        self,
        *,
        recorder: Recorder | None = None,
        renyi_filter: RenyiFilter | None = None,
        **opacus_options: Any,
    ) -> None:
        super().__init__(**opacus_options)
        self.renyi_filter = renyi_filter
        self.recorder = Recorder() if recorder is None else recorder
        self._default_recorder = recorder is None
        self._tracker = Tracker()
        self._module: Callable[[], nn.Module | None] = _nothing
        self._run: Callable[[], PrivateRun | None] = _nothing
        self._preparing: PrivateRun | None = None
        self._begun = self._is_private = False
        self._earlier_steps = 0
        self._reasons: list[str] = []
        self._run_state: RunState | None = None
        watch_memory_manager()
        follow_memory_manager()

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

        ``save_checkpoint`` and ``load_checkpoint(..., restore_rng=True)`` serve this
        training too: give them the plain module and optimizer.

        Args:
            module: The model, of any layers; returned as it is. May be under
                ``DistributedDataParallel`` if there is no noise.
            optimizer: Any torch optimizer of its parameters.
            data_loader: Of a data set with a length, yielding ``(x, y)``.
            noise_std: Standard deviation of the noise on the MEAN gradient; 0: none.
            criterion: One loss per example; a torch loss module will do.
            poisson_sampling: Whether batches are drawn as Opacus does, or as the
                loader does.
            **options: Of ``opacus_pi.integration.monitor.monitor``.

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
            options = self._secure_generators(options)
        earlier_steps = self.recorder.num_steps
        if self._default_recorder and self.recorder.mode != "swept":
            self.recorder = Recorder("swept")
        tracker = self._new_tracker()
        made = monitor(
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
        self._adopt(tracker, module, _nothing, earlier_steps)
        self._run_state = RunState(
            made[2],
            noise_generator=options.get("noise_generator"),
            is_secure=self.secure_mode,
        )
        return made

    def _secure_generators(self, options: dict[str, Any]) -> dict[str, Any]:
        """Secure random numbers for noise and batches, and no others."""
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

    def _new_tracker(self, *, batch_first: bool = True) -> Tracker:
        """A tracker as the recorder wants it."""
        verify, strict = self.recorder.verify, self.recorder.strict
        return Tracker(verify=verify, strict=strict, batch_first=batch_first)

    def _adopt(
        self,
        tracker: Tracker,
        module: nn.Module,
        run: Callable[[], PrivateRun | None],
        earlier_steps: int,
    ) -> None:
        """Make a run that was prepared the one that is recorded."""
        if self.recorder.num_steps < earlier_steps:  # begun anew, not resumed
            self._earlier_steps += earlier_steps
        earlier = self._run()
        if earlier is not None:
            earlier.superseded = True
        self._tracker, self._module, self._run = tracker, weakref.ref(module), run
        self._begun, self._is_private = True, run is not _nothing
        reasons, self._reasons = self._reasons, []
        for reason in reasons:
            self.recorder.refuse(reason)

    def _refuse(self, reason: str) -> None:
        """Refuse the record, or the one that will be begun."""
        if self._begun:
            self.recorder.refuse(reason)
        else:
            self._reasons.append(reason)

    @classmethod
    @wraps(opacus.PrivacyEngine.get_compatible_module.__func__)
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """As Opacus does, and without in-place operations."""
        compatible: nn.Module = super().get_compatible_module(make_compatible(module))
        return compatible

    @wraps(opacus.PrivacyEngine.make_private)
    def make_private(self, **options: Any) -> tuple[Any, ...]:
        """Prepare as Opacus does, once it is clear that budgets can be kept."""
        if self.renyi_filter is not None:
            require_filterable(self, **options)
            data_set = options["data_loader"].dataset
            self.renyi_filter.begin(len(data_set), fingerprint(data_set))
        if options.get("grad_sample_mode") == fast.MODE:
            fast.require_fast(**options)
        made: tuple[Any, ...] = super().make_private(**options)
        return made

    # ------------------------------------------------ what Opacus calls in make_private
    def _prepare_model(
        self, module: nn.Module, **options: Any
    ) -> AbstractGradSampleHooks:
        expect(
            self.recorder.mode != "swept" or self.recorder.criterion is not None,
            "Recorder(criterion=...)",
            None,
            "to be given: a swept recorder computes losses itself",
            'Pass Recorder("swept", criterion=nn.CrossEntropyLoss()).',
        )
        expect(
            not isinstance(module, FSDPModule)
            or (self.recorder.mode == "observed" and self.recorder.weights_dir is None),
            "Recorder",
            "one that sweeps or keeps weights",
            "to observe norms: no process has the weights of an FSDP module",
            "Use Recorder() without weights_dir, or DistributedDataParallel.",
        )
        try:
            if options.get("grad_sample_mode") == fast.MODE:
                hooks = fast.prepare_model(self, module, **options)
            else:
                hooks = super()._prepare_model(module, **options)
        except UnsupportedModuleError as error:
            add_note(error, _HOW_TO_GO_ON)
            raise
        tracker = self._new_tracker(batch_first=options.get("batch_first", True))
        probe(hooks, tracker)
        explain_in_place(hooks)
        self._preparing = PrivateRun(self.recorder, tracker, hooks, self.renyi_filter)
        return hooks

    def _prepare_data_loader(
        self, data_loader: DataLoader[Any], **options: Any
    ) -> DataLoader[Any]:
        loader: DataLoader[Any] = super()._prepare_data_loader(data_loader, **options)
        if self._preparing is not None:
            watch(loader, self._preparing.tracker)
            self._preparing.loader = loader
        return loader

    def _prepare_optimizer(self, **options: Any) -> DPOptimizer:
        optimizer = super()._prepare_optimizer(**options)
        run, self._preparing = self._preparing, None
        if run is not None and isinstance(run.hooks, fast.FastHooks):
            fast.clip_from_book(optimizer, run.hooks)
        if run is not None and run.loader is not None:
            self._run_state = RunState(
                run.loader,
                optimizer=optimizer,
                noise_generator=optimizer.generator,
                is_secure=self.secure_mode,
            )
            self._begin(run)
            record(optimizer, run)
        return optimizer

    def _prepare_criterion(self, **options: Any) -> Any:
        criterion = super()._prepare_criterion(**options)
        explain_ghost_losses(criterion)
        return criterion

    def _begin(self, run: PrivateRun) -> None:
        """Start the record of a run that Opacus has prepared."""
        loader, recorder = cast(DataLoader[Any], run.loader), self.recorder
        run.sample_rate, run.loader = 1 / len(loader), None
        data_set, module = loader.dataset, run.hooks._module
        poisson, trained = refusals.is_poisson(loader), weakref.ref(module)
        collate_fn = refusals.own_collate_fn(loader)
        earlier_steps = recorder.num_steps
        distributed = isinstance(module, (DDP, DPDDP, FSDPModule))
        processes = Processes() if distributed else None
        try:
            recorder.begin(
                num_examples=size_of(data_set),
                sample_rate=run.sample_rate,
                sampling="poisson" if poisson else "fixed",
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
                last_weights=None
                if isinstance(module, FSDPModule)
                else LastWeights(module),
            )
        except ValueError as error:  # the record that was loaded is of another run
            self._reasons.append(str(error))
        reasons = [
            refusals.clipping_without_effect(self),
            refusals.unknown_schedule(loader),
            refusals.overlapping(loader, processes.size) if processes else None,
        ]
        self._reasons += [reason for reason in reasons if reason]
        if not distributed:
            run.outside = OutsideChanges(loader, recorder.refuse)
        self._adopt(run.tracker, module, weakref.ref(run), earlier_steps)
        if isinstance(self.accountant, PerInstanceAccountant):
            self.accountant.follow(recorder)


class PrivacyEngine(PerInstanceMixin, opacus.PrivacyEngine):
    """Opacus's ``PrivacyEngine``, drop-in, with a record of every example.

    Args:
        recorder: How to record. Default: ``Recorder()``.
        renyi_filter: Individual budgets, see below. Default: none.
        **opacus_options: ``accountant`` and ``secure_mode``, as in Opacus;
            ``accountant="per_instance"`` is available too.

    Recording changes no weight and no random number. What Opacus trains but cannot be
    accounted (frozen BatchNorm in training mode, samplers that weight examples, ghost
    clipping with a clip scheduler or two backward passes a step) trains on; only
    ``ledger``, ``privacy_losses`` and ``epsilons`` refuse, and say why.

    Norms are those that Opacus clips: of each example's own loss, if the criterion's
    reduction is ``loss_reduction`` and the loss is not scaled. With clipping by layer
    the clip norm on record is the root of the sum of squares, an upper bound. With
    adaptive clipping the noise on record is that of the gradient and of the noisy count
    of unclipped examples together, as Opacus accounts for it: the count is part of the
    worst case, and of per-example values in proportion to the gradient.

    ``make_private(grad_sample_mode="fast")`` makes the updates of ``"hooks"``, to
    rounding, from one backward pass and without per-example gradients. The loop and
    what is returned stay the same; until ``optimizer.step()`` it keeps each layer's
    input and output gradient, of one physical batch. Flat clipping in one process only.

    Under ``torch.distributed`` (``DistributedDataParallel``, Opacus's
    ``DifferentiallyPrivateDistributedDataParallel``, FSDP2 with ``ghost_fsdp``) every
    process has the same ledger: rows are merged, and sweeps shared, when a row is
    written; ``recorder.merge()``, called by all, brings what was observed since. If a
    process dies, the others still have their ledgers. ``attribution`` counts the rows
    of one process. Each process resumes from a checkpoint of its own.

    With a ``RenyiFilter`` an example is left out of every update that would exceed its
    budget: its row of the per-example gradients is zero, and 0 is the norm on record.
    So are rows that cannot be attributed, rows whose norm is not finite, and padding.
    ``renyi_filter.epsilons`` is then what is guaranteed (Feldman and Zrnic 2021,
    arXiv:2008.11193); ``get_epsilon`` still holds for everybody, and ``epsilons`` stays
    an estimate, from the norms that entered. Which examples were left out is sensitive.
    An ``AccountingError`` stops a training whose charges would be wrong: rows that are
    attributed by belief, BatchNorm in training mode, noise that falls within an update.
    """


def _nothing() -> None:
    """A reference to nothing."""
