"""The current update: which samples entered it, with which norms and which noise.

A norm passes four stations: the optimizer clips and hands over the norms of a physical
batch; the update matches them to examples; the recorder keeps them until a row is
written; the ledger stores that row. An update consists of one or more physical batches
(``BatchMemoryManager``, accumulated gradients), then one draw of noise, then one write
to the weights.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import AbstractGradSampleHooks, GradSampleHooksNoOp
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer
from torch import Tensor, nn

from opacus_pi.attribution import Tracker
from opacus_pi.attribution.tracker import indices_of
from opacus_pi.custody import Chain
from opacus_pi.custody.draws import DrawLink
from opacus_pi.custody.loss_shares import LossShares
from opacus_pi.custody.model_loss import ModelLossProbe
from opacus_pi.custody.model_probe import ModelProbe
from opacus_pi.integration.accountants import charges_less, noise_std_of
from opacus_pi.integration.checks import (
    OutsideChanges,
    batch_norms,
    batch_statistics,
)
from opacus_pi.integration.clip_norms import clip_norm_of
from opacus_pi.integration.drawn_noise import is_drawn_again
from opacus_pi.integration.earlier_updates import say_earlier_updates
from opacus_pi.integration.filtering import FilterGate
from opacus_pi.integration.loop_loss import LoopLoss
from opacus_pi.integration.lost_gradients import LostGradients
from opacus_pi.integration.outside_calls import OutsideCalls
from opacus_pi.integration.paths_to_weights import PathsToWeights
from opacus_pi.integration.swept_model import SweptModel
from opacus_pi.integration.trained_outside import TrainedOutside
from opacus_pi.integration.two_passes import TwoPasses
from opacus_pi.integration.unequal_calls import UnequalCalls
from opacus_pi.integration.wrapper_hooks import look_for_wrapper_hooks
from opacus_pi.ledger.noise_generator import kind_of
from opacus_pi.recording import Recorder

_SUPERSEDED = (
    "make_private was called again, but the optimizer of an earlier call was stepped. "
    "A ledger holds one run only. Use one PrivacyEngine for each run."
)
_DRAWN_TWICE = (
    "An example entered one update more than once, so max_grad_norm does not bound "
    "what it contributes. Draw each example at most once per optimizer.step()."
)
_ROUNDING = 1e-9


def _nothing() -> None:
    """Return None, in place of an accountant."""


@dataclass(eq=False)
class UpdateUnderWay:
    """Reports the updates of one private run to its recorder, one after another.

    Only its end shows that an update was made at all: Opacus may postpone a step
    (``BatchMemoryManager``), and an interrupt may end it early. So norms go to the
    recorder at once, but the update counts only when noise was drawn and the weights
    were written.

    The optimizer calls ``add_batch`` for each physical batch, ``noise_was_drawn`` once,
    and ``finish`` when the weights have been written.

    Args:
        recorder: Receives the norms and the settings of each update.
        tracker: Matches the samples of a batch to examples.
        hooks: What ``make_private`` returned for the model.
        sample_rate: The rate of one batch, as Opacus passes it to its accountant.
        chain: The chain of custody of the run.
        draws: Its link that watches how delivered batches are used.
        gate: Leaves out examples whose budget is spent, if the engine has a filter.
        outside: Detects changes between updates; None in a distributed run.
        model_probe: Finds out whether the model mixes examples; None: it is not run.
        loss_probe: Looks at losses that the model returns; None: nothing does.
        loss_shares: Looks at cross entropies of the loop; None: nothing does.
        paths: Finds weights that are used outside of their layers' calls; None: it does
            not, or the criterion of ghost clipping keeps it.
        calls: Compares the calls of layers in each forward pass; None: nothing does.
        outside_calls: Finds layers that run outside of the model's forward pass; None:
            nothing does.
        passes: Compares both backward passes of ghost clipping; None: nothing does.
        trained_outside: Finds tensors outside of the model that the loss trains; None:
            nothing looks for them.
        lost: Finds gradients that updates leave out; None: nothing looks for them.
        loop_loss: Compares updates with a criterion that was audited; None: none was.
        swept: The model that sweeps measure; None: norms are observed.
        accountant: Returns the engine's accountant; None if the engine is gone.
        is_superseded: Whether a later ``make_private`` of the same engine has begun
            another run. Updates of this one are then not recorded but refused.

    Attributes:
        optimizer: The optimizer that reports; referred to weakly.
        has_gradients_by_hand: Whether the user's loop computes per-example gradients.
    """

    recorder: Recorder
    tracker: Tracker
    hooks: AbstractGradSampleHooks
    sample_rate: float
    chain: Chain
    draws: DrawLink
    gate: FilterGate | None = None
    outside: OutsideChanges | None = None
    model_probe: ModelProbe | None = None
    loss_probe: ModelLossProbe | None = None
    loss_shares: LossShares | None = None
    paths: PathsToWeights | None = None
    calls: UnequalCalls | None = None
    outside_calls: OutsideCalls | None = None
    passes: TwoPasses | None = None
    trained_outside: TrainedOutside | None = None
    lost: LostGradients | None = None
    loop_loss: LoopLoss | None = None
    swept: SweptModel | None = None
    accountant: Callable[[], Any] = _nothing
    is_superseded: bool = False
    optimizer: weakref.ref[DPOptimizer] | None = field(init=False, default=None)
    has_gradients_by_hand: bool = field(init=False)
    _batch_norms: list[nn.Module] = field(init=False)
    # Indices of the samples so far, and whether no index can be there twice.
    _examples: list[Sequence[int] | NDArray[np.int64]] = field(
        init=False, default_factory=list
    )
    _is_distinct: bool = field(init=False, default=True)
    _settings: dict[str, Any] | None = field(init=False, default=None)
    _largest_clip_norm: float = field(init=False, default=0.0)  # of the update so far
    _num_charged: int = field(init=False, default=1)  # draws
    _num_unattributed: int = field(init=False, default=0)  # up to the last update
    _has_checked: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.has_gradients_by_hand = isinstance(self.hooks, GradSampleHooksNoOp)
        self._batch_norms = batch_norms(self.hooks)

    @property
    def has_begun(self) -> bool:
        """Whether a physical batch has entered the update under way."""
        return bool(self._examples)

    @property
    def num_samples(self) -> int:
        """Number of samples in the update under way whose example is known."""
        return sum(map(len, self._examples))

    @property
    def is_interrupted(self) -> bool:
        """Whether noise was drawn for an update whose step has not ended."""
        return self._settings is not None

    def add_batch(
        self, norms: Tensor, sizes: Sequence[int], *, clipped_only: bool = False
    ) -> None:
        """Match the samples of a physical batch to examples and report their norms.

        Args:
            norms: L2 norms before clipping of all samples, ``(b,)``; not written to
                afterwards.
            sizes: How many samples each backward pass contributed; their sum is b.
            clipped_only: Whether only complete passes of ghost clipping count.
        """
        passes = self.tracker.take_attributed(sizes, clipped_only=clipped_only)
        if self.lost is not None:
            self.lost.gradients_were_used()
        if self.outside_calls is not None:
            self.outside_calls.gradients_were_used()
        if self.loop_loss is not None:
            self.loop_loss.compare(passes, norms)
        norms = self.tracker.charged(norms, passes)
        # nearly always: one batch as it was delivered, whose indices are distinct
        examples = passes[0].distinct_indices() if len(passes) == 1 else None
        if examples is None:
            self.add_samples(indices_of(passes), norms)
        else:
            self._report(examples, norms, distinct=True)

    def was_clipped(self, max_grad_norm: float) -> None:
        """Note the clip norm of a physical batch: the next one may have another.

        If the step of the update before raised an error, that update ends here: noise
        was drawn for it, Opacus's accountant has counted it, and weights may have been
        written. So it gets a row of its own, and this batch enters another update.

        Args:
            max_grad_norm: The clip norm.
        """
        self.finish(is_late=True)
        self._largest_clip_norm = max(self._largest_clip_norm, max_grad_norm)

    def add_samples(self, indices: NDArray[np.int64], norms: Tensor) -> None:
        """Report the norms of samples that have been matched to examples.

        Args:
            indices: Index of each sample in the data set, int64 ``(b,)``; negative for
                unattributed samples, which are left out.
            norms: Their norms, ``(b,)``.
        """
        if indices.min(initial=0) < 0:
            known = np.flatnonzero(indices >= 0)
            norms = norms[torch.from_numpy(known).to(norms.device)]
            indices = indices[known]
        self._report(indices, norms, distinct=False)

    def _report(
        self,
        indices: Sequence[int] | NDArray[np.int64],
        norms: Tensor,
        *,
        distinct: bool,
    ) -> None:
        """Hand norms to the recorder, and note which examples are in the update.

        Args:
            indices: Indices in the data set, none negative.
            norms: Their norms, ``(b,)``.
            distinct: Whether no index is there twice.
        """
        if self.calls is not None:
            self.calls.gradients_were_used()
        # several batches may overlap even if each of them is distinct
        self._is_distinct = distinct and not self._examples
        self._examples.append(indices)
        if len(indices) and not self.is_superseded:
            self.recorder.report(indices, norms)

    def gradients_were_cleared(self) -> None:
        """Forget what was noted of gradients that will not enter an update."""
        if self.outside_calls is not None:
            self.outside_calls.gradients_were_cleared()

    def is_drawn_again(self, optimizer: DPOptimizer, noise_std: float) -> bool:
        """Return whether noise is about to be drawn that was drawn before.

        Args:
            optimizer: The optimizer that is about to add noise.
            noise_std: The standard deviation of the noise.
        """
        draws = noise_std > 0 and not optimizer.secure_mode
        rank = int(getattr(optimizer, "rank", 0))  # only the first process draws
        if not draws or self.is_superseded or rank:
            return False
        device = next(p.device for p in optimizer.params)
        return is_drawn_again(self.recorder, optimizer.generator, device, self.chain)

    def noise_was_drawn(self, optimizer: DPOptimizer) -> None:
        """Note noise and clip norm now: schedulers may change them before the end.

        Args:
            optimizer: The optimizer that has just added noise, before its step.
        """
        self.finish(is_late=True)  # an earlier update, whose step was interrupted
        if not self._has_checked:
            self._has_checked = True
            self.chain.check("norm", "The norms are those by which Opacus clipped.")
            self.chain.check("noise", "Noise was drawn once for every update.")
            say_earlier_updates(optimizer.original_optimizer, self.recorder, self.chain)
        if not self.is_superseded:
            self.recorder.begin_update()
        # The weights are still those of the forward pass, and its memory is free again.
        finding = None if self.model_probe is None else self.model_probe.run()
        if finding is not None and not batch_statistics(self._batch_norms):
            finding.tell(self.chain, "model")
        look_for_wrapper_hooks(self.hooks, self.chain)
        if self.passes is not None:
            self.passes.report()
        if self.trained_outside is not None:
            self.trained_outside.update_was_made()
        if self.loss_probe is not None:
            self.loss_probe.run()
        if self.loss_shares is not None:
            self.loss_shares.run()
        if self.outside is not None:
            self.outside.noise_was_drawn(is_current=not self.is_superseded)
        # As Opacus's accountant does: with accumulated batches an example had as many
        # chances to be drawn.
        num_passes = optimizer.accumulated_iterations
        self._num_charged, rate = max(1, num_passes), self.sample_rate * num_passes
        if isinstance(optimizer, AdaClipDPOptimizer) and not self.is_superseded:
            self.recorder.assume_noise()
        self.was_clipped(clip_norm_of(optimizer))
        clip_norm, self._largest_clip_norm = self._largest_clip_norm, 0.0
        is_larger = clip_norm > float(optimizer.max_grad_norm) * (1 + _ROUNDING)
        if is_larger and not self.is_superseded:
            self.recorder.note_small_charge()
        self._settings = {
            "noise_std": noise_std_of(optimizer),
            "max_grad_norm": clip_norm,
            "sample_rate": min(1.0, rate),
            "noise_generator": kind_of(
                optimizer.generator, is_secure=optimizer.secure_mode
            ),
        }

    def finish_if_written(self, *, waits: bool) -> None:
        """Count an update whose weights were written, although no step has ended.

        The step may have raised an error, or the loop may have made it by itself.

        Args:
            waits: Whether to wait for accelerators to find writes that torch does not
                count.
        """
        if self._settings is None or self.outside is None:
            return
        if self.outside.weights_were_written(waits=waits):
            self.finish(is_late=True)

    def finish(self, *, is_late: bool = False) -> None:
        """Count the update if noise was drawn for it: the weights were written.

        Called after every step, also after one that Opacus has postponed; without noise
        there is no update to count. The recorder may write a row here, which in swept
        mode takes a pass over the data set.

        Args:
            is_late: Whether no step has just ended: the step of the update raised an
                error, or the loop made it by itself.
        """
        settings, self._settings = self._settings, None
        if settings is None:
            return
        self.draws.update_was_made(
            self.tracker.end_update(), num_charged=self._num_charged
        )
        num_unattributed = self.tracker.counts["unattributed"]
        if num_unattributed > self._num_unattributed and not self.is_superseded:
            self.recorder.note_unattributed(num_unattributed - self._num_unattributed)
        self._num_unattributed = num_unattributed
        if self.outside is not None:
            self.outside.weights_were_updated(is_late=is_late)
        if self.loop_loss is not None:
            self.loop_loss.update_was_made()
        if self.is_superseded or self._batch_norms or not self._is_distinct:
            for link, reason in self._reasons():
                shown = reason is not _SUPERSEDED
                self.chain.break_link(link, reason, rules_out_epsilon=shown)
        self._examples, self._is_distinct = [], True
        if not self.is_superseded:
            if charges_less(self.accountant(), settings):
                self.recorder.note_small_charge()
            self.recorder.step(**settings)
            if self.swept is not None:
                self.swept.update_was_made(self.chain)

    def _reasons(self) -> Iterator[tuple[str, str]]:
        """Yield each link that this update breaks, and the reason with its remedy."""
        if self.is_superseded:
            yield "draw", _SUPERSEDED
        mixed = batch_statistics(self._batch_norms)
        if mixed:
            yield "model", mixed
        if not self._is_distinct and _has_duplicates(self._examples):
            yield "rows", _DRAWN_TWICE


def _has_duplicates(batches: Sequence[Sequence[int] | NDArray[np.int64]]) -> bool:
    """Return whether an index occurs twice, in one batch or in two.

    Args:
        batches: The indices of each physical batch of an update.
    """
    ordered = np.sort(np.concatenate([np.empty(0, np.int64), *batches]))
    return bool((ordered[1:] == ordered[:-1]).any())
