"""Opacus's optimizers with a subclass that reports norms and noise of each update.

An optimizer stays the object that Opacus made. Its class is replaced by a subclass of
the same name that lets Opacus do its work and then reads what it did: the norms of the
samples that entered the update, and, when noise is drawn, how much. There is one
subclass for each way in which Opacus gets at norms: from per-example gradients, from
ghost clipping, and from the fast mode of this package.

Gradients, noise and random numbers are Opacus's to the bit. The subclass relies on
``add_noise`` being called exactly once for each update.
"""

from typing import Any

from opacus.grad_sample import GradSampleHooksNoOp
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from torch import Tensor

from opacus_pi._class_swap import swap_class
from opacus_pi.integration.accountants import noise_std_of
from opacus_pi.integration.explanations import explain_numbers_of_gradients
from opacus_pi.integration.fast import FastHooks
from opacus_pi.integration.grad_sample import joint_norms, row_norms
from opacus_pi.integration.opacus_compat import (
    clipped_norms,
    module_of,
    norms_of_parameters,
)
from opacus_pi.integration.update import UpdateUnderWay

_STALE_NORMS = (
    "Ghost clipping used a layer's gradient norms of an earlier batch again. This "
    "happens for a layer that was not used, and for a Linear layer with a "
    'four-dimensional input. Use grad_sample_mode="hooks".'
)
_TWO_BACKWARD_PASSES = (
    "Two backward passes preceded one optimizer.step(): ghost clipping keeps only the "
    'last batch. Step after each backward pass, or use grad_sample_mode="hooks".'
)
_TWO_CLIP_NORMS = (
    "Gradients were clipped to {clipped:g} and noised for {noised:g}: with ghost "
    "clipping a clip scheduler does not reach the model. Use "
    'grad_sample_mode="hooks".'
)


def report_updates(optimizer: DPOptimizer, update: UpdateUnderWay) -> None:
    """Have an optimizer report each of its updates.

    Args:
        optimizer: What Opacus made, changed in place.
        update: Receives the reports.
    """
    if isinstance(update.hooks, FastHooks):
        swap_class(optimizer, _reporting_fast)
    elif isinstance(optimizer, DPOptimizerFastGradientClipping):
        swap_class(optimizer, _reporting_ghost)
    else:
        swap_class(optimizer, _reporting_grad_samples)
    optimizer._pi_update = update
    if update.outside is not None:
        update.outside.watch(optimizer, module_of(update.hooks))


def _reporting(base: type) -> type:
    """Make the part that all modes share: reports of noise and of finished updates."""

    class Reporting(base):
        def add_noise(self) -> None:
            """Report the noise; called once for each update, and not if it is put off.

            ``BatchMemoryManager`` puts the update off until the last physical batch.
            """
            if self._pi_update.gate is not None:
                self._pi_update.gate.close(noise_std_of(self))
            super().add_noise()
            self._pi_update.noise_was_drawn(self)

        def step(self, *args: Any, **options: Any) -> float | None:
            result: float | None = super().step(*args, **options)
            self._pi_update.finish()
            return result

    return Reporting


def _reporting_grad_samples(base: Any) -> type:
    """Make an optimizer that has per-example gradients: hooks, functorch, ew, no_op."""
    # Adaptive clipping and the like read the gradients for more than their norms.
    reads_norms_only = base.clip_and_accumulate is DPOptimizer.clip_and_accumulate
    parent: Any = _reporting(base)

    class Recording(parent):
        _pi_norms_column: list[Tensor] | None = None

        @property
        def grad_samples(self) -> list[Tensor]:
            """Per-example gradients; within ``_pi_clip``, one column of their norms."""
            if self._pi_norms_column is not None:
                return self._pi_norms_column
            gradients: list[Tensor] = super().grad_samples
            return gradients

        def clip_and_accumulate(self) -> None:
            """Clip one physical batch and report its norms."""
            update = self._pi_update
            if update.gate is None:
                norms = self._pi_clip()
                update.add_batch(norms, self._pi_batch_sizes())
                return
            norms = self._pi_joint_norms([row_norms(g) for g in self.grad_samples])
            positions, norms = update.gate.admit(
                self.params,
                update.tracker.attribute(self._pi_batch_sizes()),
                norms,
                noise_std=noise_std_of(self),
                max_grad_norm=float(self.max_grad_norm),
            )
            super().clip_and_accumulate()
            update.add_samples(positions, norms)

        def _pi_clip(self) -> Tensor:
            """Clip as Opacus does, and return the norms from before.

            Opacus's ``clip_and_accumulate`` uses ``self.grad_samples`` only to take
            each example's norm over all parameters; the gradients that it sums it reads
            from the parameters. Computing the norms twice would cost a pass over all
            per-example gradients. Opacus is therefore given one column that holds the
            norms: the norm of a row with one entry is that entry, to the bit. If Opacus
            read a gradient from it, the shape would not fit and raise an error.

            Breaks if a subclass overrides ``clip_and_accumulate``, or if the norms have
            another precision than the gradients; both are excluded here.
            """
            held = self.grad_samples
            by_parameter = [row_norms(g) for g in held]
            pairs = zip(by_parameter, held, strict=True)
            same_norms = reads_norms_only and all(n.dtype == g.dtype for n, g in pairs)
            del held, pairs  # concatenated copies, if there were several passes
            norms = self._pi_joint_norms(by_parameter)
            self._pi_norms_column = [norms.unsqueeze(1)] if same_norms else None
            try:
                super().clip_and_accumulate()
            finally:
                self._pi_norms_column = None
            return norms

        def _pi_joint_norms(self, by_parameter: list[Tensor]) -> Tensor:
            """Norms over all parameters; an error names parameters of other lengths."""
            try:
                return joint_norms(by_parameter)
            except RuntimeError as error:
                counts = zip(self.params, map(len, by_parameter), strict=True)
                model = module_of(self._pi_update.hooks)
                explain_numbers_of_gradients(error, model, dict(counts))
                raise

        def _pi_batch_sizes(self) -> list[int]:
            """How many per-example gradients each backward pass left."""
            first = self.params[0].grad_sample
            passes = first if isinstance(first, list) else [first]
            is_no_op = isinstance(self._pi_update.hooks, GradSampleHooksNoOp)
            if is_no_op and len(passes) == 1:
                # the user's loop computed them, maybe without a backward pass
                self._pi_update.tracker.bind_gradients(first)
            return [len(g) for g in passes]

        def zero_grad(self, *args: Any, **options: Any) -> None:
            self._pi_update.tracker.discard()
            super().zero_grad(*args, **options)

    return Recording


def _reporting_fast(base: type) -> type:
    """Make an optimizer of the fast mode, which keeps the norms of its last step."""

    class Recording(_reporting(base)):  # type: ignore[misc]
        def clip_and_accumulate(self) -> None:
            """Clip all batches since the last step and report their norms."""
            super().clip_and_accumulate()
            norms = self.per_sample_gradient_norms.detach().clone()
            self._pi_update.add_batch(norms, self.batch_sizes)

        def zero_grad(self, *args: Any, **options: Any) -> None:
            self._pi_update.tracker.discard()
            super().zero_grad(*args, **options)

    return Recording


def _reporting_ghost(base: type) -> type:
    """Make an optimizer of ghost clipping, where the model clips and has the norms."""
    parent: Any = _reporting(base)

    class Recording(parent):
        _pi_norms: Tensor | None = None
        _pi_norms_of_parameters: tuple[Tensor | None, ...] = ()

        def accumulate(self) -> None:
            """Add one physical batch and report its norms."""
            super().accumulate()
            norms = clipped_norms(self._pi_update.hooks)
            if norms is not None and norms is not self._pi_norms:
                self._pi_norms = norms
                self._pi_require_fresh_norms()
                kept = norms.detach().clone()
                self._pi_update.add_batch(kept, [len(norms)], clipped_only=True)

        def _pi_require_fresh_norms(self) -> None:
            """Refuse norms that the last backward pass did not compute."""
            now = tuple(norms_of_parameters(self.params))
            before, self._pi_norms_of_parameters = self._pi_norms_of_parameters, now
            if any(a is not None and a is b for a, b in zip(now, before, strict=False)):
                self._pi_update.recorder.refuse(_STALE_NORMS)

        def zero_grad(self, *args: Any, **options: Any) -> None:
            tracker = self._pi_update.tracker
            has_incomplete_pass = tracker.awaits_second_backward()
            if tracker.discard(clipped_only=True) and has_incomplete_pass:
                self._pi_update.recorder.refuse(_TWO_BACKWARD_PASSES)
            super().zero_grad(*args, **options)

        def add_noise(self) -> None:
            clipped = float(self._pi_update.hooks.max_grad_norm)
            noised = float(self.max_grad_norm)
            if clipped != noised:
                self._pi_update.recorder.refuse(
                    _TWO_CLIP_NORMS.format(clipped=clipped, noised=noised)
                )
            super().add_noise()

    return Recording
