"""Watch the forward passes of a prepared model, and the criterion of ghost clipping.

A run knows which examples a norm is of only if it sees what the loop gives to the
model. ``probe_model`` puts a hook on the module that the loop calls, and
``probe_losses`` gives the criterion of ghost clipping a subclass of its class; both
report to the tracker of the run and to the links of its chain of custody.

**Guarantee.** Outputs, losses and gradients stay what they are without the probes.

**What breaks it.** A loop that calls another module than the prepared one: its passes
are not seen, and its samples are unattributed.
"""

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from opacus.grad_sample import (
    AbstractGradSampleHooks,
    GradSampleHooks,
    GradSampleHooksFastGradientClipping,
    GradSampleModuleExpandedWeights,
    GradSampleModuleNoOp,
)
from opacus.optimizers import DPOptimizer
from opacus.utils.fast_gradient_clipping_utils import (
    DPLossFastGradientClipping,
    DPTensorFastGradientClipping,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from opacus_pi._class_swap import plain_class, swap_class
from opacus_pi._torch_compat import never_compile
from opacus_pi.attribution import TargetOrder, Tracker, probe
from opacus_pi.custody import Chain
from opacus_pi.custody.loss_factors import LossFactors
from opacus_pi.custody.loss_probe import LossProbe
from opacus_pi.custody.loss_shares import LossShares
from opacus_pi.custody.model_loss import ModelLossProbe
from opacus_pi.custody.model_probe import ModelProbe
from opacus_pi.custody.repeated_loss import RepeatedLoss
from opacus_pi.custody.weights_in_passes import WeightsInPasses
from opacus_pi.integration.changed_layers import ChangedLayers
from opacus_pi.integration.lost_gradients import LostGradients
from opacus_pi.integration.opacus_compat import (
    keep_handle,
    module_of,
    removable_handles,
)
from opacus_pi.integration.outside_calls import OutsideCalls
from opacus_pi.integration.paths_to_weights import PathsToWeights
from opacus_pi.integration.two_passes import TwoPasses
from opacus_pi.integration.unequal_calls import UnequalCalls
from opacus_pi.recording import Recorder

__all__ = [
    "called_module",
    "new_lost_gradients",
    "new_model_probe",
    "new_unequal_calls",
    "probe_losses",
    "probe_model",
    "takes_per_example_gradients",
]

# Operations by which a loop makes one loss of several.
_ARITHMETIC = {
    *("__add__", "__radd__", "__sub__", "__rsub__", "__neg__"),
    *("__mul__", "__rmul__", "__truediv__"),
}


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
    by_rows = (GradSampleHooks, GradSampleModuleExpandedWeights)
    return ModelProbe(
        weakref.ref(module),
        0 if batch_first else 1,
        layers_in_order=True,
        rows_are_examples=isinstance(hooks, by_rows),
    )


def probe_model(
    hooks: AbstractGradSampleHooks,
    tracker: Tracker,
    *probes: ModelProbe
    | ModelLossProbe
    | LossShares
    | PathsToWeights
    | LostGradients
    | UnequalCalls
    | WeightsInPasses
    | None,
) -> None:
    """Report the forward passes of a prepared model to a tracker.

    Args:
        hooks: What Opacus made of the model. Removing its hooks removes the probe, too;
            in modes without hooks (``"ew"``, ``"no_op"``) the probe stays, and has no
            effect once the tracker is deleted.
        tracker: Referred to weakly. A second call replaces it.
        *probes: See the passes; referred to weakly. None: no such probe.
    """
    never_compile("opacus_pi")
    module = called_module(hooks)
    handle = probe(
        module,
        tracker,
        is_second_backward=_second_backward_of(hooks),
        saw_pass=[one.saw for one in probes if one is not None],
    )
    if handle not in (removable_handles(module) or ()):
        keep_handle(module, handle)


def takes_per_example_gradients(hooks: AbstractGradSampleHooks) -> bool:
    """Return whether updates are made of per-example gradients that Opacus computes.

    Args:
        hooks: What Opacus made of the model.
    """
    return isinstance(hooks, GradSampleModuleExpandedWeights) or (
        isinstance(hooks, GradSampleHooks)
        and not isinstance(hooks, GradSampleHooksFastGradientClipping)
    )


def new_lost_gradients(
    hooks: AbstractGradSampleHooks, optimizer: DPOptimizer, chain: Chain
) -> LostGradients | None:
    """Return what compares gradients with per-example gradients.

    Args:
        hooks: What Opacus made of the model.
        optimizer: What Opacus made of the optimizer.
        chain: The chain of custody of the run.

    Returns:
        None in modes whose updates are not made of per-example gradients.
    """
    if not takes_per_example_gradients(hooks):
        return None
    return LostGradients(
        module_of(hooks),
        optimizer.params,
        chain,
        is_mean=hooks.loss_reduction == "mean",
        is_instead=isinstance(hooks, GradSampleModuleExpandedWeights),
    )


def new_unequal_calls(
    hooks: AbstractGradSampleHooks, optimizer: DPOptimizer, chain: Chain
) -> UnequalCalls | None:
    """Return what compares the calls of layers.

    Args:
        hooks: What Opacus made of the model.
        optimizer: What Opacus made of the optimizer.
        chain: The chain of custody of the run.

    Returns:
        None in modes in which Opacus does not add up the gradients of several calls.
    """
    if not (isinstance(hooks, GradSampleHooks) and takes_per_example_gradients(hooks)):
        return None
    return UnequalCalls(hooks, optimizer, chain)


def _second_backward_of(hooks: AbstractGradSampleHooks) -> Callable[[], bool]:
    """Return a function that says if ghost clipping is in its second backward pass.

    Opacus disables the hooks during that pass.

    Args:
        hooks: What Opacus made of the model; referred to weakly.
    """
    prepared = weakref.ref(hooks)
    return lambda: not getattr(prepared(), "hooks_enabled", True)


def called_module(hooks: AbstractGradSampleHooks) -> nn.Module:
    """Return the module whose forward hooks run when the loop calls the model.

    Args:
        hooks: What Opacus made of the model.
    """
    if isinstance(hooks, GradSampleModuleNoOp):  # which skips its module's hooks
        return cast(nn.Module, hooks)
    return module_of(hooks)


def probe_losses(
    criterion: DPLossFastGradientClipping,
    chain: Chain,
    tracker: Tracker,
    outside: OutsideCalls,
) -> TwoPasses | None:
    """Have a criterion probed when it is called, and its targets compared.

    Args:
        criterion: What Opacus made of the user's criterion for ghost clipping; its
            class is replaced.
        chain: The chain of custody of the run.
        tracker: Knows the samples of the forward passes.
        outside: Is told of the calls of layers.

    Returns:
        What compares both backward passes, which reports when it is asked to. None:
        nothing compares them.
    """
    tracker.keeps_outputs = True
    swap_class(criterion, _reporting_calls)
    criterion._pi_loss_probe = LossProbe(
        criterion.criterion,
        chain,
        averages_each_example=True,
        is_output=tracker.is_output,
    )
    criterion._pi_repeated = RepeatedLoss(criterion.criterion, chain)
    criterion._pi_target_order = TargetOrder(tracker, chain)
    passes: TwoPasses | None = None
    layers: ChangedLayers | None = None
    is_sharded = isinstance(module_of(criterion.module), FSDPModule)
    if not is_sharded:
        layers = ChangedLayers(criterion.module, chain)
    if plain_class(criterion) is DPLossFastGradientClipping and not is_sharded:
        passes = TwoPasses(
            criterion.module, chain, is_mean=criterion.loss_reduction == "mean"
        )
    criterion._pi_checks = _BackwardChecks(
        PathsToWeights(criterion.module, chain, outside), passes, layers, tracker
    )
    criterion._pi_loss_factors = LossFactors(
        chain,
        is_mean=criterion.loss_reduction == "mean",
        is_second_backward=_second_backward_of(criterion.module),
    )
    return passes


def _reporting_calls(base: type) -> type:
    """Make a criterion that shows its arguments to a probe."""

    class Criterion(base):
        _pi_loss_probe: LossProbe
        _pi_repeated: RepeatedLoss
        _pi_target_order: TargetOrder
        _pi_checks: _BackwardChecks
        _pi_loss_factors: LossFactors

        def __call__(self, *args: Any, **options: Any) -> Any:
            loss = super().__call__(*args, **options)
            is_trained = loss.loss_per_sample.requires_grad
            if not (is_trained and module_of(self.module).training):
                return loss  # of a validation, for example
            if len(args) == 2:
                self._pi_loss_probe.saw(*args)
                self._pi_repeated.saw(*args)
            targets = args[1] if len(args) > 1 else options.get("target")
            self._pi_target_order.saw(targets)
            self._pi_loss_factors.watch(loss.loss_per_sample, *args[:1])
            return _with_checks(loss, self._pi_checks)

    return Criterion


@dataclass
class _BackwardChecks:
    """What looks at the backward passes of the losses of ghost clipping.

    Args:
        paths: Checks the first pass.
        passes: Compares both; None: nothing does.
        layers: Finds layers that compute something else; None: nothing does.
        tracker: Is told when both begin and end.
    """

    paths: PathsToWeights
    passes: TwoPasses | None
    layers: ChangedLayers | None
    tracker: Tracker

    def run(self, losses: Tensor, backward: Callable[[], None]) -> None:
        """Run both backward passes, and look at them.

        Args:
            losses: The losses of the examples, ``(b,)``.
            backward: Runs them.
        """
        self.paths.backward_begins(losses)
        followers = [one for one in (self.passes, self.layers) if one is not None]
        for one in followers:
            one.begins(losses)
        self.tracker.is_between_backwards = True
        try:
            backward()
        finally:
            self.tracker.is_between_backwards = False
        for one in followers:
            one.ended()


def _with_checks(loss: DPTensorFastGradientClipping, checks: _BackwardChecks) -> Any:
    """Have the backward passes of a loss reported.

    Args:
        loss: What a criterion of ghost clipping returned; its class is replaced.
        checks: Look at the passes.
    """
    swap_class(loss, _reporting_backward)._pi_checks = checks
    return loss


def _reporting_backward(base: type) -> type:
    """Make a loss that reports its backward pass, and so do losses made of it."""

    class Loss(base):
        _pi_checks: _BackwardChecks

        def backward(self) -> None:
            self._pi_checks.run(self.loss_per_sample, super().backward)

    for name in _ARITHMETIC & vars(DPTensorFastGradientClipping).keys():
        setattr(Loss, name, _keeping_paths(getattr(base, name)))
    return Loss


def _keeping_paths(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Make an operation of losses whose result reports its backward pass, too."""

    @functools.wraps(operation)
    def operate(loss: Any, *others: Any) -> Any:
        made = operation(loss, *others)
        return _with_checks(made, loss._pi_checks)

    return operate
