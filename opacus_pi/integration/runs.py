"""A run that ``make_private`` has prepared, from its parts to its first update.

``derived`` collects what an engine prepares, from the model to the optimizer. A
``PreparedRun`` is made of it: it puts observers on model and loader, has the recorder
begin, tells the chain of custody what is known before the first update, and connects
the optimizer to the object that it reports to. The engine keeps a ``CurrentRun``, which
holds on to nothing that is the user's.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import opacus
from torch import nn
from torch.distributed.fsdp import FSDPModule

from opacus_pi.accounting import RenyiFilter, fingerprint
from opacus_pi.attribution import Tracker, keeps_order, observe
from opacus_pi.custody import Chain
from opacus_pi.custody.draws import DrawLink
from opacus_pi.custody.loss_shares import LossShares
from opacus_pi.custody.model_loss import ModelLossProbe
from opacus_pi.custody.model_probe import MODEL_NOT_RUN
from opacus_pi.custody.weights import WeightSnapshot
from opacus_pi.custody.weights_in_passes import WeightsInPasses
from opacus_pi.integration.audited_run import AuditedRun, audited_run
from opacus_pi.integration.checkpoints import RunState
from opacus_pi.integration.checks import (
    OutsideChanges,
    batch_norms,
    clipping_without_effect,
    complex_noise,
)
from opacus_pi.integration.derived import Preparation
from opacus_pi.integration.explanations import explain_forward_errors
from opacus_pi.integration.fast import FastHooks, clip_from_cache
from opacus_pi.integration.filtering import FilterGate
from opacus_pi.integration.lost_gradients import LostGradients
from opacus_pi.integration.opacus_compat import DISTRIBUTED, module_of
from opacus_pi.integration.optimizers import report_updates
from opacus_pi.integration.outside_calls import OutsideCalls
from opacus_pi.integration.own_samplers import own_samplers
from opacus_pi.integration.paths_to_weights import PathsToWeights
from opacus_pi.integration.probes import (
    new_lost_gradients,
    new_model_probe,
    new_unequal_calls,
    probe_losses,
    probe_model,
    takes_per_example_gradients,
)
from opacus_pi.integration.schedules import (
    is_poisson,
    overlapping,
    unknown_schedule,
    user_collate_fn,
)
from opacus_pi.integration.sweep_order import InItemOrder
from opacus_pi.integration.swept_model import SweptModel
from opacus_pi.integration.trained_outside import TrainedOutside
from opacus_pi.integration.training_states import TrainingStates
from opacus_pi.integration.update import UpdateUnderWay
from opacus_pi.integration.wrong_layers import layers_opacus_gets_wrong, watch_inputs
from opacus_pi.ledger.same_data import same_data_set
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


_NO_TWO_EXAMPLES = (
    "It was not checked, because the check replaces one of several examples. It needs "
    "an update with a forward pass in whose inputs two examples or more are found."
)
_NOT_COMPARED = (
    "It was not checked: in distributed training, also with one process, the weights "
    "are not compared between updates. Nothing else may write to them."
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


def new_tracker(recorder: Recorder, *, batch_first: bool = True) -> Tracker:
    """Return a tracker with a recorder's options.

    Args:
        recorder: The engine's recorder.
        batch_first: Whether examples are along the first dimension of the inputs.
    """
    verify, strict = recorder.verify, recorder.strict
    return Tracker(verify=verify, strict=strict, batch_first=batch_first)


def _compare_data(data_set: Any, before: str, chain: Chain) -> None:
    """Leave the link "identity" unchecked if what the data set stores has changed.

    Args:
        data_set: The data set. It is kept as long as the chain, because results may be
            read when the loader does not exist any more; an audit needs it, too.
        before: Its fingerprint when recording began.
        chain: The chain of custody of the run.
    """
    if not same_data_set(before, fingerprint(data_set)):
        chain.leave_unchecked("identity", _DATA_CHANGED)


def _deleted() -> None:
    """Stand in for a weak reference to an object that does not exist any more."""


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
        audited: What an audit repeats of the run; None in a copy of the engine.
    """

    tracker: Tracker
    module: Callable[[], nn.Module | None]
    update: Callable[[], UpdateUnderWay | None] | None
    run_state: RunState | None
    audited: AuditedRun | None = None

    @property
    def is_private(self) -> bool:
        """Whether ``make_private`` has prepared the run."""
        return self.update is not None

    def present_update(self) -> UpdateUnderWay | None:
        """Return what the optimizer reports to; None if there is no such optimizer."""
        return None if self.update is None else self.update()

    def __reduce__(self) -> tuple[Any, ...]:
        """Reduce to what a copy of the engine may say about the run.

        Model and optimizer of the run are not the copy's: were it to refer to them, its
        next ``make_private`` would end the recording of the original.
        """
        update = None if self.update is None else _deleted
        return CurrentRun, (self.tracker, _deleted, update, None)


class PreparedRun:
    """A run of ``make_private`` whose recording is about to begin.

    The engine calls the methods in the order in which they are here.

    Args:
        preparation: Model, optimizer and loader of the run.
        recorder: The engine's recorder.
        is_secure: Whether the engine draws random numbers that have no state.
    """

    def __init__(
        self, preparation: Preparation, recorder: Recorder, *, is_secure: bool
    ) -> None:
        hooks: Any = preparation.hooks
        loader: Any = preparation.loader
        self.hooks, self.loader = hooks, loader
        self.optimizer: Any = preparation.optimizer
        self._preparation, self._is_secure = preparation, is_secure
        self._own_rule = preparation.own_rule()
        self.module = module_of(hooks)
        self.sample_rate = 1 / len(loader)  # as Opacus computes it for its accountant
        is_distributed = isinstance(self.module, DISTRIBUTED)
        self.processes = Processes() if is_distributed else None
        self.tracker = new_tracker(recorder, batch_first=hooks.batch_first)
        self.chain, self.snapshot = Chain(self.tracker.sample_counts), WeightSnapshot()
        self.in_passes = WeightsInPasses(self.snapshot)
        self.model_probe = new_model_probe(
            recorder, hooks, batch_first=hooks.batch_first
        )
        self.outside_calls = OutsideCalls(hooks, self.tracker, self.chain)
        self.paths: PathsToWeights | None = None
        if takes_per_example_gradients(hooks):
            self.paths = PathsToWeights(hooks, self.chain, self.outside_calls)
        self.lost: LostGradients | None = None
        if self.processes is None:
            self.lost = new_lost_gradients(hooks, self.optimizer, self.chain)
        self.calls = new_unequal_calls(hooks, self.optimizer, self.chain)
        self.loss_probe: ModelLossProbe | None = None
        self.loss_shares: LossShares | None = None
        self._swept: SweptModel | None = None
        if self.model_probe is not None and hooks.batch_first:
            takes_sum = hooks.loss_reduction == "sum"
            self.loss_probe = ModelLossProbe(
                self.model_probe.model, self.chain, takes_sum=takes_sum
            )
            if preparation.criterion is None:
                self.loss_shares = LossShares(self.chain)
                self.chain.keep_while(self.module, self.loss_shares)

    def observe(self) -> RunState:
        """Have the forward passes of the model and the batches of the loader observed.

        Returns:
            What a checkpoint saves of the run; it counts the passes from now on.
        """
        losses = self.loss_probe, self.loss_shares
        probes = self.model_probe, *losses, self.paths, self.lost
        probe_model(self.hooks, self.tracker, *probes, self.calls, self.in_passes)
        explain_forward_errors(self.hooks)
        is_own_collate = not keeps_order(user_collate_fn(self.loader))
        observe(self.loader, self.tracker, follow_items=is_own_collate)
        if isinstance(self.hooks, FastHooks):
            clip_from_cache(self.optimizer, self.hooks)
        return RunState(
            self.loader,
            optimizer=self.optimizer,
            noise_generator=self.optimizer.generator,
            is_secure=self._is_secure,
        )

    def begin_record(self, recorder: Recorder, run_state: RunState) -> None:
        """Let a recorder begin to record this run.

        The recorder learns what is trained, how a sweep measures it, and how the
        weights are read for saving and naming. Model and weights are referred to
        weakly: they are the user's to delete.

        Args:
            recorder: The engine's recorder.
            run_state: What ``observe`` returned; a recorder with checkpoints saves it.

        Raises:
            ValueError: If a saved run was loaded, and it is another one.
        """
        data_set, processes = self.loader.dataset, self.processes
        self.chain.allows_unattributed = recorder.unattributed == "worst_case"
        self.chain.on_read(partial(self.tracker.report_to, self.chain))
        name = fingerprint(data_set)
        compare = partial(_compare_data, data_set, name, self.chain)
        self.chain.on_read(compare, can_break=False)  # it reads the whole data set
        trained = weakref.ref(self.module)
        swept = SweptModel(self.module, self.optimizer)
        self._swept = swept if recorder.mode == "swept" else None
        collate_fn = InItemOrder(user_collate_fn(self.loader))
        collate_fn.chain = self.chain
        last_weights = None
        if not isinstance(self.module, FSDPModule):  # no process has all weights
            watched = self.snapshot if processes is None else None
            last_weights = LastWeights(self.module, watched)
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
            training=TrainingStates(self.module, self.optimizer, run_state),
        )

    def begin_chain(self, engine: opacus.PrivacyEngine) -> None:
        """Tell the chain of custody what is known before the run starts.

        Args:
            engine: The engine that prepared it.
        """
        shared = self.processes
        for link, reason in (
            ("norm", clipping_without_effect(engine)),
            ("noise", complex_noise(self.module)),
            ("rows", overlapping(self.loader, shared.size) if shared else None),
        ):
            if reason is not None:
                self.chain.break_link(link, reason)
        if (unknown := unknown_schedule(self.loader)) is not None:
            rules_out = is_poisson(self.loader)  # and the rate is larger than counted
            self.chain.break_link("schedule", unknown, rules_out_epsilon=rules_out)
        if self.model_probe is None:
            self.chain.leave_unchecked("model", MODEL_NOT_RUN, warn=False)
        else:
            self.chain.await_check("model", _NO_TWO_EXAMPLES)
        if shared is not None:
            self.chain.await_check("weights", _NOT_COMPARED)
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
        draws = DrawLink(
            self.chain,
            is_poisson=is_poisson(self.loader),
            num_examples=size_of(self.loader.dataset),
        )
        update = UpdateUnderWay(
            recorder, self.tracker, self.hooks, self.sample_rate, self.chain, draws
        )
        update.model_probe, update.loss_probe = self.model_probe, self.loss_probe
        update.loss_shares = self.loss_shares
        update.paths, update.calls = self.paths, self.calls
        update.outside_calls = self.outside_calls
        update.swept = self._swept
        if renyi_filter is not None:
            layers = batch_norms(self.hooks)
            update.gate = FilterGate(renyi_filter, self.tracker, layers)
        if self.processes is None:
            passes, probe = self.in_passes, self.model_probe
            self.tracker.saw_backward.append(passes.backward_began)
            self.tracker.forgot_passes.append(passes.gradients_were_cleared)
            update.outside = OutsideChanges(
                self.loader,
                self.chain,
                self.snapshot,
                passes.were_others,
                None if probe is None else probe.changed_buffers,
                frozenset() if probe is None else probe.unread,
                passes.forget,
            )
        return update

    def audited(self, recorder: Recorder) -> AuditedRun:
        """Return what an audit repeats of this run.

        Args:
            recorder: The engine's recorder.
        """
        asked = self._preparation.asked
        if asked is None:  # a derived class has not called our make_private
            asked = {
                "grad_sample_mode": self._preparation.options()["grad_sample_mode"],
                "loss_reduction": self.hooks.loss_reduction,
                "batch_first": self.hooks.batch_first,
            }
        audited = audited_run(self.loader, recorder=recorder, **asked)
        return replace(audited, registered=own_samplers(self.hooks) or "")

    def report_to(self, update: UpdateUnderWay) -> None:
        """Have the optimizer report its updates, if it clips in a way that is known.

        Otherwise training goes on without any of our code in its optimizer, and the
        link "norm" is broken.

        Args:
            update: What ``first_update`` returned.
        """
        if self._own_rule is not None:
            self.chain.break_link("norm", self._own_rule, rules_out_epsilon=False)
        for reason, rules_out in layers_opacus_gets_wrong(self.hooks):
            self.chain.break_link("norm", reason, rules_out_epsilon=rules_out)
        watch_inputs(self.hooks, self.chain)
        registered = own_samplers(self.hooks)
        if registered is not None:
            self.chain.leave_unchecked("norm", registered, warn=False)
        criterion = self._preparation.criterion
        if criterion is not None:
            update.passes = probe_losses(
                criterion, self.chain, self.tracker, self.outside_calls
            )
        if self.lost is not None:
            self.tracker.saw_backward.append(self.lost.backward_began)
            self.tracker.forgot_passes.append(self.lost.gradients_were_cleared)
            update.lost = self.lost
        if not isinstance(self.module, FSDPModule):  # whose weights are made anew
            trained = TrainedOutside(self.module, self.optimizer, self.chain)
            self.tracker.saw_backward.append(trained.backward_began)
            self.tracker.forgot_passes.append(trained.gradients_were_cleared)
            update.trained_outside = trained
        if self._own_rule is None:
            report_updates(self.optimizer, update)
