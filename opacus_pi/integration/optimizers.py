"""Opacus's optimizers with a subclass that reports norms and noise of each update.

An optimizer stays the object that Opacus made. Its class is replaced by a subclass of
the same name that lets Opacus do its work and then reads what it did: the norms of the
samples that entered the update, and, when noise is drawn, how much. Opacus gets at
norms in three ways, so there are three such classes:

* :class:`_FromGradSamples`: per-example gradients (hooks, functorch, ew, no_op);
* :class:`_FromCache`: the fast mode of this package, which keeps the norms of its step;
* :class:`_FromGhostClipping`: ghost clipping, where the model clips and has the norms.

Each derives from ``DPOptimizer`` and is put in front of the class that the optimizer
has, which may be any subclass of ``DPOptimizer`` (per-layer, adaptive, distributed):
``super()`` in a method below is that class.

**Guarantee.** Gradients, noise and random numbers are Opacus's to the bit.

**What breaks it.** An optimizer that does not call ``add_noise`` exactly once for each
update: every report is attached to that call.
"""

import weakref
from collections.abc import Sequence
from itertools import islice
from typing import Any, SupportsIndex

from opacus.optimizers import (
    AdaClipDPOptimizer,
    DPOptimizer,
    DPOptimizerFastGradientClipping,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from opacus_pi._class_swap import swap_class
from opacus_pi.custody.looks import Looks
from opacus_pi.integration.accountants import noise_std_of
from opacus_pi.integration.chosen_rates import ChosenRates
from opacus_pi.integration.chosen_settings import NOISE_AND_CLIPPING, ChosenSettings
from opacus_pi.integration.clip_norms import clip_norm_of
from opacus_pi.integration.derived import own_scaling, shadowed_method
from opacus_pi.integration.divisors import Divisor
from opacus_pi.integration.drawn_noise import missing_noise, repeated_noise
from opacus_pi.integration.explanations import (
    explain_numbers_of_gradients,
    explain_unfinished,
)
from opacus_pi.integration.fast import FastHooks
from opacus_pi.integration.grad_sample import joint_norms, row_norms
from opacus_pi.integration.held_weights import (
    FOREIGN,
    held_by,
    holds_others,
    ids_held_by,
)
from opacus_pi.integration.methods_in_use import MethodsInUse
from opacus_pi.integration.missing_values import number_in, require_noise
from opacus_pi.integration.opacus_compat import (
    clipped_norms,
    has_skipped_last_step,
    module_of,
    norms_of_parameters,
)
from opacus_pi.integration.update import UpdateUnderWay
from opacus_pi.integration.written_gradients import WrittenGradients, watch_gradients

_STALE_NORMS = (
    "For {}, ghost clipping used the gradient norms of an earlier batch. This happens "
    "if a layer was not used, or if a Linear layer has a four-dimensional input. Use "
    'grad_sample_mode="hooks".'
)
_TWO_BACKWARD_PASSES = (
    "There were two backward passes before one optimizer.step(), but ghost clipping "
    "keeps only the last batch. Call optimizer.step() after each backward pass, or use "
    'grad_sample_mode="hooks".'
)
_NOT_CLIPPED = (
    "backward() was called on a loss that was not computed by the criterion which "
    "make_private returned, for example by the criterion that was passed to it. Ghost "
    "clipping clips in the backward() of that criterion's losses only. So the update "
    "had gradients that were not clipped, and neither get_epsilon nor the ledger "
    "covers it. Compute the loss with the returned criterion."
)
_OTHER_PARAMETERS = (
    "The update changed other parameters than those whose gradient norms ghost "
    "clipping computed: requires_grad was changed after make_private, or a parameter "
    "is not in the optimizer. So gradients were not clipped to "
    "max_grad_norm. Call make_private after freezing or thawing layers, or use "
    'grad_sample_mode="hooks".'
)
_SHARDED = (
    "Under FSDP, gradient norms belong to parameters that exist only during a forward "
    "or backward pass. So it was not checked that the update changes exactly these "
    "parameters. Do not change requires_grad after make_private, and give every "
    "trainable parameter to the optimizer."
)
_TWO_CLIP_NORMS = (
    "Gradients were clipped to {clipped:g}, but the noise was scaled for a clip norm "
    "of {noised:g}: with ghost clipping, a clip scheduler does not change the model's "
    'clip norm. Use grad_sample_mode="hooks".'
)

_NOT_COPIED = (
    "{name} of Opacus can be neither copied nor pickled: torch would lose the "
    "optimizer that it wraps. Copy the model, make a new optimizer for the copy, and "
    "call make_private with both; optimizer.load_state_dict(other.state_dict()) copies "
    "momentum and learning rates."
)


def report_updates(optimizer: DPOptimizer, update: UpdateUnderWay) -> None:
    """Have an optimizer report each of its updates.

    Args:
        optimizer: What Opacus made, changed in place.
        update: Receives the reports.
    """
    has_own_scaling = own_scaling(optimizer) is not None
    if isinstance(update.hooks, FastHooks):
        swap_class(optimizer, _from_cache)
    elif isinstance(optimizer, DPOptimizerFastGradientClipping):
        swap_class(optimizer, _from_ghost_clipping)
    else:
        swap_class(optimizer, _from_grad_samples)
    optimizer._pi_update = update
    optimizer._pi_methods = MethodsInUse(optimizer, update.hooks)
    update.optimizer = weakref.ref(optimizer)
    optimizer._pi_has_own_scaling = has_own_scaling
    optimizer._pi_divisor = Divisor(optimizer, update.chain)
    optimizer._pi_chosen = ChosenSettings(update.chain)
    optimizer._pi_rates = ChosenRates(update.chain)
    optimizer._pi_looks = Looks()
    update.chain.keep_while(module_of(update.hooks), optimizer._pi_rates)
    optimizer._pi_written = watch_gradients(
        update.hooks, optimizer, update.tracker, update.chain
    )
    if update.outside is not None:
        update.outside.watch(optimizer, module_of(update.hooks), update.finish)


# ``swap_class`` calls one of these for each class of optimizer that it meets.
def _from_grad_samples(base: type[DPOptimizer]) -> type:
    """Return a subclass of an optimizer class with per-example gradients."""
    # Adaptive clipping and the like read the gradients for more than their norms.
    attributes = {
        "_pi_reads_norms_only": base.clip_and_accumulate
        is DPOptimizer.clip_and_accumulate,
        "_pi_clips_first": base.pre_step is DPOptimizer.pre_step,
    }
    return type(base.__name__, (_FromGradSamples, base), attributes)


def _from_cache(base: type[DPOptimizer]) -> type:
    """Return a subclass of an optimizer class that clips from the per-batch cache."""
    return type(base.__name__, (_FromCache, base), {})


def _from_ghost_clipping(base: type[DPOptimizer]) -> type:
    """Return a subclass of an optimizer class of ghost clipping."""
    return type(base.__name__, (_FromGhostClipping, base), {})


class _ReportingOptimizer(DPOptimizer):
    """Reports noise and finished updates, which is the same in all modes.

    Attributes:
        _pi_update: Receives the reports; set by ``report_updates``. All names of ours
            begin with ``_pi_``, so that they cannot meet a name of Opacus or the user.
        _pi_methods: Finds methods of Opacus that were replaced since.
        _pi_divisor: Finds sums that are divided by different numbers.
        _pi_chosen: Finds noise and clip norms that the loop chooses.
        _pi_rates: Finds learning rates that the loop chooses.
        _pi_looks: Counts updates, and says in which of them noise is looked at.
        _pi_has_own_scaling: Whether the class overrides Opacus's ``scale_grad``.
        _pi_written: Detects gradients that were changed before they are clipped.
    """

    _pi_update: UpdateUnderWay
    _pi_written: WrittenGradients
    _pi_methods: MethodsInUse
    _pi_divisor: Divisor
    _pi_chosen: ChosenSettings
    _pi_rates: ChosenRates
    _pi_looks: Looks
    _pi_has_own_scaling = False

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """Refuse copies and pickles, before torch tries to make one.

        Torch copies of an optimizer only what Opacus's optimizers do not have. The copy
        cannot be used, and its failure leaves the class without a working ``step``.
        """
        raise TypeError(_NOT_COPIED.format(name=type(self).__name__))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; notice that the loop sets noise or clipping in training."""
        if name in NOISE_AND_CLIPPING and "_pi_chosen" in vars(self):
            if self._pi_update.tracker.latest is not None:
                self._pi_chosen.is_set(name, getattr(self, name, None), value)
        super().__setattr__(name, value)

    def add_noise(self) -> None:
        """Add noise as Opacus does, and report it.

        Opacus calls this once for each update. Under ``BatchMemoryManager`` that is at
        the last physical batch only; the steps before are postponed.
        """
        noise_std = noise_std_of(self)
        require_noise(self, noise_std)
        if self._pi_update.gate is not None:
            self._pi_update.gate.close(noise_std)
        self._pi_written.require_unchanged_sums()
        self._pi_chosen.update_is_made(self)
        self._pi_rates.update_is_made(self)
        is_drawn_again = self._pi_update.is_drawn_again(self, noise_std)
        super().add_noise()
        self._pi_require_opacus()
        self._pi_require_noise(is_drawn_again)
        self._pi_update.noise_was_drawn(self)
        if self._pi_has_own_scaling or "scale_grad" in vars(self):
            self._pi_note_gradients()

    def _pi_require_opacus(self) -> bool:
        """Return whether the methods are those of Opacus; break a link if not."""
        chain, shadowed = self._pi_update.chain, shadowed_method(self)
        if shadowed is not None:
            chain.break_link("norm", shadowed, rules_out_epsilon=False)
        is_replaced = self._pi_methods.are_replaced(self)
        if is_replaced:
            replaced = self._pi_methods.reason(self)
            chain.break_link(*replaced, rules_out_epsilon=False)
        return shadowed is None and not is_replaced

    def _pi_require_noise(self, is_drawn_again: bool) -> None:
        """Break the link "noise" if less was added than is recorded, or the same again.

        A generator whose state does not change may also be one that nothing draws from.
        """
        reason = None
        is_looked_at = self._pi_looks.count()
        is_distributed = self._pi_update.outside is None
        is_known = not (is_distributed or isinstance(self, AdaClipDPOptimizer))
        if is_known and (is_drawn_again or is_looked_at):
            pairs = ((p.summed_grad, p.grad) for p in self.params)
            reason = missing_noise(pairs, noise_std_of(self))
        if reason is None and is_drawn_again:
            reason = repeated_noise(self._pi_update.recorder)
        if reason is not None:
            self._pi_update.chain.break_link("noise", reason)

    def scale_grad(self) -> None:
        """Scale the noised gradients as Opacus does, and note them.

        Opacus calls this after ``add_noise``, and then the step hooks and the optimizer
        that writes the weights. Nothing else should write to the gradients in between.
        """
        super().scale_grad()
        self._pi_divisor.is_used(self, self._pi_update.num_samples)
        if not self._pi_has_own_scaling:  # which may do more than to scale
            self._pi_note_gradients()

    def _pi_follow_weights(self) -> None:
        """Follow the weights of the optimizer, to which some may have been added.

        Weights that are not the model's break the link "norm".
        """
        update = self._pi_update
        if self._pi_written.follow(held_by(self)):
            if holds_others(self, module_of(update.hooks)):
                update.chain.break_link("norm", FOREIGN, rules_out_epsilon=False)

    def _pi_note_gradients(self) -> None:
        """Note the gradients as they are: they have noise."""
        if self._pi_update.outside is not None:
            self._pi_update.outside.gradients_were_noised(self.original_optimizer)

    def zero_grad(self, *args: Any, **options: Any) -> None:
        """Clear the gradients as Opacus does, and forget what was noted of them.

        An update whose step the loop has made by itself ends here.
        """
        self._pi_update.finish_if_written(waits=False)
        self._pi_update.gradients_were_cleared()
        self._pi_written.forget(sums=not has_skipped_last_step(self))
        super().zero_grad(*args, **options)

    def step(self, *args: Any, **options: Any) -> float | None:
        """Step as Opacus does, then report that the weights were written.

        Called for every physical batch. ``finish`` does nothing where no noise was
        drawn, because Opacus has then postponed the update.
        """
        result: float | None = super().step(*args, **options)
        self._pi_update.finish()
        return result


class _FromGradSamples(_ReportingOptimizer):
    """Reports norms that are taken from the per-example gradients.

    The norms are taken before Opacus clips, because clipping does not keep them.
    """

    # Whether clipping uses ``grad_samples`` only to take each example's norm.
    _pi_reads_norms_only: bool
    # Whether ``pre_step`` changes no gradients before it clips.
    _pi_clips_first: bool
    # What ``grad_samples`` returns instead of a new list: from ``pre_step`` on the
    # gradients, and during ``_pi_clip`` a column of norms, if Opacus reads only norms.
    _pi_listed: list[Tensor] | None = None
    # Within ``pre_step``: how many passes were accumulated; 0 if this was not read yet.
    _pi_iterations: int | None = None

    @property
    def accumulated_iterations(self) -> int:
        """Number of accumulated passes, which Opacus reads for every parameter."""
        if self._pi_iterations:
            return self._pi_iterations
        iterations: int = super().accumulated_iterations
        if self._pi_iterations is not None:
            self.__dict__["_pi_iterations"] = iterations
        return iterations

    @property
    def grad_samples(self) -> list[Tensor]:
        """Per-example gradients; within ``_pi_clip``, one column of their norms."""
        if self._pi_listed is not None:
            return self._pi_listed
        gradients: list[Tensor] = super().grad_samples
        return gradients

    def pre_step(self, *args: Any, **options: Any) -> bool | None:
        """Clip and add noise as Opacus does, which lists the gradients several times.

        Listing them takes time, and copies them where there were several passes.
        """
        own = self.__dict__  # each ``self.name = ...`` would call ``__setattr__``
        try:
            if self._pi_clips_first:
                own["_pi_listed"] = super().grad_samples
                own["_pi_iterations"] = 0 if self._pi_reads_norms_only else None
            goes_on: bool | None = super().pre_step(*args, **options)
        except ValueError as error:
            explain_unfinished(error, self.params)
            raise
        finally:
            own["_pi_listed"] = own["_pi_iterations"] = None
        return goes_on

    def clip_and_accumulate(self) -> None:
        """Clip one physical batch and report its norms.

        With a ``RenyiFilter`` the order is another one: samples are matched to examples
        and charged first, because a sample that cannot pay must not enter the sum.
        """
        update, written = self._pi_update, self._pi_written
        self._pi_follow_weights()
        update.was_clipped(clip_norm_of(self))
        written.require_unchanged()
        written.require_unchanged_sums()
        if update.gate is None:
            norms = self._pi_clip()
            update.add_batch(norms, self._pi_batch_sizes())
            written.note_sums()
            return
        norms = self._pi_joint_norms([row_norms(g) for g in self.grad_samples])
        self._pi_listed = None  # the filter changes them
        positions, norms = update.gate.admit(
            self.params,
            update.tracker.attribute(self._pi_batch_sizes(), norms=norms),
            norms,
            noise_std=noise_std_of(self),
            max_grad_norm=clip_norm_of(self),
        )
        super().clip_and_accumulate()
        update.add_samples(positions, norms)
        written.note_sums()

    def _pi_clip(self) -> Tensor:
        """Clip as Opacus does, and return the norms from before, ``(b,)``.

        Opacus's ``clip_and_accumulate`` uses ``self.grad_samples`` only to take each
        example's norm over all parameters; the gradients that it sums it reads from the
        parameters. Computing the norms twice would cost a pass over all per-example
        gradients. Opacus is therefore given one column that holds the norms: the norm
        of a row with one entry is that entry, to the bit. If Opacus read a gradient
        from it, the shape would not fit and raise an error.

        Breaks if a subclass overrides ``clip_and_accumulate``, or if the norms have
        another precision than the gradients; both are excluded here.
        """
        held = self.grad_samples
        by_parameter = [row_norms(g) for g in held]
        has_same_types = [n.dtype for n in by_parameter] == [g.dtype for g in held]
        norms = self._pi_joint_norms(by_parameter)
        del held  # concatenated copies, if there were several passes
        reads_norms_only = self._pi_reads_norms_only and self._pi_require_opacus()
        is_column = reads_norms_only and has_same_types
        self.__dict__["_pi_listed"] = [norms.unsqueeze(1)] if is_column else None
        try:
            super().clip_and_accumulate()
        finally:
            self.__dict__["_pi_listed"] = None
        return norms

    def _pi_joint_norms(self, by_parameter: list[Tensor]) -> Tensor:
        """Return norms over all parameters, ``(b,)``, from those of each parameter.

        Where parameters have different numbers of gradients, the error names them.
        """
        try:
            return joint_norms(by_parameter)
        except RuntimeError as error:
            counts = zip(self.params, map(len, by_parameter), strict=True)
            model = module_of(self._pi_update.hooks)
            explain_numbers_of_gradients(error, model, dict(counts))
            raise

    def _pi_batch_sizes(self) -> list[int]:
        """Return how many per-example gradients each backward pass left."""
        trained: Any = next(p for p in held_by(self) if p.requires_grad)
        first = trained.grad_sample
        if isinstance(first, list):  # several backward passes preceded the step
            return [len(gradients) for gradients in first]
        if self._pi_update.has_gradients_by_hand:
            # the user's loop computed them, maybe without a backward pass
            self._pi_update.tracker.bind_gradients(first)
        return [len(first)]

    def zero_grad(self, *args: Any, **options: Any) -> None:
        """Clear the gradients, and forget the forward passes that they came from."""
        self._pi_update.tracker.discard()
        super().zero_grad(*args, **options)


class _FromCache(_ReportingOptimizer):
    """Reports the norms that the fast mode keeps of its last step."""

    per_sample_gradient_norms: Tensor
    batch_sizes: list[int]

    def clip_and_accumulate(self) -> None:
        """Clip all batches since the last step and report their norms."""
        self._pi_follow_weights()
        self._pi_update.was_clipped(number_in(self, "max_grad_norm"))
        self._pi_written.require_unchanged_sums()
        super().clip_and_accumulate()
        self._pi_written.note_sums()
        # A copy: the recorder keeps it, and the attribute is the user's to change.
        norms = self.per_sample_gradient_norms.detach().clone()
        self._pi_update.add_batch(norms, self.batch_sizes)

    def zero_grad(self, *args: Any, **options: Any) -> None:
        """Clear the gradients, and forget the forward passes that they came from."""
        self._pi_update.tracker.discard()
        super().zero_grad(*args, **options)


class _FromGhostClipping(_ReportingOptimizer):
    """Reports the norms by which the model weighted the losses of its last batch.

    Ghost clipping runs two backward passes: the first one leaves the norms in the
    model, the second one computes the clipped gradient from weighted losses. The
    optimizer only adds up, and never sees gradients of single examples. Two mistakes
    are therefore checked for here, which in hooks mode cannot happen: norms that belong
    to an earlier batch, and a clip norm that differs from the model's.
    """

    # The norms reported last, as the object that Opacus keeps: a new batch has new
    # ones.
    _pi_norms: Tensor | None = None
    _pi_norms_of_parameters: Sequence[Tensor | None] = ()
    # The module's parameters, once they were listed.
    _pi_parameters: list[nn.Parameter] | None = None

    def accumulate(self) -> None:
        """Add one physical batch and report its norms."""
        self._pi_follow_weights()
        by_parameter = self._pi_require_same_parameters()
        self._pi_update.was_clipped(float(self._pi_update.hooks.max_grad_norm))
        if self._pi_update.tracker.ends_unclipped():
            if self._pi_require_opacus():
                self._pi_update.chain.break_link("norm", _NOT_CLIPPED)
        else:
            self._pi_written.require_unchanged()
        self._pi_written.require_unchanged_sums()
        super().accumulate()
        self._pi_written.note_sums()
        norms = clipped_norms(self._pi_update.hooks)
        if norms is not None and norms is not self._pi_norms:
            self._pi_norms = norms
            self._pi_require_fresh_norms(by_parameter)
            kept = norms.detach().clone()
            self._pi_update.add_batch(kept, [norms.shape[0]], clipped_only=True)

    def _pi_require_same_parameters(self) -> list[Tensor | None]:
        """Break the link "norm" if norm and update are of different parameters.

        Opacus adds up the norms of all parameters that have one, also if a parameter
        was frozen since; and a parameter that was thawed since has a gradient, but no
        norm. A parameter that the loss does not depend on has neither.

        Returns:
            The norms of each parameter of the module; of a sharded one, of each that
            the optimizer updates.
        """
        if self._pi_parameters is None:
            module = module_of(self._pi_update.hooks)
            is_sharded = isinstance(module, FSDPModule)
            if is_sharded:
                self._pi_update.chain.leave_unchecked("norm", _SHARDED, warn=False)
            self._pi_parameters = [] if is_sharded else list(module.parameters())
        if not self._pi_parameters:
            return norms_of_parameters(self.params)
        held = ids_held_by(self)
        norms = norms_of_parameters(self._pi_parameters)
        for parameter, norm in zip(self._pi_parameters, norms, strict=True):
            is_trained = parameter.requires_grad and id(parameter) in held
            lacks_norm = norm is None and is_trained and parameter.grad is not None
            if lacks_norm or (norm is not None and not is_trained):
                # the norm of a frozen weight makes others smaller than they need be
                self._pi_update.chain.break_link(
                    "norm", _OTHER_PARAMETERS, rules_out_epsilon=lacks_norm
                )
        return norms

    def _pi_require_fresh_norms(self, now: list[Tensor | None]) -> None:
        """Refuse norms that the last backward pass did not compute.

        Opacus keeps a norm for each parameter until it is overwritten. If a parameter
        still has the very tensor that it had before, its layer computed none now.

        Args:
            now: The norms of each parameter.
        """
        before, self._pi_norms_of_parameters = self._pi_norms_of_parameters, now
        pairs = enumerate(zip(now, before, strict=False))
        stale = [i for i, (new, old) in pairs if new is not None and new is old]
        if stale:
            parameters = self._pi_parameters or self.params
            ids = {id(parameters[i]) for i in stale}
            model = module_of(self._pi_update.hooks)
            names = (n for n, p in model.named_parameters() if id(p) in ids)
            listed = ", ".join(islice(names, 3))
            self._pi_update.chain.break_link("norm", _STALE_NORMS.format(listed))

    def zero_grad(self, *args: Any, **options: Any) -> None:
        """Clear the gradients; refuse the ledger if one of two batches is lost.

        Opacus's loss calls this between its two backward passes, too. A pass that is
        then complete belongs to an earlier batch, whose norms the model no longer has.
        """
        tracker = self._pi_update.tracker
        is_between = tracker.is_between_backwards
        # Passes that wait for their second backward pass are not discarded.
        if tracker.discard(clipped_only=is_between) and is_between:
            if tracker.awaits_second_backward():
                self._pi_update.chain.break_link(
                    "norm", _TWO_BACKWARD_PASSES, rules_out_epsilon=False
                )
        super().zero_grad(*args, **options)

    def add_noise(self) -> None:
        """Add noise; refuse the ledger if it is scaled for another clip norm."""
        clipped = float(self._pi_update.hooks.max_grad_norm)
        noised = float(self.max_grad_norm)
        if clipped != noised:
            reason = _TWO_CLIP_NORMS.format(clipped=clipped, noised=noised)
            self._pi_update.chain.break_link(
                "noise", reason, rules_out_epsilon=clipped > noised
            )
        super().add_noise()
