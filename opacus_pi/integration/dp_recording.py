"""Opacus's optimizers, reporting each update's rows, norms and noise to a recorder.

An optimizer stays the object and the class that Opacus made, plus a subclass that lets
it do its work and then reads: the norms of the rows that entered the update, and, when
the noise is drawn, how much noise it was.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import AbstractGradSampleHooks, GradSampleHooksNoOp
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_pi._class_swap import swap_class
from opacus_pi.accounting import RenyiFilter
from opacus_pi.attribution import Tracker
from opacus_pi.attribution.tracker import rows_of
from opacus_pi.integration import refusals
from opacus_pi.integration.dp_filtering import FilterGate
from opacus_pi.integration.fast import FastHooks
from opacus_pi.integration.grad_sample import joint_norms, row_norms
from opacus_pi.integration.odd_rows import explain_rows
from opacus_pi.integration.outside_changes import OutsideChanges
from opacus_pi.recording import Recorder

_STALE_NORMS = (
    "Ghost clipping used a layer's gradient norms of an earlier batch again (a layer "
    "that was not used, or a Linear layer given a four-dimensional input). Use "
    'grad_sample_mode="hooks".'
)
_TWO_BACKWARD_PASSES = (
    "Two backward passes preceded one optimizer.step(): ghost clipping keeps only the "
    'last batch. Step after each backward pass, or use grad_sample_mode="hooks".'
)
_TWO_CLIP_NORMS = (
    "with ghost clipping a clip scheduler does not reach the model. Use "
    'grad_sample_mode="hooks".'
)


def noise_std_of(optimizer: DPOptimizer) -> float:
    """Standard deviation of the noise on the summed gradient, as it is accounted for.

    Adaptive clipping also releases how many examples were not clipped. Its noise
    multiplier is that of both releases together, which at the clip norm cost as much as
    one gradient with that noise (Andrew et al. 2021, arXiv:1905.03871, Theorem 1); on
    the gradient itself there is more.
    """
    return float(optimizer.noise_multiplier) * float(optimizer.max_grad_norm)


@dataclass(eq=False)
class PrivateRun:
    """What one ``make_private`` call ties together.

    Args:
        recorder: Where to report to.
        tracker: Who knows which examples the rows are.
        hooks: What ``make_private`` returned for the model.
        renyi_filter: Whose budgets the updates must keep, if any.
        sample_rate: The rate that Opacus's accountant is told.
        loader: The loader, while the run is being prepared.
        superseded: Whether the engine has prepared another run since.
        outside: What watches for changes that are not the engine's.
    """

    recorder: Recorder
    tracker: Tracker
    hooks: AbstractGradSampleHooks
    renyi_filter: RenyiFilter | None = None
    sample_rate: float = 0.0
    loader: DataLoader[Any] | None = None
    superseded: bool = False
    outside: OutsideChanges | None = None
    entered: list[np.ndarray | list[int]] = field(default_factory=list)
    batch_norms: list[nn.Module] = field(init=False)
    gate: FilterGate | None = field(init=False, default=None)
    _update: dict[str, float] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.batch_norms = refusals.batch_norms(self.hooks)
        if self.renyi_filter is not None:
            self.gate = FilterGate(self.renyi_filter, self.tracker, self.batch_norms)

    def enter(
        self, sizes: Sequence[int], norms: Tensor, *, clipped_only: bool = False
    ) -> None:
        """Rows enter the update to come.

        Args:
            sizes: How many each backward pass left.
            norms: Of all of them; given away.
            clipped_only: Whether only complete passes of ghost clipping count.
        """
        passes = self.tracker.passes(sizes, clipped_only=clipped_only)
        examples = passes[0].examples() if len(passes) == 1 else None
        if examples is None:
            self.observe(rows_of(passes), norms)
        else:
            self._report(examples, norms)

    def observe(self, rows: np.ndarray, norms: Tensor) -> None:
        """Rows of a physical batch entered the update to come."""
        if rows.min(initial=0) < 0:
            known = np.flatnonzero(rows >= 0)
            norms = norms[torch.from_numpy(known).to(norms.device)]
            rows = rows[known]
        self._report(rows, norms)

    def _report(self, examples: np.ndarray | list[int], norms: Tensor) -> None:
        """Examples entered; a list is of distinct ones."""
        self.entered.append(examples)
        if len(examples) and not self.superseded:
            if not isinstance(examples, list):
                self.recorder.report(torch.from_numpy(examples), norms)
            else:
                self.recorder.report(examples, norms)

    def drawn(self, optimizer: DPOptimizer) -> None:
        """The noise of an update was drawn; its settings may change before it ends."""
        self.commit()
        if self.outside is not None:
            self.outside.noised(watched=not self.superseded)
        self._update = {
            "noise_std": noise_std_of(optimizer),
            "max_grad_norm": float(optimizer.max_grad_norm),
            "sample_rate": min(
                1.0, self.sample_rate * optimizer.accumulated_iterations
            ),
        }

    def commit(self) -> None:
        """The weights were updated, if noise was drawn for it."""
        update, self._update = self._update, None
        if update is None:
            return
        if self.outside is not None:
            self.outside.updated()
        entered, self.entered = self.entered, []
        for reason in self._reasons(entered):
            self.recorder.refuse(reason)
        if not self.superseded:
            self.recorder.step(**update)

    def _reasons(self, entered: list[np.ndarray | list[int]]) -> Iterator[str]:
        """Why an update that these examples entered cannot be accounted."""
        if self.superseded:
            yield (
                "An optimizer of an earlier make_private call was used after a later "
                "one: the ledger holds one run. Use one PrivacyEngine for each run."
            )
        mixed = refusals.batch_statistics(self.batch_norms)
        if mixed:
            yield mixed
        if _any_twice(entered):
            yield (
                "An example entered one update more than once, so max_grad_norm does "
                "not bound what it contributes. Draw each example at most once per "
                "optimizer.step()."
            )


def _any_twice(entered: list[np.ndarray | list[int]]) -> bool:
    """Whether an example is there twice; in one list it is not."""
    if len(entered) == 1 and isinstance(entered[0], list):
        return False
    ordered = np.sort(np.concatenate([np.empty(0, np.int64), *entered]))
    return bool((ordered[1:] == ordered[:-1]).any())


def record(optimizer: DPOptimizer, run: PrivateRun) -> DPOptimizer:
    """Have an optimizer report to a run.

    Args:
        optimizer: What Opacus made, changed in place.
        run: Whom to tell.

    Returns:
        The same object.
    """
    if isinstance(run.hooks, FastHooks):
        swap_class(optimizer, _from_book)
    elif isinstance(optimizer, DPOptimizerFastGradientClipping):
        swap_class(optimizer, _from_norms)
    else:
        swap_class(optimizer, _from_grad_samples)
    optimizer._pi_run = run
    if run.outside is not None:
        run.outside.follow(optimizer, run.hooks._module)
    return optimizer


def _reporting_updates(base: type) -> type:
    """An optimizer that reports its noise, and the end of each update."""

    class Reporting(base):
        def add_noise(self) -> None:  # once per update, and not when it is put off
            if self._pi_run.gate is not None:
                self._pi_run.gate.leave(noise_std_of(self))
            super().add_noise()
            self._pi_run.drawn(self)

        def step(self, *args: Any, **options: Any) -> float | None:
            result: float | None = super().step(*args, **options)
            self._pi_run.commit()
            return result

    return Reporting


def _from_grad_samples(base: Any) -> type:
    """An optimizer that clips per-example gradients: hooks, functorch, ew, no_op."""
    takes_norms_only = base.clip_and_accumulate is DPOptimizer.clip_and_accumulate
    parent: Any = _reporting_updates(base)

    class Recording(parent):
        _pi_column: list[Tensor] | None = None

        @property
        def grad_samples(self) -> list[Tensor]:
            """Per-example gradients; for a while, one column that has their norms."""
            return super().grad_samples if self._pi_column is None else self._pi_column

        def clip_and_accumulate(self) -> None:  # once for each batch that enters
            run = self._pi_run
            if run.gate is None:
                norms = self._pi_clip()
                run.enter(self._pi_sizes(), norms)
                return
            norms = self._pi_joint([row_norms(g) for g in self.grad_samples])
            rows, norms = run.gate.enter(
                self.params,
                run.tracker.attribute(self._pi_sizes()),
                norms,
                noise_std=noise_std_of(self),
                max_grad_norm=float(self.max_grad_norm),
            )
            super().clip_and_accumulate()
            run.observe(rows, norms)

        def _pi_clip(self) -> Tensor:
            """Clip, and return the norms from before.

            Opacus clips by ``self.grad_samples`` only to take the norm of each row
            over all parameters. It is given one column that holds these norms, whose
            rows have the same norms to the bit, so nothing is computed twice. (Used
            for a gradient the column would not have its shape.)
            """
            held = self.grad_samples
            by_parameter = [row_norms(g) for g in held]
            pairs = zip(by_parameter, held, strict=True)
            as_opacus = takes_norms_only and all(n.dtype == g.dtype for n, g in pairs)
            del held, pairs  # of several backward passes they are copies
            norms = self._pi_joint(by_parameter)
            self._pi_column = [norms.unsqueeze(1)] if as_opacus else None
            try:
                super().clip_and_accumulate()
            finally:
                self._pi_column = None
            return norms

        def _pi_joint(self, by_parameter: list[Tensor]) -> Tensor:
            """Norms over all parameters; explains where they are not of one batch."""
            try:
                return joint_norms(by_parameter)
            except RuntimeError as error:
                pairs = zip(self.params, map(len, by_parameter), strict=True)
                explain_rows(error, self._pi_run.hooks._module, dict(pairs))
                raise

        def _pi_sizes(self) -> list[int]:
            """How many per-example gradients each backward pass left."""
            first = self.params[0].grad_sample
            passes = first if isinstance(first, list) else [first]
            if isinstance(self._pi_run.hooks, GradSampleHooksNoOp) and len(passes) == 1:
                self._pi_run.tracker.follow_rows(first)
            return [len(g) for g in passes]

        def zero_grad(self, *args: Any, **options: Any) -> None:
            self._pi_run.tracker.discard()
            super().zero_grad(*args, **options)

    return Recording


def _from_book(base: type) -> type:
    """An optimizer of the fast mode: it keeps the norms of its last step."""

    class Recording(_reporting_updates(base)):  # type: ignore[misc]
        def clip_and_accumulate(self) -> None:  # once for each batch that enters
            super().clip_and_accumulate()
            norms = self.per_sample_gradient_norms.detach().clone()
            self._pi_run.enter(self.batch_sizes, norms)

        def zero_grad(self, *args: Any, **options: Any) -> None:
            self._pi_run.tracker.discard()
            super().zero_grad(*args, **options)

    return Recording


def _from_norms(base: type) -> type:
    """An optimizer of ghost clipping: the model clips and keeps the norms."""
    parent: Any = _reporting_updates(base)

    class Recording(parent):
        _pi_norms: Tensor | None = None
        _pi_of_parameters: tuple[Any, ...] = ()

        def accumulate(self) -> None:  # once for each physical batch that enters
            super().accumulate()
            norms = self._pi_run.hooks._per_sample_gradient_norms
            if norms is not None and norms is not self._pi_norms:
                self._pi_norms = norms
                self._pi_check_fresh()
                kept = norms.detach().clone()
                self._pi_run.enter([len(norms)], kept, clipped_only=True)

        def _pi_check_fresh(self) -> None:
            """Refuse norms that the last backward pass did not compute."""
            now = tuple(getattr(p, "_norm_sample", None) for p in self.params)
            before, self._pi_of_parameters = self._pi_of_parameters, now
            if any(a is not None and a is b for a, b in zip(now, before, strict=False)):
                self._pi_run.recorder.refuse(_STALE_NORMS)

        def zero_grad(self, *args: Any, **options: Any) -> None:
            tracker = self._pi_run.tracker
            again = tracker.is_half_clipped()
            if tracker.discard(clipped_only=True) and again:
                self._pi_run.recorder.refuse(_TWO_BACKWARD_PASSES)
            super().zero_grad(*args, **options)

        def add_noise(self) -> None:
            clipped_to = float(self._pi_run.hooks.max_grad_norm)
            noised_for = float(self.max_grad_norm)
            if clipped_to != noised_for:
                self._pi_run.recorder.refuse(
                    f"Gradients were clipped to {clipped_to:g} and noised for "
                    f"{noised_for:g}: {_TWO_CLIP_NORMS}"
                )
            super().add_noise()

    return Recording
