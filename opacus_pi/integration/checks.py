"""Checks for runs that Opacus trains but that cannot be accounted for each example.

Such runs have BatchNorm that mixes the examples of a batch, a loader that was changed,
or an optimizer that is stepped without noise. Training continues exactly as with
Opacus; the ledger then refuses to give numbers and says why.

The functions each return a reason with its remedy, or None. ``RunChecks`` collects the
reasons of one engine, and ``OutsideChanges`` looks at loader and weights at every
update.
"""

import weakref
from collections.abc import Callable, Collection, Sequence, Set
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import opacus
from opacus.grad_sample import AbstractGradSampleHooks
from opacus.optimizers import DPOptimizer
from opacus.utils.adaptive_clipping.adaptive_clipping_utils import (
    PrivacyEngineAdaptiveClipping,
)
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from opacus_pi._errors import AccountingError
from opacus_pi._torch_compat import BatchNormBase
from opacus_pi.custody import Chain
from opacus_pi.custody.buffers import BufferLink, watch_buffers
from opacus_pi.custody.first_weights import FirstWeights
from opacus_pi.custody.loaded_states import watch_loading
from opacus_pi.custody.weights import WeightsLink, WeightSnapshot
from opacus_pi.integration.derived import own_scaling, own_step
from opacus_pi.integration.held_weights import held_by
from opacus_pi.integration.noised_steps import NoisedSteps, call_last
from opacus_pi.integration.opacus_compat import keep_handle, module_of
from opacus_pi.integration.schedules import UnchangedSchedule
from opacus_pi.models.complex_weights import complex_parameter
from opacus_pi.models.copies import unwrap
from opacus_pi.recording import Recorder

_STEPPED_WITHOUT_NOISE = (
    "The optimizer that was passed to make_private was stepped directly, and not with "
    "gradients of an update as they were when they had noise. Other gradients may be "
    "neither clipped nor noised, and no accountant counted the step. Step the "
    "optimizer that make_private returned."
)
_STEPPED_AGAIN = (
    "The optimizer that was passed to make_private was stepped again with the "
    "gradients of an update, to which noise had been added. Such a step uses no "
    "training data, so neither get_epsilon nor the observed norms are affected. But "
    "it is not recorded: a rewind does not repeat it, and norms of a swept recorder "
    "are those of the weights before it. Step only the optimizer that make_private "
    "returned, once for each update."
)
_NOT_ENDED = (
    "Noise was drawn for update {counted}, and the accountant has counted it. But the "
    "optimizer that was passed to make_private has not completed a step since, so the "
    "ledger holds {recorded} updates, and the optimizer of make_private no longer "
    "exists. If your loop makes the update by itself after optimizer.pre_step(), call "
    "optimizer.step() instead, or keep the optimizer until you have read the ledger: "
    "it then also covers such an update."
)
_FROZEN_WITH_GRADIENT = (
    "A parameter was frozen (requires_grad=False) while it had a gradient, which was "
    "neither clipped nor noised. The optimizer still takes a step with it, so neither "
    "get_epsilon nor the ledger covers the update. Freeze parameters between "
    "optimizer.zero_grad() and the next forward pass."
)
# Hooks of the last make_private call on each optimizer. The next call replaces them.
_HANDLES: WeakKeyDictionary[Optimizer, tuple[RemovableHandle, ...]] = (
    WeakKeyDictionary()
)


# ------------------------------------------------------------------- models and engines
def clipping_without_effect(engine: opacus.PrivacyEngine) -> str | None:
    """Explain that an engine's criterion makes ghost clipping ineffective.

    Ghost clipping multiplies each example's loss by its clip factor. The adaptive
    engine of Opacus 1.6.0 reduces the loss to one number before that.

    Args:
        engine: The engine whose ``make_private`` was called.
    """
    if not isinstance(engine, PrivacyEngineAdaptiveClipping):
        return None
    return (
        "Opacus's PrivacyEngineAdaptiveClipping does not clip: its criterion reduces "
        "the loss before the examples are weighted. Use "
        'make_private(clipping="adaptive").'
    )


def complex_noise(module: nn.Module) -> str | None:
    """Explain that noise on complex parameters has another size than is recorded.

    Args:
        module: The user's module.
    """
    name = complex_parameter(module)
    if name is None:
        return None
    return (
        f"The parameter {name} is complex. On its real or imaginary part, the noise "
        "that Opacus adds has a smaller standard deviation than its accountant "
        "assumes. Store both parts as one real parameter with a last dimension of "
        "size 2, and use torch.view_as_complex(parameter) in forward."
    )


def batch_norms(hooks: AbstractGradSampleHooks) -> list[nn.Module]:
    """Return the BatchNorm layers of a model, which Opacus accepts if they are frozen.

    Args:
        hooks: What ``make_private`` returned for the model.
    """
    return [m for m in module_of(hooks).modules() if isinstance(m, BatchNormBase)]


def batch_statistics(layers: Sequence[nn.Module]) -> str | None:
    """Explain that a BatchNorm layer mixes the examples of a batch.

    Args:
        layers: What ``batch_norms`` returned.

    Returns:
        The reason if one of them is in training mode.
    """
    if not any(layer.training for layer in layers):
        return None
    return (
        "A BatchNorm layer is in training mode: every output depends on the whole "
        "batch, so no gradient belongs to one example. Call .eval() on such layers "
        "after model.train(), or replace them by GroupNorm."
    )


# -------------------------------------------------------------------- the engine's part
class RunChecks:
    """The reasons why an engine's numbers cannot be given.

    A reason may be found before recording begins (a checkpoint that does not fit). It
    is kept until then, and handed to the recorder, which refuses the ledger.
    """

    def __init__(self) -> None:
        self._recorder: Recorder | None = None
        self._reasons: list[str] = []
        self._module: Callable[[], nn.Module | None] = _no_module
        # Recorded before the present run began: all, those that the accountant counts,
        # and those of each model that still exists.
        self._earlier_steps = self._earlier_counted = 0
        self._steps_of: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy holds: no models, which are not those of the copy."""
        kept = vars(self).keys() - {"_module", "_steps_of"}
        return {name: vars(self)[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin with what ``__getstate__`` returned."""
        vars(self).update(vars(RunChecks()) | state)

    def add(self, reason: str | None) -> None:
        """Keep a reason for the run that is about to begin.

        Args:
            reason: Why its numbers cannot be given; None is ignored.
        """
        if reason is not None:
            self._reasons.append(reason)

    def refuse(self, reason: str) -> None:
        """Refuse the ledger of the present run; before one, that of the next run."""
        if self._recorder is None:
            self.add(reason)
        else:
            self._recorder.refuse(reason)

    def require_lenient(self, reasons: Sequence[str]) -> None:
        """Raise the first reason if the present run has a strict recorder.

        Args:
            reasons: Why the numbers of the run cannot be given.

        Raises:
            AccountingError: If there are reasons, and the recorder is strict.
        """
        if reasons and self._recorder is not None and self._recorder.strict:
            raise AccountingError(reasons[0])

    def begin(
        self,
        recorder: Recorder,
        module: Callable[[], nn.Module | None],
        *,
        steps_before: int,
        were_counted: bool = True,
    ) -> None:
        """Apply the reasons that were kept to a run that has just begun.

        Args:
            recorder: The recorder of the new run.
            module: Returns the user's module of the new run, if it still exists.
            steps_before: Updates that it had recorded before it began. A run that
                was loaded goes on counting; one that starts again forgets them.
            were_counted: Whether the accountant counts those updates.
        """
        if recorder.num_steps < steps_before:
            self._earlier_steps += steps_before
            self._earlier_counted += steps_before if were_counted else 0
            before = self._module()
            if before is not None:
                steps = self._steps_of.get(before, 0)
                self._steps_of[before] = steps + steps_before
        self._recorder, self._module = recorder, module
        reasons, self._reasons = self._reasons, []
        for reason in reasons:
            recorder.refuse(reason)

    def require_begun(self, num_counted: int) -> None:
        """Give the reason why nothing has been recorded, if there is a known one.

        Args:
            num_counted: Updates that the engine's accountant has counted.

        Raises:
            AccountingError: If a reason was kept, or there were updates.
        """
        if self._reasons:
            raise AccountingError(self._reasons[0])
        if num_counted:
            raise AccountingError(
                f"The accountant has counted {num_counted} updates, but none was "
                "recorded, because this engine did not prepare the model. Call "
                "make_private of this engine, and train with the model, optimizer and "
                "loader that it returns."
            )

    def missing_updates(
        self,
        recorded: int,
        num_counted: int,
        *,
        is_private: bool,
        is_within_update: bool = False,
    ) -> str:
        """Say that a ledger holds only a part of the engine's updates.

        Args:
            recorded: Updates that the ledger holds.
            num_counted: Updates that the engine's accountant has counted.
            is_private: Whether the accountant counts the updates of this ledger, which
                it does after ``make_private`` only.
            is_within_update: Whether noise was drawn for an update that has not ended,
                and whose optimizer does not exist any more.

        Returns:
            The reason; empty if no updates are missing.
        """
        others = self._earlier_steps + num_counted - (recorded if is_private else 0)
        if others <= 0:
            return ""
        if others == 1 and is_within_update:
            return _NOT_ENDED.format(recorded=recorded, counted=num_counted)
        if not recorded + self._earlier_steps:
            return (
                f"None of the {num_counted} updates that the accountant has counted "
                "was recorded: a checkpoint of plain Opacus was loaded, or another "
                "engine trained with this accountant. No number can be given of them. "
                "Train from the start with this engine, or resume from a checkpoint "
                "that it has saved itself."
            )
        charged = num_counted - self._earlier_counted - (recorded if is_private else 0)
        return self._parts_left_out(recorded, charged)

    def _parts_left_out(self, recorded: int, num_charged: int) -> str:
        """Say what the updates that a ledger lacks were, and what to do.

        Args:
            recorded: Updates that the ledger holds.
            num_charged: Updates that the accountant has counted, beside all that the
                engine has recorded.
        """
        module = self._module()
        same = 0 if module is None else self._steps_of.get(module, 0)
        other = self._earlier_steps - same
        found, remedies = [], []
        if same:
            found.append(
                f"{same} were made before this model was prepared again, which began a "
                "new ledger."
            )
            remedies.append(
                "To go on with a training, keep what the first call of make_private or "
                "make_monitored returned, or resume from a checkpoint of this engine."
            )
        if other:
            found.append(f"{other} were of another model that this engine prepared.")
            remedies.append(
                "Use one engine for each model, also for each trial of a search. If "
                "one model goes on from another that was trained on the same data, as "
                "in pretraining and fine-tuning, neither ledger covers both trainings: "
                "add up the losses of each example, order by order, and compute "
                "epsilon by a new accountant that counts the updates of both."
            )
        if num_charged > 0:
            found.append(
                f"{num_charged} were counted by the accountant, but not recorded: it "
                "was charged for something else, such as by accountant.step, by "
                "another engine that has the same accountant, or by a checkpoint of "
                "plain Opacus."
            )
            remedies.append("Count other releases with an accountant of their own.")
        return " ".join(
            [
                f"The ledger holds {recorded} updates, but there were more.",
                *found,
                "So no number is given of this ledger.",
                *remedies,
            ]
        )


def _no_module() -> None:
    """Stand in for a reference to a module before the first run."""


# --------------------------------------------------------- between two updates of a run
class OutsideChanges:
    """Detects changes to loader and weights that the private optimizer did not make.

    A changed sampler, or a step of the optimizer inside Opacus's, makes every number
    wrong, so the ledger is refused. Writes to weights may be harmless, so they are only
    listed as an assumption (``custody.weights``).

    Args:
        loader: The loader that training iterates over; referred to weakly.
        chain: The chain of custody of the run, to which findings are reported.
        snapshot: Of the weights, taken after each update.
        were_others: Returns whether the update under way has gradients of other
            weights. Default: it has not.
        schedules: As for ``BufferLink``.
        unread: As for ``BufferLink``.
        forget_passes: Forgets forward passes, if weights are compared in them.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        chain: Chain,
        snapshot: WeightSnapshot,
        were_others: Callable[[], bool] = bool,
        schedules: Collection[str] | None = None,
        unread: Set[str] = frozenset(),
        forget_passes: Callable[[], None] = lambda: None,
    ) -> None:
        self._forget_passes = forget_passes
        self._schedule = UnchangedSchedule(loader, chain)
        self._chain, self._snapshot = chain, snapshot
        self._weights = WeightsLink(chain, snapshot, were_others)
        self._buffers: BufferLink | None = None
        self._schedules, self._unread = schedules, unread
        self._first: FirstWeights | None = None
        self._noised = NoisedSteps(chain)
        self._last_hook: RemovableHandle | None = None
        self._has_noise, self._has_stepped = False, False
        self._is_current, self._steps_again = True, False

    def watch(
        self,
        optimizer: DPOptimizer,
        module: nn.Module,
        stepped: Callable[[], None],
    ) -> None:
        """Watch an optimizer's weights, and the optimizer that it wraps.

        Args:
            optimizer: Opacus's.
            module: The module with these weights. Its other weights are watched, too:
                another optimizer may train them without noise, and so are its buffers,
                to which the training loop may write. Loading a state dict
                into it is reported if it changes the weights between two updates.
            stepped: A method that is called when the wrapped optimizer has stepped,
                also if the training loop has called it itself, after ``pre_step``.
        """
        own = set(map(id, optimizer.params))
        others = (p for p in module.parameters() if id(p) not in own)
        watched = [*optimizer.params, *others]
        self._snapshot.watch(watched)
        self._first = FirstWeights(watched, self._chain)
        chain, known = self._chain, (self._schedules, self._unread)
        self._buffers = watch_buffers(module, chain, *known)
        self._chain.keep_while(unwrap(module), self._weights, self._buffers)
        for handle in () if self._buffers is None else self._buffers.handles:
            keep_handle(module, handle)
        inner, reference = optimizer.original_optimizer, weakref.ref(self)
        private, finish = weakref.ref(optimizer), weakref.WeakMethod(stepped)
        for handle in _HANDLES.pop(inner, ()):
            handle.remove()

        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if (changes := reference()) is not None:
                changes._step_begins(optimizer, private(), args, kwargs)

        def after_step(optimizer: Optimizer, *_: Any) -> None:
            if (changes := reference()) is not None:
                changes._step_was_made(optimizer)
            if (method := finish()) is not None:
                method()

        self._last_hook = inner.register_step_pre_hook(before_step)
        _HANDLES[inner] = (
            self._last_hook,
            inner.register_step_post_hook(after_step),
        )
        keep_handle(module, watch_loading(module, self))

    def _step_begins(
        self,
        inner: Optimizer,
        maker: DPOptimizer | None,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> None:
        """Compare gradients and weights: the inner optimizer is about to write.

        Args:
            inner: The optimizer that Opacus wraps.
            maker: Opacus's optimizer, if it still exists.
            args: Positional arguments of the step, after the optimizer itself.
            kwargs: Its keyword arguments.
        """
        if not self._has_noise:
            self._step_without_noise_begins(inner, maker, args, kwargs)
            return
        self._has_stepped = True
        cause = (lambda: None) if maker is None else partial(own_scaling, maker)
        self._noised.step_begins(inner, args, kwargs, cause)
        if self._is_current:
            self._weights.before_update()

    def _step_without_noise_begins(
        self,
        inner: Optimizer,
        maker: DPOptimizer | None,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> None:
        """Report a step for which no noise was drawn; arguments as before."""
        if _is_frozen(inner):
            return  # Opacus steps without noise, and no gradient is used
        if self._noised.repeats_step(inner, args, kwargs):
            self._weights.before_update()
            self._steps_again = True
            self._chain.leave_unchecked("weights", _STEPPED_AGAIN)
            return
        own = None if maker is None else own_step(maker)
        reason = own or _STEPPED_WITHOUT_NOISE
        self._chain.break_link("noise", reason, rules_out_epsilon=own is not None)

    def _step_was_made(self, inner: Optimizer) -> None:
        """Compare the gradients after a step; note the weights if it was a second."""
        self._noised.step_was_made(inner)
        if self._steps_again:
            self._steps_again = False
            self._weights.after_update()

    def gradients_were_noised(self, optimizer: Optimizer) -> None:
        """Note the gradients that now have noise: the step should use them as they are.

        Args:
            optimizer: It is about to write the weights.
        """
        self._noised.gradients_have_noise(optimizer)
        if self._last_hook is not None:
            call_last(self._last_hook)
        frozen = [p for p in held_by(optimizer) if not p.requires_grad]
        if any([p.grad is not None and bool(p.grad.any()) for p in frozen]):
            self._chain.break_link("noise", _FROZEN_WITH_GRADIENT)

    def state_dict_was_loaded(self) -> None:
        """Record that a state dict was loaded: it may have changed the weights."""
        self._weights.state_dict_was_loaded()
        if self._first is not None:
            self._first.note()
        if self._buffers is not None:
            self._buffers.state_dict_was_loaded()

    def checkpoint_is_saved(self) -> None:
        """Compare the weights: the checkpoint should have those of the last update."""
        self._weights.before_update()

    def weights_were_written(self, *, waits: bool) -> bool:
        """Return whether the weights differ from those after the last update.

        Args:
            waits: Whether to wait for accelerators; without, only what is known in
                host memory is compared.
        """
        if waits:
            return self._snapshot.has_changed_now()
        return self._snapshot.has_changed_in_pass(counts_only=False)

    def run_was_resumed(self) -> None:
        """Note the weights: they are those of the run that a checkpoint continues."""
        self._first = None
        self._weights.after_update()

    def noise_was_drawn(self, *, is_current: bool = True) -> None:
        """Check the loader, and the weights before the first update.

        Args:
            is_current: False if a later run has replaced this one in its engine, which
                is a reason of its own.
        """
        self._has_noise, self._has_stepped = True, False
        self._is_current = is_current
        if not is_current:
            return
        self._schedule.compare()
        if self._first is not None:
            self._first.compare()
            self._first = None
            self._weights.after_update()  # the loop may make this update by itself

    def weights_were_updated(self, *, is_late: bool = False) -> None:
        """Note the weights: nothing should write to them until the next update.

        Args:
            is_late: Whether no step has just ended. If the optimizer has then not
                stepped since noise was drawn, the loop may have written the weights.
        """
        if is_late and not self._has_stepped and self._is_current:
            self._weights.no_step_was_made()
            self._forget_passes()
        self._has_noise = False
        self._noised.forget()
        self._weights.after_update()


def _is_frozen(optimizer: Optimizer) -> bool:
    """Return whether all weights are frozen, and no gradient is left."""
    held = held_by(optimizer)
    if any(p.requires_grad for p in held):
        return False
    return not any(p.grad is not None and bool(p.grad.any()) for p in held)
