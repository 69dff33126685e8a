"""Opacus's optimizers, reporting each update's rows, norms and noise to a recorder.

An optimizer stays the object and the class that Opacus made, plus a subclass that lets
it do its work and then reads: the norms of the rows that entered the update, and, when
the noise is drawn, how much noise it was.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import AbstractGradSampleHooks
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_pi import refusals
from opacus_pi.attribution import Tracker
from opacus_pi.class_swap import swap_class
from opacus_pi.grad_sample import grad_sample_norms
from opacus_pi.recorder import Recorder


def noise_std_of(optimizer: DPOptimizer) -> float:
    """Standard deviation of the noise that an optimizer adds to the summed gradient.

    Adaptive clipping spends part of its noise multiplier on counting the examples that
    were not clipped, and draws gradient noise with the rest (Andrew et al. 2021,
    arXiv:1905.03871, Theorem 1).
    """
    multiplier = float(optimizer.noise_multiplier)
    counting = getattr(optimizer, "unclipped_num_std", None)
    if counting is not None and multiplier > 0:
        multiplier = (multiplier**-2 - (2 * counting) ** -2) ** -0.5
    multiplier = getattr(optimizer, "_adjusted_noise_multiplier", multiplier)
    return float(multiplier) * float(optimizer.max_grad_norm)


@dataclass(eq=False)
class PrivateRun:
    """What one ``make_private`` call ties together.

    Args:
        recorder: Where to report to.
        tracker: Who knows which examples the rows are.
        hooks: What ``make_private`` returned for the model.
        sample_rate: The rate that Opacus's accountant is told.
        loader: The loader, while the run is being prepared.
        superseded: Whether the engine has prepared another run since.
    """

    recorder: Recorder
    tracker: Tracker
    hooks: AbstractGradSampleHooks
    sample_rate: float = 0.0
    loader: DataLoader | None = None
    superseded: bool = False
    entered: list[np.ndarray] = field(default_factory=list)
    batch_norms: list[nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.batch_norms = refusals.batch_norms(self.hooks)

    def observe(self, rows: np.ndarray, norms: Tensor) -> None:
        """Rows of a physical batch entered the update to come."""
        self.entered.append(rows[rows >= 0])
        known = np.flatnonzero(rows >= 0)
        if len(known) < len(rows):
            norms = norms[torch.from_numpy(known).to(norms.device)]
        if len(known) and not self.superseded:
            self.recorder.observe(torch.from_numpy(rows[known]), norms)

    def commit(self, optimizer: DPOptimizer) -> None:
        """The noise of an update was drawn."""
        entered, self.entered = self.entered, []
        if self.superseded:
            self.recorder.refuse(
                "An optimizer of an earlier make_private call was used after a later "
                "one: the ledger holds one run. Use one PrivacyEngine for each run."
            )
            return
        mixed = refusals.batch_statistics(self.batch_norms)
        if mixed:
            self.recorder.refuse(mixed)
        everyone = np.concatenate([np.empty(0, np.int64), *entered])
        if len(np.unique(everyone)) < len(everyone):
            self.recorder.refuse(
                "An example entered one update more than once, so max_grad_norm does "
                "not bound what it contributes. Draw each example at most once per "
                "optimizer.step()."
            )
        self.recorder.step(
            noise_std=noise_std_of(optimizer),
            max_grad_norm=float(optimizer.max_grad_norm),
            sample_rate=min(1.0, self.sample_rate * optimizer.accumulated_iterations),
        )


def record(optimizer: DPOptimizer, run: PrivateRun) -> DPOptimizer:
    """Have an optimizer report to a run.

    Args:
        optimizer: What Opacus made, changed in place.
        run: Whom to tell.

    Returns:
        The same object.
    """
    is_ghost = isinstance(optimizer, DPOptimizerFastGradientClipping)
    swap_class(optimizer, _from_norms if is_ghost else _from_grad_samples)
    optimizer._pi_run = run
    return optimizer


def _from_grad_samples(base: type) -> type:
    """An optimizer that clips per-example gradients: hooks, functorch, ew, no_op."""

    class Recording(base):
        def clip_and_accumulate(self) -> None:
            super().clip_and_accumulate()
            run, parameters = self._pi_run, self.params
            passes = [_as_list(p.grad_sample) for p in parameters]
            rows = run.tracker.attribute([len(g) for g in passes[0]])
            norms = [
                grad_sample_norms(of_pass) for of_pass in zip(*passes, strict=True)
            ]
            run.observe(rows, torch.cat(norms))

        def zero_grad(self, *args: Any, **options: Any) -> None:
            self._pi_run.tracker.discard()
            super().zero_grad(*args, **options)

        def add_noise(self) -> None:  # once per update, and not when it is put off
            super().add_noise()
            self._pi_run.commit(self)

    return Recording


def _from_norms(base: type) -> type:
    """An optimizer of ghost clipping: the model clips and keeps the norms."""

    class Recording(base):
        _pi_norms: Tensor | None = None
        _pi_of_parameters: tuple = ()

        def accumulate(self) -> None:  # once for each physical batch that enters
            super().accumulate()
            run = self._pi_run
            norms = run.hooks._per_sample_gradient_norms
            if norms is not None and norms is not self._pi_norms:
                self._pi_norms = norms
                self._pi_check_fresh()
                rows = run.tracker.attribute([len(norms)], clipped_only=True)
                run.observe(rows, norms.detach())

        def _pi_check_fresh(self) -> None:
            """Refuse norms that the last backward pass did not compute."""
            now = tuple(getattr(p, "_norm_sample", None) for p in self.params)
            before, self._pi_of_parameters = self._pi_of_parameters, now
            if any(a is not None and a is b for a, b in zip(now, before, strict=False)):
                self._pi_run.recorder.refuse(
                    "Ghost clipping used a layer's gradient norms of an earlier batch "
                    "again (a layer that was not used, or a Linear layer given a "
                    'four-dimensional input). Use grad_sample_mode="hooks".'
                )

        def zero_grad(self, *args: Any, **options: Any) -> None:
            run = self._pi_run
            again = run.tracker.is_half_clipped()
            if run.tracker.discard(clipped_only=True) and again:
                run.recorder.refuse(
                    "Two backward passes preceded one optimizer.step(): ghost clipping "
                    "keeps only the last batch. Step after each backward pass, or use "
                    'grad_sample_mode="hooks".'
                )
            super().zero_grad(*args, **options)

        def add_noise(self) -> None:
            super().add_noise()
            run = self._pi_run
            if float(run.hooks.max_grad_norm) != float(self.max_grad_norm):
                run.recorder.refuse(
                    f"Gradients were clipped to {float(run.hooks.max_grad_norm):g} and "
                    f"noised for {float(self.max_grad_norm):g}: with ghost clipping a "
                    "grad_clip_scheduler does not reach the model. Use "
                    'grad_sample_mode="hooks".'
                )
            run.commit(self)

    return Recording


def _as_list(grad_sample: Tensor | list[Tensor]) -> list[Tensor]:
    """Per-example gradients of each backward pass."""
    return grad_sample if isinstance(grad_sample, list) else [grad_sample]
