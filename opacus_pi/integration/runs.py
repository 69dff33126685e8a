"""A run that ``make_private`` has prepared, from its parts to its first update.

``derived`` collects what an engine prepares, from the model to the optimizer;
``PreparedRun`` begins recording and makes the object to which the optimizer reports.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import opacus
from opacus.grad_sample import AbstractGradSampleHooks, GradSampleModuleNoOp
from opacus.optimizers import DPOptimizer
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from opacus_pi._class_swap import swap_class
from opacus_pi.accounting import RenyiFilter, fingerprint
from opacus_pi.attribution import TargetOrder, Tracker, probe
from opacus_pi.custody import Chain
from opacus_pi.custody.draws import DrawLink
from opacus_pi.custody.loss_factors import LossFactors
from opacus_pi.custody.loss_probe import LossProbe
from opacus_pi.custody.model_loss import ModelLossProbe
from opacus_pi.custody.model_probe import MODEL_NOT_RUN, ModelProbe
from opacus_pi.custody.weights import WeightSnapshot
from opacus_pi.integration.checkpoints import RunState
from opacus_pi.integration.checks import (
    OutsideChanges,
    batch_norms,
    clipping_without_effect,
)
from opacus_pi.integration.filtering import FilterGate
from opacus_pi.integration.opacus_compat import (
    DISTRIBUTED,
    keep_handle,
    module_of,
    removable_handles,
)
from opacus_pi.integration.schedules import (
    is_poisson,
    overlapping,
    unknown_schedule,
    user_collate_fn,
)
from opacus_pi.integration.sweep_order import InItemOrder
from opacus_pi.integration.swept_model import SweptModel
from opacus_pi.integration.training_states import TrainingStates
from opacus_pi.integration.update import UpdateUnderWay
from opacus_pi.ledger.fingerprint import same_data_set
from opacus_pi.models.batches import size_of
from opacus_pi.models.own_losses import Criterion
from opacus_pi.recording import Recorder
from opacus_pi.recording.distributed import Processes, shared_sweep
from opacus_pi.recording.weights import LastWeights

_DATA_CHANGED = (
    "What the data set stores has changed since recording began. If examples were "
    "replaced or moved to other positions, norms of different examples are in one "
    "column. Call make_private again after changing the data set."
)


def require_fitting_recorder(recorder: Recorder, module: nn.Module) -> None:
    """Refuse a recorder that cannot record a module, before the module is changed.

    Args:
        recorder: The engine's recorder.
        module: What ``make_private`` was given.

    Raises:
        ValueError: If the recorder needs a criterion, or weights that no process has.
    """
    if recorder.mode == "swept" and recorder.criterion is None:
        raise ValueError(
            "Recorder(criterion=...) was not given, but a swept recorder computes "
            'losses itself. Pass Recorder("swept", criterion=nn.CrossEntropyLoss()).'
        )
    needs_weights = recorder.mode == "swept" or recorder.weights_dir is not None
    if isinstance(module, FSDPModule) and needs_weights:
        raise ValueError(
            "A Recorder that sweeps or keeps weights cannot record an FSDP module, "
            "because no process has all of its weights. Use Recorder() without "
            "weights_dir, or DistributedDataParallel."
        )


def new_model_probe(
    recorder: Recorder, hooks: AbstractGradSampleHooks, *, batch_first: bool
) -> ModelProbe | None:
    """Return a probe that finds out whether a model mixes the examples of a batch.

    Args:
        recorder: The engine's recorder, which may declare that the model does not.
        hooks: What Opacus made of the model.
        batch_first: Whether examples are along the first dimension of the inputs.

    Returns:
        The probe. None if ``recorder.probe_model`` is false, or if no process could run
        the model alone because its weights are sharded.
    """
    module = module_of(hooks)
    is_sharded = isinstance(module, FSDPModule) or any(
        isinstance(parameter, DTensor) for parameter in module.parameters()
    )
    if is_sharded or not recorder.probe_model:
        return None
    return ModelProbe(
        weakref.ref(module), 0 if batch_first else 1, layers_in_order=True
    )


def probe_model(
    hooks: AbstractGradSampleHooks,
    tracker: Tracker,
    *probes: ModelProbe | ModelLossProbe | None,
) -> None:
    """Report the forward passes of a prepared model to a tracker.

    Args:
        hooks: What Opacus made of the model. Removing its hooks removes the probe, too;
            in modes without hooks (``"ew"``, ``"no_op"``) the probe stays, and has no
            effect once the tracker is deleted.
        tracker: Referred to weakly. A second call replaces it.
        *probes: See the passes; referred to weakly. None: no such probe.
    """
    prepared = weakref.ref(hooks)

    def is_second_backward() -> bool:
        """Return whether ghost clipping is in its second backward pass.

        Opacus disables the hooks during that pass.
        """
        return not getattr(prepared(), "hooks_enabled", True)

    module = called_module(hooks)
    handle = probe(
        module,
        tracker,
        is_second_backward=is_second_backward,
        saw_pass=[one.saw for one in probes if one is not None],
    )
    if handle not in (removable_handles(module) or ()):
        keep_handle(module, handle)


def called_module(hooks: AbstractGradSampleHooks) -> nn.Module:
    """Return the module whose forward hooks run when the loop calls the model.

    Args:
        hooks: What Opacus made of the model.
    """
    if isinstance(hooks, GradSampleModuleNoOp):  # which skips its module's hooks
        return cast(nn.Module, hooks)
    return module_of(hooks)


def _compare_data(
    loader: Callable[[], DataLoader[Any] | None], before: str, chain: Chain
) -> None:
    """Leave the link "identity" unchecked if what the data set stores has changed.

    Args:
        loader: Returns the loader that training iterates over, while it exists.
        before: The fingerprint of its data set when recording began.
        chain: The chain of custody of the run.
    """
    present = loader()
    if present is not None and not same_data_set(before, fingerprint(present.dataset)):
        chain.leave_unchecked("identity", _DATA_CHANGED)


def _deleted() -> None:
    """Stand in for a weak reference to an object that does not exist any more."""


def probe_losses(
    criterion: DPLossFastGradientClipping, chain: Chain, tracker: Tracker
) -> None:
    """Have a criterion probed when it is called, and its targets compared.

    Args:
        criterion: What Opacus made of the user's criterion for ghost clipping; its
            class is replaced.
        chain: The chain of custody of the run.
        tracker: Knows the samples of the forward passes.
    """
    tracker.keeps_outputs = True
    swap_class(criterion, _reporting_calls)
    criterion._pi_loss_probe = LossProbe(
        criterion.criterion,
        chain,
        averages_each_example=True,
        is_output=tracker.is_output,
    )
    criterion._pi_target_order = TargetOrder(tracker, chain)
    prepared = weakref.ref(criterion.module)
    criterion._pi_loss_factors = LossFactors(
        chain,
        is_mean=criterion.loss_reduction == "mean",
        is_second_backward=lambda: not getattr(prepared(), "hooks_enabled", True),
    )


def _reporting_calls(base: type) -> type:
    """Make a criterion that shows its arguments to a probe."""

    class Criterion(base):
        _pi_loss_probe: LossProbe
        _pi_target_order: TargetOrder
        _pi_loss_factors: LossFactors

        def __call__(self, *args: Any, **options: Any) -> Any:
            loss = super().__call__(*args, **options)
            if len(args) == 2:
                self._pi_loss_probe.saw(*args)
            targets = args[1] if len(args) > 1 else options.get("target")
            self._pi_target_order.saw(targets)
            self._pi_loss_factors.watch(loss.loss_per_sample, *args[:1])
            return loss

    return Criterion


@dataclass(frozen=True)
class CurrentRun:
    """The run that an engine answers for.

    Models and optimizers are the user's to delete, so they are referred to weakly.

    Args:
        tracker: Counts how samples were matched to examples.
        module: The user's module.
        update: What the optimizer reports to; None if the training is monitored, where
            the optimizer is not Opacus's. The optimizer keeps it in memory.
        run_state: What a checkpoint saves of the run; None in a copy of the engine.
    """

    tracker: Tracker
    module: Callable[[], nn.Module | None]
    update: Callable[[], UpdateUnderWay | None] | None
    run_state: RunState | None

    def __reduce__(self) -> tuple[Any, ...]:
        """Reduce to what a copy of the engine may say about the run.

        Model and optimizer of the run are not the copy's: were it to refer to them, its
        next ``make_private`` would end the recording of the original.
        """
        update = None if self.update is None else _deleted
        return CurrentRun, (self.tracker, _deleted, update, None)


class PreparedRun:
    """Model and loader of a run whose recording is about to begin.

    Args:
        hooks: What Opacus made of the model.
        tracker: Matches the samples of this run to examples.
        loader: The loader that training will iterate over.
        optimizer: What Opacus made of the optimizer.
        model_probe: Finds out whether the model mixes examples; None: it is not run.
    """

    def __init__(
        self,
        hooks: AbstractGradSampleHooks,
        tracker: Tracker,
        loader: DataLoader[Any],
        optimizer: DPOptimizer,
        model_probe: ModelProbe | None = None,
    ) -> None:
        self.hooks, self.tracker, self.loader = hooks, tracker, loader
        self.optimizer = optimizer
        self.model_probe = model_probe
        self.training: TrainingStates | None = None  # for a recorder with checkpoints
        self.module = module_of(hooks)
        self.sample_rate = 1 / len(loader)  # as Opacus computes it for its accountant
        is_distributed = isinstance(self.module, DISTRIBUTED)
        self.processes = Processes() if is_distributed else None
        self.chain, self.snapshot = Chain(tracker.sample_counts), WeightSnapshot()
        self.loss_probe: ModelLossProbe | None = None
        if model_probe is not None and hooks.batch_first:
            takes_sum = hooks.loss_reduction == "sum"
            self.loss_probe = ModelLossProbe(
                model_probe.model, self.chain, takes_sum=takes_sum
            )

    def begin_record(self, recorder: Recorder) -> None:
        """Let a recorder begin to record this run.

        The recorder learns what is trained, how a sweep measures it, and how the
        weights are read for saving and naming. Model and weights are referred to
        weakly: they are the user's to delete.

        Args:
            recorder: The engine's recorder.

        Raises:
            ValueError: If a saved run was loaded, and it is another one.
        """
        data_set, processes = self.loader.dataset, self.processes
        self.chain.allows_unattributed = recorder.unattributed == "worst_case"
        self.chain.on_read(partial(self.tracker.report_to, self.chain))
        loader, name = weakref.ref(self.loader), fingerprint(data_set)
        compare = partial(_compare_data, loader, name, self.chain)
        self.chain.on_read(compare, can_break=False)  # it reads the whole data set
        trained = weakref.ref(self.module)
        swept = SweptModel(self.module, self.optimizer)
        collate_fn = InItemOrder(user_collate_fn(self.loader))
        collate_fn.chain = self.chain
        last_weights = None
        if not isinstance(self.module, FSDPModule):  # no process has all weights
            last_weights = LastWeights(self.module, self.snapshot)
        recorder.begin(
            num_examples=size_of(data_set),
            sample_rate=self.sample_rate,
            sampling="poisson" if is_poisson(self.loader) else "fixed",
            data_set=name,
            sweep=lambda: shared_sweep(
                swept(),
                cast(Criterion, recorder.criterion),
                data_set,
                processes=processes,
                batch_size=recorder.batch_size,
                collate_fn=collate_fn,
            ),
            weights=lambda: cast(nn.Module, trained()).state_dict(),
            processes=processes,
            last_weights=last_weights,
            chain=self.chain,
            training=self.training,
        )

    def begin_chain(self, engine: opacus.PrivacyEngine) -> None:
        """Tell the chain of custody what is known before the run starts.

        Args:
            engine: The engine that prepared it.
        """
        shared = self.processes
        for link, reason in (
            ("norm", clipping_without_effect(engine)),
            ("schedule", unknown_schedule(self.loader)),
            ("rows", overlapping(self.loader, shared.size) if shared else None),
        ):
            if reason is not None:
                self.chain.break_link(link, reason)
        if self.model_probe is None:
            self.chain.leave_unchecked("model", MODEL_NOT_RUN, warn=False)
        kind = "Poisson sampling" if is_poisson(self.loader) else "a fixed schedule"
        self.chain.check("schedule", f"The loader's samplers are known: {kind}.")

    def first_update(
        self, recorder: Recorder, renyi_filter: RenyiFilter | None
    ) -> UpdateUnderWay:
        """Return the object to which the optimizer reports its updates.

        Args:
            recorder: Receives what the optimizer reports.
            renyi_filter: The engine's budgets, if it has any.
        """
        draws = DrawLink(self.chain, is_poisson=is_poisson(self.loader))
        update = UpdateUnderWay(
            recorder, self.tracker, self.hooks, self.sample_rate, self.chain, draws
        )
        update.model_probe, update.loss_probe = self.model_probe, self.loss_probe
        if renyi_filter is not None:
            layers = batch_norms(self.hooks)
            update.gate = FilterGate(renyi_filter, self.tracker, layers)
        if self.processes is None:
            update.outside = OutsideChanges(self.loader, self.chain, self.snapshot)
        return update
