"""Compares the loss that the training loop computes with the criterion of an audit.

``engine.audit(criterion)`` looks at batches of its own, and takes the loop to call
``criterion(model(x), y)``. Whether it does is seen in its updates: a few of them are
repeated before they are made, by a copy of the model with the same weights, modes,
inputs and random numbers, and with the targets as the loader delivered them. The norms
of this copy must be those by which the update clipped, and the gradients of its outputs
must have the direction of the loop's.

*When.* In the first three updates after the audit, and in one update of each of the
periods 4 to 9, 10 to 99, 100 to 999 and 1,000 to 9,999 after it, which a generator of
this file draws. If an update has several forward passes (accumulated gradients,
``BatchMemoryManager``), at most four of them are compared: the first four in the first
update, later four that the generator draws. Passes with fewer than two examples are not
compared. If none of an update can be, the next 20 updates are tried.

*Guarantee.* Nothing of the comparison remains in the training: the copy shares nothing
with the model, a copy of the criterion is called, and random states are restored.

*What breaks it.* A criterion of the user is compared in these updates only. A loop that
computes another loss than this in a share s of the updates from 4 to 9,999, and not in
the first three, is missed with a probability of about (1 - s)^4. The link says that it
is assumed not to. For losses of torch, see ``glances``. Gradients that
are changed between ``backward()`` and ``step()``, so that their norms stay the same,
are not noticed. In mixed precision, neither are differences within its rounding.
Samples whose order is not known, because they look alike, are left out.
"""

import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opacus_pi.attribution import Tracker
from opacus_pi.attribution.delivery import Delivery, ForwardPass
from opacus_pi.attribution.lookalikes import rows_of_all
from opacus_pi.attribution.targets import in_order_of_pass
from opacus_pi.custody import Chain
from opacus_pi.custody.looks import Looks, few_updates
from opacus_pi.custody.repeated_loss import RepeatedLoss
from opacus_pi.gradients.fallback import MODEL_ERRORS
from opacus_pi.integration.audited_run import AuditedRun
from opacus_pi.integration.audited_update import (
    TrainedLoss,
    largest_gap,
    measuring,
    norms_of_update,
    rounding_of,
    times_as_large,
    user_criterion,
)
from opacus_pi.integration.glances import Glance, Glances
from opacus_pi.integration.held_weights import ids_held_by
from opacus_pi.integration.ignored_labels import IgnoredLabels
from opacus_pi.integration.loss_multiples import LossMultiples
from opacus_pi.models.batches import floating, inputs_and_targets, to_device
from opacus_pi.models.copies import training_copy
from opacus_pi.models.forward_call import ForwardCall
from opacus_pi.models.known_losses import is_known_loss, label_mean_of
from opacus_pi.models.output_gradients import OutputGradients
from opacus_pi.models.precision import Precision
from opacus_pi.recording import Recorder

__all__ = ["LoopLoss", "not_compared"]

_MAX_ATTEMPTS = 20  # updates
_MAX_PASSES = 4  # of an update that are compared
_ZERO = 1e-6  # of the largest norm
_ALIKE = 1e-3  # relative difference of two ratios of norms

_AWAITED = (
    "engine.audit found the criterion to be right, but it could not be checked whether "
    "the training loop computes this loss: {cause}"
)
_NO_UPDATE = (
    "no update was made since the audit. Call engine.audit(criterion) before training."
)
_NO_SAMPLES = (
    "no update since the audit clipped two or more samples of a batch together, which "
    "the comparison needs. Use larger batches. Under a RenyiFilter, which chooses the "
    "samples of each update, none is compared: audit the loop in a run without it."
)
_SWEPT = "the recorded norms are measured by sweeps, and are not those of the updates."
_SAME = (
    "engine.audit found the criterion to be right, and the training loop used it: the "
    "norms of {count} compared update(s) were those of criterion(model(x), y).{also}"
)
_ALSO = (
    " So were the gradients of the model's outputs in the first 64 updates, and in one "
    "of eight later ones."
)
_AVERAGED = (
    "engine.audit found the criterion to be right, and the training loop used it: the "
    "norms of {count} compared update(s) were {ratio:.4g} times those of "
    "criterion(model(x), y), as if each loss were divided by the number of "
    "accumulated batches.{also}"
)
_OWN = (
    "engine.audit found the criterion to be right, and in the updates that were "
    "compared the training loop used it: the norms were those of "
    "criterion(model(x), y). The criterion is not one of torch's losses. It may couple "
    "examples in some batches only, for example by the mean over the entries that a "
    "mask keeps, or by leaving outliers out. For the updates that were not compared it "
    "is assumed that it does not."
)
_ONLY_SINCE = (
    "The loss of the first {num} update(s) was not compared, because engine.audit was "
    "called after them. Call it before training. {found}"
)
_CONSEQUENCE = (
    "So the loss of the training loop is not the one that was audited, or gradients "
    "were changed between backward() and step(). Whether a gradient belongs to one "
    "example is not known. {remedy}"
)
_REMEDY = (
    "Call criterion(model(x), y) with the targets of the same samples, put every other "
    "step of the loss into the criterion, and audit that criterion."
)
_ORDER = (
    "The training loop gave the model the samples of a delivered batch in another "
    "order than it gave the criterion their targets: the norms of an update were those "
    "of inputs with the targets of other examples. So each loss depends on two "
    "examples, and max_grad_norm bounds neither. Apply one permutation to inputs and "
    "targets."
)
_LEFT_OUT = (
    "In an update, {count} of {size} examples had no gradient, although the audited "
    "criterion gives them one. " + _CONSEQUENCE + " If the loop chooses examples by "
    "their losses, one example decides whether others are used, and no accounting "
    "covers that."
)
_OTHER_DIRECTION = (
    "In an update, the gradients of the model's outputs were not those of the audited "
    "criterion, although their norms were. " + _CONSEQUENCE
)
_OTHER_OUTPUTS = (
    "In an update, the gradients of the loss with respect to the model's outputs were "
    "not those of the audited criterion. " + _CONSEQUENCE
)
_BY_PASS = (
    "An update had several backward passes. Within each of them, all gradients were "
    "the same multiple of those of the audited criterion, but the multiples are "
    "{low:.3g} to {high:.3g}. This happens if a batch is split into unequal parts, and "
    "the loss of each part is weighted by its size: Opacus multiplies gradients by the "
    "number of examples of their own pass. So the examples of small parts count less. "
    "Call backward() on criterion(model(x), y) of each part, without a weight."
)
_OTHER = (
    "In an update, the norms by which gradients were clipped were {times} as those of "
    "the audited criterion. " + _CONSEQUENCE
)
_ASSUMED_ORDER = (
    "The norms of an update were not those of the audited criterion, but the order of "
    "its samples is only assumed, because the loop computed its inputs anew. So it is "
    "not known whether the loop computes the audited loss. Compute inputs in the data "
    "set instead."
)
_NOT_SEEN = (
    "the samples of the compared updates could not be matched to a batch that the "
    "loader delivered since the audit."
)
_ALL_ALIKE = (
    "the samples of the compared updates look alike, and their order is not known."
)
_NO_TARGETS = (
    "the delivered batch is neither a pair (x, y) nor a dict with "
    '"labels", so its targets are not known.'
)
_NOT_REPEATABLE = (
    "a copy of the model gave other outputs for the same inputs and random numbers, as "
    "a model does that keeps a state outside its parameters and buffers. If the state "
    "is computed from inputs, such as a running mean, examples of earlier batches act "
    "on later outputs without clipping and without noise: remove it."
)
_NOT_RUN = "a copy of the model could not be trained: {error}."


def not_compared(chain: Chain) -> None:
    """Say that the loop of a run whose norms are swept is not compared.

    Args:
        chain: The chain of custody of the run.
    """
    chain.await_check("loss", _AWAITED.format(cause=_SWEPT))


class _NotCompared(Exception):
    """An update cannot be compared; the message says why."""


@dataclass(frozen=True)
class _Kept:
    """A forward pass of the loop, with copies of its outputs.

    Args:
        call: The pass.
        outputs: Its floating-point outputs.
        gradients: Their gradients, once there was a backward pass.
    """

    call: ForwardCall
    outputs: list[Tensor]
    gradients: OutputGradients


@dataclass(frozen=True)
class _Measured:
    """What one forward pass is compared by.

    Args:
        forward: The pass.
        norms: Norms of gradients, float64 ``(b,)``.
        gradients: Gradients of the outputs, float64 ``(b, k)``.
        coupling: Why the criterion gives no sample a loss of its own; empty if it does.
    """

    forward: ForwardPass
    norms: Tensor
    gradients: Tensor
    coupling: str = ""

    def in_known_order(self) -> "_Measured":
        """Return this without the samples whose order is not known."""
        keep = torch.ones(len(self.norms), dtype=torch.bool)
        keep[torch.from_numpy(rows_of_all(self.forward.alike))] = False
        return replace(self, norms=self.norms[keep], gradients=self.gradients[keep])


class _BeforeForward:
    """The pre-hook of the model; copies and pickles of it do nothing.

    Args:
        begin: A method that is called with model, inputs and inputs by keyword; its
            object is referred to weakly.
    """

    def __init__(self, begin: Callable[..., None] | None = None) -> None:
        self._begin = None if begin is None else weakref.WeakMethod(begin)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Record that a forward pass begins."""
        begin = None if self._begin is None else self._begin()
        if begin is not None:
            begin(module, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _BeforeForward, ()


class LoopLoss:
    """Compares a few updates with a criterion that was audited.

    Args:
        criterion: What was audited.
        run: How the run was prepared.
        tracker: Knows the forward passes and the delivered batches.
        chain: The chain of custody; gets the results as its link "loss".
        new_engine: Returns an engine that reports to a recorder.
        num_steps: The number of updates that were made before.
        num_before: How many of them were compared with nothing.

    Attributes:
        num_compared: The number of updates that were compared.
        num_before: The number of earlier updates that were compared with nothing.
        optimizer: The optimizer of the run, referred to weakly.
    """

    def __init__(
        self,
        criterion: Any,
        run: AuditedRun,
        tracker: Tracker,
        chain: Chain,
        new_engine: Callable[[Recorder], Any],
        *,
        num_steps: int = 0,
        num_before: int = 0,
    ) -> None:
        self._criterion, self._run = criterion, run
        users, is_ghost = user_criterion(criterion), run.mode.startswith("ghost")
        self._repeated = RepeatedLoss(users, chain)
        # Ghost clipping is given the criterion, whose probe looks at more batches, and
        # takes the mean over each example's own labels.
        is_known = is_known_loss(users)
        mean = label_mean_of(users) if is_known and not is_ghost else None
        self._labels = None if mean is None else IgnoredLabels(users, mean, chain)
        self._is_assumed = not is_ghost and not is_known
        self._multiples, self._glances = LossMultiples(chain), None
        if is_known and not is_ghost:
            self._glances = Glances(
                users,
                chain,
                batch_dim=run.batch_dim,
                is_summed=run.loss_reduction == "sum",
                tell_other=self._tell_other,
                multiples=self._multiples,
            )
        self._tracker, self._chain, self._new_engine = tracker, chain, new_engine
        self._num_steps, self.num_before = num_steps, num_before
        self._draws = random.Random(0)  # no secret: it only spreads the checks
        self._looks = Looks(few_updates(self._draws))
        self.num_compared = self._num_attempts = 0
        self._had_samples = self._has_compared = False
        self._num_passes, self._chosen = 0, set(range(_MAX_PASSES))
        self._precision = Precision()
        self._ratios: list[float] = []
        self._are_averages: list[bool] = []
        self._begun: ForwardCall | None = None
        self._handle: RemovableHandle | None = None
        self._module: weakref.ref[nn.Module] | None = None
        self.optimizer: weakref.ref[Any] | None = None

    # ------------------------------------------------------------ what the run reports
    def begin(self, hooked: nn.Module, module: nn.Module) -> None:
        """Compare updates from now on.

        Args:
            hooked: What the loop calls, and whose hooks run.
            module: The user's module.
        """
        self._module = weakref.ref(module)
        self._handle = hooked.register_forward_pre_hook(
            _BeforeForward(self._forward_begins), prepend=True, with_kwargs=True
        )
        self._chain.await_check("loss", _AWAITED.format(cause=_NO_UPDATE))
        is_looking = self._labels is not None or self._glances is not None
        self._tracker.looks_at_batch = self._saw_batch if is_looking else None
        self._arm()

    def end(self) -> None:
        """Compare no further update."""
        self._looks.end()
        self._labels = self._glances = None
        self._tracker.looks_at_batch = None
        if self._handle is not None:
            self._handle.remove()
        self._arm()

    @property
    def _has_ignored(self) -> bool:
        """Whether the update of a batch with ignored labels is to be compared."""
        return self._labels is not None and self._labels.is_waiting

    @property
    def _is_armed(self) -> bool:
        """Whether the update under way is to be compared."""
        return self._looks.is_due or self._has_ignored

    @property
    def _is_glanced_at(self) -> bool:
        """Whether only the outputs of the update under way are compared."""
        glances = self._glances
        return glances is not None and glances.is_due and not self._is_armed

    def _arm(self) -> None:
        """Have batches and passes kept if the update under way is to be compared."""
        # one update ahead: a loop may get its next batch before it steps
        self._tracker.keeps_batches = self._looks.is_near
        is_watching = self._is_armed or self._is_glanced_at
        self._tracker.saw_pass = self._saw_pass if is_watching else None

    def _saw_batch(self, delivery: Delivery, batch: Any) -> bool:
        """Return whether to keep a batch that is delivered, for its ignored labels."""
        if self._glances is not None:
            self._glances.saw_batch(delivery, batch)
        if self._labels is None or not self._labels.saw(delivery, batch):
            return False
        self._arm()
        return True

    def _forward_begins(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Note the random state and the inputs of a pass in training mode."""
        self._begun = None
        if not module.training or not torch.is_grad_enabled():
            return
        is_chosen = self._num_passes in self._chosen or self._has_ignored
        if self._is_armed and is_chosen:
            call = ForwardCall.now(module, args, kwargs)
            self._begun = call.with_copied_inputs()
        self._num_passes += 1

    def _saw_pass(self, forward: ForwardPass, outputs: Any) -> None:
        """Keep what a pass needs to be repeated, with the pass itself."""
        begun, self._begun = self._begun, None
        if begun is not None:
            copies = [x.detach().clone() for x in floating(outputs).values()]
            forward.call = _Kept(begun, copies, OutputGradients(outputs))
        elif self._is_glanced_at and self._num_passes - 1 in self._chosen:
            forward.call = Glance.at(outputs)

    def update_was_made(self) -> None:
        """Record that an update is complete."""
        looks = self._looks
        if looks.are_over and not self._has_ignored and self._glances is None:
            return
        if not self._had_samples:
            self._chain.await_check("loss", _AWAITED.format(cause=_NO_SAMPLES))
        self._choose_passes()
        self.num_compared += self._has_compared
        self._num_attempts += looks.is_due
        is_done = self._has_compared or self._num_attempts > _MAX_ATTEMPTS
        if looks.count(is_done=is_done) and is_done:
            self._num_attempts = 0
        self._has_compared = False
        if self._labels is not None:
            self._labels.update_was_made()
        if self._glances is not None:
            self._glances.update_was_made()
        if looks.are_over and self._labels is None and self._glances is None:
            self.end()
        self._arm()

    def _choose_passes(self) -> None:
        """Choose the passes of the next update that may be compared."""
        num, self._num_passes = self._num_passes, 0
        if num > _MAX_PASSES:
            self._chosen = set(self._draws.sample(range(num), _MAX_PASSES))
        else:
            self._chosen = set(range(_MAX_PASSES))

    # ------------------------------------------------------------------ the comparison
    def compare(self, passes: Sequence[ForwardPass], norms: Tensor) -> None:
        """Compare the norms of a physical batch, if its update was chosen for that.

        Args:
            passes: The forward passes whose gradients were clipped.
            norms: Their norms before clipping, ``(b,)``.
        """
        labels = self._labels
        if labels is not None and len(norms) > 1:
            labels.entered(passes)
        if self._is_glanced_at and self._glances is not None:
            self._glances.compare(passes)
        if not self._is_armed or len(norms) < 2:
            return
        self._had_samples = True
        made, expected, start = [], [], 0
        for forward in passes:
            own = norms[start : start + (forward.num_samples or 0)]
            start += len(own)
            if forward.call is None and forward.delivery is not None:
                self._left_out(forward)
                continue
            try:
                wanted = self._expected(forward)
                if len(wanted.norms) == len(own):
                    expected.append(wanted)
                    made.append(self._made(forward, own))
            except _NotCompared as reason:
                cause = str(reason)
                self._chain.await_check("loss", _AWAITED.format(cause=cause))
        clear = [
            (one.in_known_order(), other.in_known_order())
            for one, other in zip(made, expected, strict=True)
        ]
        judged: list[ForwardPass] = []
        if sum(len(one.norms) for one, _ in clear) > 1:
            self._has_compared = True
            self._judge(clear, len(passes))
            judged = [one.forward for one, _ in clear]
        elif made:
            self._chain.await_check("loss", _AWAITED.format(cause=_ALL_ALIKE))
        if labels is not None:
            labels.compared(passes, judged)

    def _left_out(self, forward: ForwardPass) -> None:
        """Note a pass that is not compared, perhaps because it began too early.

        If that was before the audit, the audit does not cover the update.
        """
        if not self._looks.num_past and self._num_passes <= _MAX_PASSES:
            self.num_before = self._num_steps + 1

    def _made(self, forward: ForwardPass, norms: Tensor) -> _Measured:
        """Return what the loop has made of a pass, with its norms ``(b,)``."""
        rows = forward.call.gradients.by_example(len(norms), self._run.batch_dim)
        return _Measured(forward, norms.double().cpu(), rows)

    def _expected(self, forward: ForwardPass, *, moved: bool = False) -> _Measured:
        """Return what the audited criterion gives the samples of a pass.

        Args:
            forward: The pass.
            moved: Whether to give the criterion the targets in the delivered order.

        Raises:
            _NotCompared: If that is impossible.
        """
        kept, targets = forward.call, self._targets(forward, moved=moved)
        if not isinstance(kept, _Kept):
            raise _NotCompared(_NOT_SEEN)
        call, model = kept.call, self._copy()
        try:
            with measuring(drops=True), self._precision:
                norms, outputs, gradients = norms_of_update(
                    model,
                    TrainedLoss(self._criterion, self._run),
                    (call.args, call.kwargs, to_device(targets, _device_of(kept))),
                    self._run,
                    self._new_engine,
                    call.surroundings(),
                )
        except MODEL_ERRORS as error:
            lines = str(error).splitlines() or [""]
            what = f"{type(error).__name__}: {lines[0]}".rstrip(":. ")
            raise _NotCompared(_NOT_RUN.format(error=what)) from None
        if not _are_close(kept.outputs, list(floating(outputs).values())):
            raise _NotCompared(_NOT_REPEATABLE)
        if not moved:
            self._repeated.compare(outputs, targets)
        rows = gradients.by_example(len(norms), self._run.batch_dim)
        coupling = "" if self._labels is None else self._labels.coupling(targets)
        return _Measured(forward, norms, rows, coupling)

    def _targets(self, forward: ForwardPass, *, moved: bool) -> Any:
        """Return the delivered targets of the samples of a pass, in its order.

        Args:
            forward: The pass.
            moved: Whether to return them in the order of the delivery.

        Raises:
            _NotCompared: If they are not known.
        """
        delivery = forward.delivery
        if delivery is None or delivery.batch is None:
            raise _NotCompared(_NOT_SEEN)
        try:
            _, targets = inputs_and_targets(delivery.batch)
        except ValueError:
            raise _NotCompared(_NO_TARGETS) from None
        dim = self._run.batch_dim
        rows = in_order_of_pass(forward, targets, dim, as_delivered=moved)
        if rows is None:
            raise _NotCompared(_NOT_SEEN)
        return rows

    def _copy(self) -> nn.Module:
        """Return a copy of the model that trains what the run trains."""
        module = None if self._module is None else self._module()
        optimizer = None if self.optimizer is None else self.optimizer()
        if module is None or optimizer is None:
            raise _NotCompared(_NOT_SEEN)
        copied = training_copy(module)
        held = ids_held_by(optimizer)
        for live, own in zip(module.parameters(), copied.parameters(), strict=False):
            own.requires_grad_(live.requires_grad and id(live) in held)
        return copied

    def _judge(
        self, pairs: Sequence[tuple[_Measured, _Measured]], num_passes: int
    ) -> None:
        """Tell the chain how what the loop made compares with what was expected.

        Args:
            pairs: What was made and expected in each pass.
            num_passes: The number of passes whose gradients were clipped together.
        """
        passes = [made.forward for made, _ in pairs]
        norms = torch.cat([made.norms for made, _ in pairs])
        expected = torch.cat([wanted.norms for _, wanted in pairs])
        tolerance = self._tolerance()
        ratio = float(norms.norm() / expected.norm().clamp(min=1e-300))
        ratio = 1.0 if largest_gap(norms, expected) <= tolerance else ratio
        if ratio > 0 and largest_gap(norms / ratio, expected) <= tolerance:
            signs = {s for pair in pairs if (s := _sign(*pair, tolerance)) is not None}
            if 0 in signs:
                self._refuse_or_doubt(_OTHER_DIRECTION.format(remedy=_REMEDY), passes)
                return
            coupled = [wanted.coupling for _, wanted in pairs if wanted.coupling]
            for sign in sorted(signs) or [1]:
                self._accept(sign * ratio, num_passes, "".join(coupled[:1]))
            self._note_factors(pairs, num_passes)
            if coupled and (self._are_averages[-1] or abs(ratio - 1) < _ALIKE):
                self._chain.break_link("loss", coupled[0])
        else:
            self._refuse_or_doubt(self._reason(norms, expected, pairs), passes)

    def _note_factors(
        self, pairs: Sequence[tuple[_Measured, _Measured]], num_passes: int
    ) -> None:
        """Have later gradients of outputs compared with the factors of these.

        Args:
            pairs: As for ``_judge``.
            num_passes: As for ``_judge``.
        """
        for made, wanted in pairs:
            sign = _sign(made, wanted, _ALIKE)
            is_mixed = made.forward.call.call.mixed_type is not None
            if self._glances is not None and sign and not is_mixed:
                factor = sign * float(made.gradients.norm() / wanted.gradients.norm())
                size = made.forward.num_samples or 0
                self._multiples.saw(factor, size=size, num_passes=num_passes)

    def _tell_other(self, num_left_out: int, size: int) -> None:
        """Break the link: the outputs of an update had other gradients.

        Args:
            num_left_out: How many examples had no gradient.
            size: The number of examples that were compared.
        """
        reason = _LEFT_OUT if num_left_out else _OTHER_OUTPUTS
        text = reason.format(count=num_left_out, size=size, remedy=_REMEDY)
        self._chain.break_link("loss", text, rules_out_epsilon=False)

    def _refuse_or_doubt(self, reason: str, passes: Sequence[ForwardPass]) -> None:
        """Break the link, if the examples of all samples are known."""
        if all(forward.is_recognised for forward in passes):
            shown = reason is _ORDER
            self._chain.break_link("loss", reason, rules_out_epsilon=shown)
        else:
            self._chain.leave_unchecked("loss", _ASSUMED_ORDER)

    def _accept(self, ratio: float, num_passes: int, coupling: str) -> None:
        """Tell the chain that all gradients are a multiple of those expected.

        Args:
            ratio: The factor.
            num_passes: The number of passes whose gradients were clipped together.
            coupling: Why the criterion gives the examples no loss of their own; empty
                if each has one.
        """
        self._are_averages.append(abs(ratio * num_passes - 1) < _ALIKE)
        self._ratios.append(ratio)
        count, also = self.num_compared + 1, _ALSO if self._glances else ""
        others = [r for r in self._ratios if abs(r - ratio) > _ALIKE * abs(ratio)]
        if others and not all(self._are_averages):
            self._multiples.varies(ratio, others[-1], coupling=coupling)
        elif abs(ratio - 1) < _ALIKE and not others:
            self._check(_SAME.format(count=count, also=also))
        elif any(self._are_averages):
            self._check(_AVERAGED.format(count=count, ratio=ratio, also=also))
        else:
            self._multiples.is_scaled(ratio)

    def _check(self, found: str) -> None:
        """Tell the chain that the loop used the criterion.

        Args:
            found: What was compared.
        """
        if self._is_assumed:
            self._chain.leave_unchecked("loss", _OWN, warn=False)
        if self.num_before:
            text = _ONLY_SINCE.format(num=self.num_before, found=found)
            self._chain.await_check("loss", text)
        else:
            self._chain.check("loss", found)

    def _reason(
        self,
        norms: Tensor,
        expected: Tensor,
        pairs: Sequence[tuple[_Measured, _Measured]],
    ) -> str:
        """Say why norms are not those expected."""
        if all(self._has_moved_targets(made) for made, _ in pairs):
            return _ORDER
        least = _ZERO * float(expected.max())
        is_left_out = (norms <= least) & (expected > least)
        if is_left_out.any():
            count = int(is_left_out.sum())
            return _LEFT_OUT.format(count=count, size=len(norms), remedy=_REMEDY)
        if self._is_scaled_by_pass(pairs):
            ratios = norms / expected.clamp(min=1e-300)
            low, high = float(ratios.min()), float(ratios.max())
            return _BY_PASS.format(low=low, high=high)
        times = times_as_large(norms, expected)
        return _OTHER.format(times=times, remedy=_REMEDY)

    def _is_scaled_by_pass(self, pairs: Sequence[tuple[_Measured, _Measured]]) -> bool:
        """Return whether norms of each pass are one multiple of those expected."""
        for made, wanted in pairs:
            ratio = float(made.norms.norm() / wanted.norms.norm().clamp(min=1e-300))
            gap = largest_gap(made.norms / max(ratio, 1e-300), wanted.norms)
            if not ratio or gap > self._tolerance():
                return False
        return len(pairs) > 1

    def _has_moved_targets(self, made: _Measured) -> bool:
        """Return whether the targets were those of the batch in its delivered order."""
        try:
            moved = self._expected(made.forward, moved=True)
        except _NotCompared:
            return False
        if len(moved.norms) != len(made.norms):  # some samples look alike
            return False
        return largest_gap(made.norms, moved.norms) <= self._tolerance()

    def _tolerance(self) -> float:
        """Return the difference, relative to the largest norm, that rounding causes."""
        module = None if self._module is None else self._module()
        return 1e-3 if module is None else rounding_of(module, self._precision)


def _sign(made: _Measured, expected: _Measured, tolerance: float) -> int | None:
    """Return the sign of the factor between two sets of gradients of outputs.

    Their scale is not compared: mixed precision changes it before norms are taken.

    Returns:
        1 or -1; 0 if one is no multiple of the other; None if they cannot be compared.
    """
    one, other = made.gradients, expected.gradients
    if one.shape != other.shape or not bool(torch.isfinite(one).all()):
        return None
    length, expected_length = float(one.norm()), float(other.norm())
    if not length or not expected_length:
        return None
    product = float((one * other).sum()) / length / expected_length
    sign = 1 if product > 0 else -1
    gap = float((one / length - sign * other / expected_length).norm())
    return sign if gap <= tolerance else 0


def _device_of(kept: _Kept) -> torch.device:
    """Return the device of the outputs of a pass."""
    return kept.outputs[0].device if kept.outputs else torch.device("cpu")


def _are_close(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Return whether two lists of outputs are equal up to rounding."""
    if [x.shape for x in one] != [x.shape for x in other]:
        return False
    for a, b in zip(one, other, strict=True):
        rounding = 64 * torch.finfo(a.dtype).eps
        scale = float(a.abs().max()) if a.numel() else 0.0
        if not torch.allclose(a, b, rtol=0.0, atol=rounding * scale, equal_nan=True):
            return False
    return True
