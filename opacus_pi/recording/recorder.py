"""Decide when a row of the ledger is written, from what a training loop reports.

A training loop reports which examples entered an update and with which gradient norm,
and counts the update. The recorder keeps the reports, and closes a row when one is due.
It does not depend on the model or the accounting: if norms must be measured by an extra
pass, it calls a function that the caller passed.

The recorder guarantees that a row holds exactly what was reported or measured for it.
If this fails (a norm is not finite, or the loop calls ``refuse``), reading ``ledger``
raises an error from then on, while training goes on.

>>> import torch
>>> recorder = Recorder(every=0.5)
>>> recorder.begin(num_examples=4, sample_rate=0.5, sampling="fixed", data_set="toy")
>>> for batch in ([0, 1], [2, 3]):
...     recorder.observe(torch.tensor(batch), torch.tensor([0.5, 2.0]))
...     recorder.step(noise_std=1.0, max_grad_norm=1.0)
>>> recorder.ledger.grad_norms
array([[0.5, 2. , nan, nan],
       [nan, nan, 0.5, 2. ]], dtype=float32)
"""

import json
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opacus_pi._errors import AccountingError
from opacus_pi._validate import expect, positive
from opacus_pi.accounting import GradNormLedger, NoisySGD
from opacus_pi.custody import Chain
from opacus_pi.ledger.checks import CHANGED
from opacus_pi.ledger.custody import Custody
from opacus_pi.ledger.noise_generator import checked_noise_generator
from opacus_pi.models.own_losses import CoupledLoss
from opacus_pi.recording.checkpoints import Training
from opacus_pi.recording.distributed import Processes, merge_
from opacus_pi.recording.not_finite import why_not_finite
from opacus_pi.recording.options import RecorderOptions
from opacus_pi.recording.run import RecordedRun, UpdateSettings, WaitingReports
from opacus_pi.recording.saved_state import ASSUMED, TOO_SMALL
from opacus_pi.recording.weights import (
    OTHER_WEIGHTS,
    LastWeights,
    save_weights,
    saved_weights,
)
from opacus_pi.recording.weights_directory import claim_directory

__all__ = ["Recorder"]

# of a Mersenne Twister's state: its position and 61 of 624 words
_STATE_BYTES = 512

_MEASURED = ("grad_norms", "confidences", "errors", "correct")
_NO_MODEL = (
    "This recorder has no model to sweep or to save, because it is a copy or its "
    "state was loaded from a checkpoint. Call make_private, make_monitored or "
    "Recorder.begin before the next update."
)
_CHANGED = (
    "The data set had {length} examples when the recording began, and now it has "
    "another length, so the columns of the ledger do not fit its examples. Call "
    "make_private or make_monitored again after changing the data set."
)
_OTHER_START = (
    "Before the first update after the run was continued, the weights and buffers of "
    "the model were not those with which the recorded updates had ended. If it is "
    "another model, the ledger joins the updates of two runs and describes neither: "
    "use a new Recorder for it. If the same weights were rounded, or its buffers were "
    "changed by a forward pass, nothing needs to be done."
)
_UNKNOWN_START = (
    "The run was continued, and it is not known with which weights the recorded "
    "updates had ended. So they could not be compared with those of the model. If it "
    "is another model, use a new Recorder for it."
)
# Attributes of a recorder that belong to the model in training.
_NOT_COPIED = (
    "_start",
    "_sweep",
    "_weights",
    "_processes",
    "_last_weights",
    "_all_refuse",
    "_chain",
    "_is_within_update",
    "_missing",
    "checkpoints",
)
_ONE_PROCESS = (
    "Recorder(checkpoints=...) saves the states of a training in one process, but "
    "this training is distributed. Train in one process, or leave checkpoints out."
)
_NOT_OURS = (
    "Recorder(checkpoints=...) needs the state of the training. Let "
    "PrivacyEngine.make_private or make_monitored begin the run, or pass "
    "begin(training=...)."
)


class Recorder(RecorderOptions):
    """Record per-example gradient norms while a model is being trained.

    Args:
        mode: ``"observed"``: the norms that training computes anyway; a row holds each
            example's latest norm since the row before. ``"swept"``: at each row, the
            norms of all examples, measured by an extra pass that does not change
            training.
        every: A number: epochs (``1 / sample_rate`` updates) from row to row, may be
            fractional. A sequence: rows after exactly these updates; 0, for swept
            rows, is before the first. Default: 0.2 for observed rows, which need 20
            bytes for each example and epoch and show how ranks change; 1 for swept
            rows, each of which costs a pass over the data.
        criterion: ``criterion(outputs, targets)`` for sweeps, one loss per example;
            needed if ``mode`` is ``"swept"``.
        strict: Whether to raise at once when the run can no longer be accounted for,
            instead of training on without a ledger.
        verify: Whether to match samples to examples by their content if the training
            loop copied the batch.
        probe_model: Whether a model that is trained privately is run again on its first
            batch, with other examples in it, to check that it treats examples
            separately. False: you declare that the model does.
        weights_dir: Directory for the weights of every row, one safetensors file
            each, ``weights-00000123.safetensors`` after 123 updates; None: not kept.
            Use one directory for each run: files of another run are refused before the
            first update. A run that is resumed goes on with its directory, and weights
            that were saved after the resumed update are deleted.
        batch_size: Examples a sweep measures at once.
        unattributed: What to do if more than 1 % of the samples are unattributed.
            ``"refuse"``: give no ledger. ``"worst_case"``: in every row with such
            samples, charge each example that was not observed at the clip norm. This is
            right only if no example has several samples in an update, and each is in
            the draw of the update, as for generated samples; it is listed as an
            assumption.
        checkpoints: Saves states of the training, and every participation, so that
            ``Unlearner.rewind`` can go back. Default: nothing is saved.

    Raises:
        ValueError: If an option is outside its domain.
    """

    _run: RecordedRun | None = None
    _resumed = False
    _num_made = 0  # updates, after the last one that this recorder has counted
    _has_undone = False  # and has not warned of it
    _sweep: Callable[[], Any] | None = None
    _weights: Callable[[], Mapping[str, Any]] | None = None
    _processes: Processes | None = None
    _last_weights: LastWeights | None = None
    _chain: Chain | None = None
    _all_refuse = False
    _has_weights_dir = False  # whether weights_dir was found to be this run's
    _missing: Callable[[], str] | None = None
    _is_within_update = False  # from begin_update to step
    _start: str | None = None  # weights that a continued run is to start from
    _waiting: WaitingReports  # from begin or load_state_dict on

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: the options, and what was recorded.

        A copy is like a recorder that has loaded the ``state_dict`` of this one: it
        gives the ledger of the updates until now, and the next ``begin`` continues it.
        The model that it sweeps or saves is not copied.
        """
        if self._run is not None:
            self.state_dict()  # what waits or is known elsewhere enters the run
        kept = {k: v for k, v in vars(self).items() if k not in _NOT_COPIED}
        return {**kept, "_resumed": self._run is not None, "_waiting": WaitingReports()}

    @property
    def chain(self) -> Chain | None:
        """The chain of custody of the run's norms."""
        return self._chain

    @property
    def num_steps(self) -> int:
        """Updates counted so far."""
        return self._run.num_steps if self._run else 0

    @property
    def sampling(self) -> str:
        """The sampling scheme of the run; empty before the run begins."""
        return self._run.sampling if self._run else ""

    @property
    def is_within_update(self) -> bool:
        """Whether an update has begun that was not counted yet."""
        return self._is_within_update

    @property
    def refusal(self) -> str:
        """Why the run has no ledger; empty if it has one, or has not begun."""
        if self._run is None:
            return ""
        self._fetch_waiting()
        if self._chain is not None:
            reason = self._chain.refusal()
        else:
            custody = self._custody()
            broken = () if custody is None else custody.broken
            reason = broken[0].sentence if broken else ""
        return self._run.refusal or reason

    def epsilon_reason(self) -> tuple[str, bool]:
        """Return why the ε of the engine's accountant may be no bound for the run.

        Returns:
            The reason, empty if there is none; and whether it shows that ε is no
            bound. If not, it is not known whether it is one.
        """
        if self._run is None:
            return "", False
        self._fetch_waiting()
        chain = self._chain
        custody = chain.custody(only_breaking=True) if chain else self._custody()
        reason, is_shown = custody.epsilon_reason() if custody else ("", False)
        return reason or self._run.refusal, is_shown

    @property
    def ledger(self) -> GradNormLedger:
        """The ledger of all updates so far; training may go on.

        If ``noise_std``, ``max_grad_norm`` or ``sample_rate`` changed within the update
        interval of a row, the ledger holds the least noise and the largest of the
        others for it. So none of its updates is charged too little.

        Raises:
            AccountingError: If nothing has been recorded, or the run cannot be
                accounted for; it says why.
        """
        run = self._begun()
        missing = self._missing() if self._missing is not None else ""  # may end one
        self._fetch_waiting()
        if run.refusal:
            raise AccountingError(run.refusal)
        custody = self._custody()
        if run.refusal:  # found while the chain was read
            raise AccountingError(run.refusal)
        if custody is not None:
            custody.require_intact()
        if missing:
            raise AccountingError(missing)
        return run.ledger(custody, fills_unattributed=self._fills_unattributed)

    def _custody(self) -> Custody | None:
        """Return the current chain of custody, or the one loaded with a run."""
        run, doubts = self._begun(), []
        if self._chain is not None:
            custody = self._chain.custody()
            if self._last_weights is not None and self._last_weights.are_replaced():
                doubts.append(OTHER_WEIGHTS)
        elif run.custody:
            custody = Custody.from_json(run.custody)
        else:
            return None
        if run.undone:
            self._warn_of_undone()
            doubts.append(run.undone)
        for doubt in doubts:
            custody = custody.with_doubt("weights", doubt)
        return custody

    def _warn_of_undone(self) -> None:
        """Warn once of updates that a checkpoint which was loaded does not count."""
        if self._has_undone:
            self._has_undone = False
            warnings.warn(self._begun().undone, stacklevel=3)

    def begin(
        self,
        *,
        num_examples: int,
        sample_rate: float,
        sampling: Literal["poisson", "fixed"],
        data_set: str,
        sweep: Callable[[], Any] | None = None,
        weights: Callable[[], Mapping[str, Any]] | None = None,
        processes: Processes | None = None,
        last_weights: LastWeights | None = None,
        chain: Chain | None = None,
        training: Training | None = None,
    ) -> None:
        """Start the record of a run, or continue the one that was just loaded.

        Args:
            num_examples: Number of examples, n.
            sample_rate: Expected share of the examples in an update, in (0, 1].
            sampling: ``"poisson"``, or ``"fixed"`` for any other schedule that does
                not look at the data and draws an example at most once an epoch.
            data_set: Fingerprint of the data set.
            sweep: Function for mode ``"swept"``, which returns an object with
                ``grad_norms`` and possibly ``confidences``, ``errors``, ``correct``,
                each ``(n,)``.
            weights: Function for ``weights_dir``, which returns the present state dict.
            processes: The processes of a distributed run, each of which calls this.
                Rows hold what all of them observed, and the first one saves the
                weights.
            last_weights: Function that returns the hash of the weights after the last
                update.
            chain: The chain of custody: what is known about how the norms come to be.
                None: the caller declares that every link holds.
            training: The training run, whose states ``checkpoints`` saves.

        Raises:
            ValueError: If an argument is outside its domain or missing, a loaded record
                is of another run, or ``checkpoints`` cannot save this run.
        """
        positive(num_examples=num_examples, remedy="Pass the length of the data set.")
        positive(
            sample_rate=sample_rate,
            remedy="Pass the probability with which an update samples an example.",
        )
        NoisySGD(0, sample_rate, noise_std=0.0, sampling=sampling)  # checks them
        _require_callable(
            "sweep", sweep, self.mode == "swept", "Recorder(criterion=...)"
        )
        _require_callable(
            "weights",
            weights,
            self.weights_dir is not None,
            "a function that returns the state dict",
        )
        run = RecordedRun(self.mode, num_examples, sample_rate, sampling, data_set)
        if self._resumed:
            self._begun().require_same(run)
        else:
            self._run, self._num_made, self._has_undone = run, 0, False
        self._last_weights = last_weights
        self._expect_start()
        self._begin_checkpoints(self._begun(), training, processes)
        self._follow(chain)
        self._resumed = self._has_weights_dir = False
        self._sweep, self._weights = sweep, weights
        self._processes, self._all_refuse = processes, False
        self._waiting = WaitingReports()
        if self._starts_with_a_row and not self._begun().steps:
            self._write_row()

    def _begin_checkpoints(
        self,
        run: RecordedRun,
        training: Training | None,
        processes: Processes | None,
    ) -> None:
        """Begin to save states, if the recorder has an option for it.

        Args:
            run: The run that begins or goes on; its name is that of the files' run.
            training: Gives the states.
            processes: The processes of a distributed run.
        """
        if self.checkpoints is None:
            return
        for problem, is_there in ((_ONE_PROCESS, processes), (_NOT_OURS, not training)):
            if is_there:
                raise ValueError(problem)
        facts = ("num_examples", "sampling", "sample_rate", "data_set")
        name = self.checkpoints.begin(
            facts={fact: getattr(run, fact) for fact in facts},
            training=cast(Training, training),
            fetch=self._reports_fetched,
        )
        if run.num_steps:
            self.checkpoints.resume(run.run_name, run.num_steps)
        else:
            run.run_name = name

    def _reports_fetched(self) -> str:
        """Hand waiting reports to the checkpoints; return the name of the weights."""
        self._fetch_waiting()
        self.name_weights()
        return self._begun().weights

    def _follow(self, chain: Chain | None) -> None:
        """Refuse the run when a link of this chain breaks, and store it when read."""
        self._chain, run = chain, self._begun()
        if chain is not None:
            if run.custody and run.num_steps:
                is_continued = partial(_has_more_steps, weakref.ref(run), run.num_steps)
                chain.resume(Custody.from_json(run.custody), is_continued)
            chain.on_break(self.refuse)

    def observe(self, indices: Tensor, grad_norms: Tensor) -> None:
        """Report the norms of one physical batch of the next update.

        Call it before ``step``, as often as the update has physical batches. The report
        is checked and copied. It enters the record later, together with others, unless
        the recorder is strict. A swept recorder measures for itself and ignores
        reports. After a norm that is not finite there is no ledger any more.

        Args:
            indices: int64 ``(b,)``, positions in the data set. If a position occurs
                twice, the later norm stays.
            grad_norms: float ``(b,)``, L2 norms before clipping.

        Raises:
            ValueError: If the lengths differ or an index is outside the data set.
        """
        expect(
            indices.shape == grad_norms.shape and grad_norms.dim() == 1,
            "grad_norms",
            f"a tensor of shape {tuple(grad_norms.shape)}",
            f"must have one norm per index, shape {tuple(indices.shape)}",
            "Report one norm for each sample of the batch.",
        )
        if indices.device.type == "cpu":
            self._begun().require_examples(indices.numpy())
        norms = grad_norms.detach().to(torch.float32, copy=True)
        self.report(indices.clone(), norms)

    def report(
        self,
        indices: Tensor | NDArray[np.int64] | Sequence[int],
        grad_norms: Tensor,
    ) -> None:
        """Report norms as ``observe`` does, without checks and copies.

        For the optimizer, which reports in every update and made both arguments itself.

        Args:
            indices: ``(b,)``, valid positions in the data set; not checked.
            grad_norms: float ``(b,)``, on any device; it must not be written to later.
        """
        run = self._begun()
        is_counted = run.participations is not None
        is_used = is_counted or self.mode == "observed" or self.checkpoints is not None
        if run.refusal or not is_used:
            return
        self._waiting.add(indices, grad_norms, step=run.num_steps + 1)
        is_here = grad_norms.device.type == "cpu"
        if self._waiting.are_many or (self.strict and is_here):
            self._fetch_waiting()

    def begin_update(self) -> None:
        """Look at the weights before an update.

        The first update of a continued run should find those that the recorded ones
        left. If ``checkpoints`` were asked for, the state before the first update is
        saved. Call it when the weights are still those from before the update.

        Raises:
            ValueError: Before the first update, if ``weights_dir`` or the directory of
                ``checkpoints`` holds files of another run.
        """
        self._is_within_update = True
        if self._start is not None:
            self._compare_start()
        if self.weights_dir is not None and not self._has_weights_dir:
            self._claim_weights_dir(self.weights_dir)
        if self.checkpoints is not None:
            self.checkpoints.begin_update()

    def count_participations(self, indices: NDArray[np.int64]) -> None:
        """Count examples that are in the next update, if their norms are not reported.

        Call it before ``step``, which may close the row that they belong to.

        Args:
            indices: int64 ``(b,)``, positions in the data set.
        """
        run = self._begun()
        if run.participations is not None:
            run.participations.add(indices)
        if self.checkpoints is not None:
            steps = np.full(len(indices), run.num_steps + 1, dtype=np.int64)
            self.checkpoints.add(indices, None, steps)

    def note_unattributed(self, count: int = 1) -> None:
        """Record that the next update contains unattributed samples.

        Any example may be among them: under fixed sampling each one may have been in
        one more update than was counted, and with ``unattributed="worst_case"`` every
        example without a norm in the next row gets the clip norm there.

        Args:
            count: How many samples.
        """
        run = self._begun()
        run.note_unattributed()
        if self.checkpoints is not None:
            self.checkpoints.add_unattributed(run.num_steps + 1, count)

    def step(
        self,
        *,
        noise_std: float,
        max_grad_norm: float,
        sample_rate: float | None = None,
        noise_generator: str | None = None,
    ) -> None:
        """Count one update of the weights, and write a row when one is due.

        Args:
            noise_std: Standard deviation of the noise on the **sum** of the
                per-example gradients in this update.
            max_grad_norm: The clip norm of this update, ``inf`` without clipping.
            sample_rate: The sample rate of this update. Default: the one of ``begin``.
            noise_generator: The kind of generator that its noise was drawn from, one of
                ``ledger.noise_generator.NOISE_GENERATORS``. None: not known.

        Raises:
            ValueError: If that is no known kind.
        """
        run = self._begun()
        self._resumed = self._is_within_update = False
        rate = run.sample_rate if sample_rate is None else sample_rate
        settings = float(noise_std), float(max_grad_norm), float(rate)
        if not noise_generator or noise_generator != run.noise_generator:
            checked_noise_generator(noise_generator)
        if self._has_undone:
            self._warn_of_undone()
        run.count_step(*settings, noise_generator)
        self._num_made = run.num_made
        if self._last_weights is not None:
            self._last_weights.updated()
        if self.checkpoints is not None:
            self.checkpoints.count_step(UpdateSettings(*settings))
        is_over = run.refusal if self._processes is None else self._all_refuse
        if not is_over and run.row_is_due(self.every):
            self._write_row()

    def is_new_state(self, state: bytes) -> bool:
        """Keep the state of the generator from which noise is about to be drawn.

        Args:
            state: The bytes of what ``torch.Generator.get_state`` returns.

        Returns:
            False if noise of an earlier update was drawn from the same state.
        """
        return self._begun().generator_states.add(state[:_STATE_BYTES])

    def goes_back(self, state: bytes) -> bool:
        """Return whether the generator of the noise went back to an earlier place.

        Args:
            state: As for ``is_new_state``; the generator is about to draw noise.
        """
        return self._begun().generator_blocks.goes_back(state)

    def assume_noise(self) -> None:
        """Mark the noise of the run as assumed: its losses then only rank examples.

        For updates that release more than their noise is known to cover.
        """
        self._begun().noise_is = ASSUMED

    def note_small_charge(self) -> None:
        """Note that Opacus's accountant charges an update less than it should."""
        self._begun().accountant_is = TOO_SMALL

    @property
    def is_charged_too_little(self) -> bool:
        """Whether Opacus's accountant has charged an update less than it should."""
        return self._run is not None and self._run.accountant_is == TOO_SMALL

    def name_weights(self) -> None:
        """Store the hash of the weights after the last update in the ledger.

        The weights are hashed, at most once after an update. Without this call, or if
        the model is not known, the ledger does not say which weights it describes.
        """
        run, last = self._begun(), self._last_weights
        if last is not None and run.weights in ("", CHANGED):
            run.weights = last.name() or run.weights

    def merge(self) -> None:
        """Give every process of a distributed run what all of them have observed.

        Rows are merged when they are written; until the next one, a process has its
        own observations only. Call it in all processes, after the same update, before
        one of them reads the ledger or saves a checkpoint for all. Afterwards their
        ledgers are equal, and equal to that of a single process that drew the same
        batches.

        Raises:
            AccountingError: If nothing is recorded, or the recorder is strict and the
                run cannot be accounted for.
        """
        run = self._begun()
        self._fetch_waiting()
        reason = merge_(run, self._processes) if self._processes else ""
        self._all_refuse = bool(reason)
        if self._processes and self._chain is not None:
            for text in self._processes.gather_texts(json.dumps(self._chain.doubts())):
                self._chain.share(json.loads(text))
        if reason:
            self.refuse(reason)

    def refuse(self, reason: str) -> None:
        """Refuse the ledger of this run from now on, and warn once; training goes on.

        Args:
            reason: What cannot be accounted for, and the remedy. Only the first is
                kept.

        Raises:
            AccountingError: At once, if the recorder is strict.
        """
        run = self._begun()
        if self.strict:
            raise AccountingError(reason)
        if not run.refusal:
            run.refusal = reason
            warnings.warn(f"This run no longer has a ledger. {reason}", stacklevel=2)

    def refuse_while(self, missing: Callable[[], str]) -> None:
        """Refuse the ledger while updates are known that this recorder has not seen.

        Args:
            missing: Function that says which updates are missing now, and the remedy;
                it returns an empty text if none are. The accountant's and the
                recorder's counts may differ within an update, so it is called only
                when a ledger is asked for.
        """
        self._missing = missing

    def state_dict(self) -> dict[str, Any]:
        """Return everything recorded, as tensors, numbers and strings."""
        run = self._begun()
        self._fetch_waiting()
        self.name_weights()
        if self.checkpoints is not None:
            self.checkpoints.flush()
        if self._chain is not None:
            run.custody = self._chain.custody().to_json()
        return run.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the record that ``state_dict`` saved.

        Before ``begin``, the next ``begin`` checks that it continues the same run;
        after it, the check is made now.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            ValueError: If the state is of another version, mode or run; nothing is
                changed then.
            AccountingError: If the recorder is strict, and the saved run cannot be
                accounted for; nothing is changed then.
        """
        self.prepared_load(state)()

    def prepared_load(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Check a state as ``load_state_dict`` does, and change nothing yet.

        Several objects that are loaded together can so be checked before the first of
        them is changed.

        Args:
            state: What ``state_dict`` returned.

        Returns:
            A function that continues the record.

        Raises:
            ValueError: As ``load_state_dict``.
            AccountingError: As ``load_state_dict``.
        """
        loaded = RecordedRun.from_state_dict(state)
        expect(
            loaded.source == self.mode,
            "the mode of the saved run",
            repr(loaded.source),
            f"must equal this recorder's mode, {self.mode!r}",
            "Resume with a Recorder like that of the saved run.",
        )
        has_begun = self._run is not None and not self._resumed
        if has_begun:
            loaded.require_same(self._begun())
            if self.checkpoints is not None:
                self.checkpoints.require_resumable(loaded.run_name, loaded.num_steps)
        if self.strict and self._chain is not None and loaded.custody:
            for link in Custody.from_json(loaded.custody).broken:
                raise AccountingError(link.sentence)
        return partial(self._continue, loaded, has_begun)

    def _continue(self, loaded: RecordedRun, has_begun: bool) -> None:
        """Continue a record that was checked.

        Args:
            loaded: The saved record.
            has_begun: Whether ``begin`` was called before.
        """
        if has_begun and self.checkpoints is not None:
            self.checkpoints.resume(loaded.run_name, loaded.num_steps)
        # Whether training goes on from here is not known yet: the warning waits.
        self._has_undone = self._num_made > loaded.num_made
        loaded.num_undone = max(self._num_made, loaded.num_made) - loaded.num_steps
        self._run, self._resumed, self._waiting = loaded, True, WaitingReports()
        self._has_weights_dir = False
        if self._last_weights is not None:
            self._last_weights.forget()
        if self._chain is not None:
            self._chain.undo_samples()
        self._follow(self._chain)
        self._expect_start()

    def _expect_start(self) -> None:
        """Have the next update look for the weights that the recorded updates left.

        A forward pass may change buffers before that update. So nothing is compared
        then if the model has these weights and buffers already.
        """
        run, last = self._begun(), self._last_weights
        is_continued = last is not None and run.num_steps > 0
        self._start = run.weights if is_continued else None
        if self._start and last is not None and last.present() == self._start:
            self._start = None

    def _compare_start(self) -> None:
        """Leave the link "weights" unchecked if other updates have made the weights."""
        start, self._start = self._start, None
        if self._chain is None or self._last_weights is None:
            return
        if start in ("", CHANGED):
            self._chain.leave_unchecked("weights", _UNKNOWN_START)
        elif self._last_weights.present() != start:
            self._chain.leave_unchecked("weights", _OTHER_START)

    def _begun(self) -> RecordedRun:
        """Return the run, or refuse if none has begun."""
        if self._run is None:
            raise AccountingError(
                "Nothing is being recorded yet. Call make_private, make_monitored or "
                "Recorder.begin first."
            )
        return self._run

    def _write_row(self) -> None:
        """Write a row for the current weights, which ends the update interval."""
        run = self._begun()
        self.merge()
        row = {"grad_norms": run.observed}
        has_model = self._sweep is not None or self.mode == "observed"
        if not has_model or (self.weights_dir is not None and self._weights is None):
            self.refuse(_NO_MODEL)
        if self.mode == "swept" and not run.refusal:
            try:
                measured = cast(Callable[[], Any], self._sweep)()
            except CoupledLoss as error:  # training goes on
                self._break_loss(str(error))
                return
            if len(measured.grad_norms) != run.num_examples:
                self.refuse(_CHANGED.format(length=run.num_examples))
                return
            row = _float32_row(measured, run.num_examples)
            norms = row["grad_norms"]
            self._refuse_unless_finite(norms, np.full(len(norms), run.num_steps))
        if run.refusal:
            return
        if self.weights_dir is not None:
            self._save_weights(self.weights_dir, row)
        run.close_row(row)

    def _save_weights(
        self, directory: Path, row: dict[str, NDArray[np.float32]]
    ) -> None:
        """Save the weights of a row that is about to be closed.

        Before the first update, a checkpoint may still be loaded. Files that are in the
        directory then are left as they are; the first update decides about them.
        """
        run = self._begun()
        if run.num_steps and not self._has_weights_dir:
            self._claim_weights_dir(directory)
        is_first = self._processes is None or self._processes.rank == 0
        if not is_first or (not run.num_steps and saved_weights(directory)):
            return
        weights = cast(Callable[[], Mapping[str, Any]], self._weights)
        name = run.hash_of_next_row(row, fills_unattributed=self._fills_unattributed)
        save_weights(directory, run.num_steps, weights(), run.data_set, name)

    def _claim_weights_dir(self, directory: Path) -> None:
        """Refuse a directory with weights of another run, in all processes.

        Raises:
            ValueError: As ``claim_directory``.
        """
        run, reason, processes = self._begun(), "", self._processes
        if processes is None or processes.rank == 0:
            hashes = run.row_hashes(fills_unattributed=self._fills_unattributed)
            try:
                claim_directory(directory, hashes, run.num_steps)
            except ValueError as error:
                reason = str(error)
        if processes is not None:
            reason = processes.gather_texts(reason)[0]
        if reason:
            raise ValueError(reason)
        self._has_weights_dir = True

    @property
    def _fills_unattributed(self) -> bool:
        """Return whether examples that may be unattributed get the clip norm."""
        return self.unattributed == "worst_case"

    def _break_loss(self, reason: str) -> None:
        """Record that the examples have no losses of their own, and refuse the run."""
        if self._chain is None:
            self.refuse(reason)
        else:
            self._chain.break_link("loss", reason, rules_out_epsilon=False)

    def _fetch_waiting(self) -> None:
        """Put the waiting reports into the record, in the order of reporting."""
        reports, run = self._waiting.take(), self._begun()
        if reports is None:
            return
        indices, norms, steps = (column.numpy() for column in reports)
        if indices.size and not 0 <= indices.min() <= indices.max() < run.num_examples:
            self.refuse(_CHANGED.format(length=run.num_examples))
            return
        if run.participations is not None:
            run.participations.add(indices)
        if self.checkpoints is not None:
            self.checkpoints.add(indices, norms, steps)
        if self.mode == "observed":
            run.observe(indices, norms, steps=steps)
            self._refuse_unless_finite(norms, steps, indices)

    def _refuse_unless_finite(
        self,
        norms: NDArray[np.float32],
        steps: NDArray[np.int64],
        indices: NDArray[np.int64] | None = None,
    ) -> None:
        """Refuse the run if a norm is infinite or NaN: it has no finite loss.

        Args:
            norms: ``(m,)``.
            steps: The update of each.
            indices: The example of each; None: that at the same place.
        """
        if np.isfinite(norms).all():
            return
        if indices is None:
            indices = np.arange(len(norms))
        self.refuse(why_not_finite(indices, norms, steps))


def _has_more_steps(run: weakref.ref[RecordedRun], num_steps: int) -> bool:
    """Return whether a run has made more updates than so many.

    Args:
        run: The run.
        num_steps: The number of updates.
    """
    present = run()
    return present is not None and present.num_steps > num_steps


def _float32_row(measured: Any, num_examples: int) -> dict[str, NDArray[np.float32]]:
    """Return the measurements of a sweep, as arrays of the ledger.

    Args:
        measured: An object with ``grad_norms`` and possibly ``confidences``, ``errors``
            and ``correct``.
        num_examples: Number of examples, n.

    Returns:
        float32 ``(n,)`` by name.

    Raises:
        ValueError: If one has another shape.
    """
    given = {name: getattr(measured, name, None) for name in _MEASURED}
    row = {
        name: torch.as_tensor(values).detach().cpu().to(torch.float32).numpy()
        for name, values in given.items()
        if values is not None
    }
    for name, values in row.items():
        expect(
            values.shape == (num_examples,),
            f"sweep().{name}",
            f"an array of shape {values.shape}",
            f"must have shape ({num_examples},)",
            "Return one value for each example, in the order of the data set.",
        )
    return row


def _require_callable(name: str, given: Any, needed: bool, remedy: str) -> None:
    """Refuse a recorder that lacks a function which one of its options needs.

    Args:
        name: The option's name.
        given: The function, or None.
        needed: Whether the option is used.
        remedy: What to pass.

    Raises:
        ValueError: If it is needed and not given.
    """
    expect(
        given is not None or not needed,
        name,
        given,
        "must be a function",
        f"This recorder calls it at every row: pass {remedy}.",
    )
