"""When a row of the ledger is written, from what a training loop reports.

The recorder knows no model, no order and no mathematics: it is told which examples
entered an update and with which gradient norm, or it is given a sweep to call.

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

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opacus_pi._errors import AccountingError
from opacus_pi._validate import expect, positive
from opacus_pi.accounting import GradNormLedger, NoisySGD
from opacus_pi.ledger.checks import CHANGED
from opacus_pi.recording.last_weights import LastWeights
from opacus_pi.recording.measured_row import float32_row, require_callable
from opacus_pi.recording.merging import merge_
from opacus_pi.recording.options import RecorderOptions
from opacus_pi.recording.processes import Processes
from opacus_pi.recording.recorded_run import RecordedRun, Settings
from opacus_pi.recording.waiting import WaitingReports
from opacus_pi.recording.weights import save_weights


class Recorder(RecorderOptions):
    """Writes rows of per-example gradient norms while a model is being trained.

    Args:
        mode: ``"observed"``: the norms that training computes anyway, each example's
            latest participation since the row before. ``"swept"``: at each row, the
            norms of all examples by a pass of their own that leaves no trace.
        every: A number: epochs (``1 / sample_rate`` updates) from row to row, may be
            fractional. A sequence: rows after exactly these updates; 0, for swept
            rows, is before the first.
        criterion: ``criterion(outputs, targets)`` for sweeps, one loss per example.
        strict: Raise at once where the run can no longer be accounted, instead of
            training on and refusing the ledger.
        verify: Whether batches that reach the model as copies are recognised by their
            content.
        weights_dir: Directory for the weights of every row, one safetensors file
            each, ``weights-00000123.safetensors`` after 123 updates; None: not kept.
        batch_size: Examples a sweep measures at once.

    Raises:
        ValueError: If an option is outside its domain.
    """

    _run: RecordedRun | None = None
    _resumed = False
    _sweep: Callable[[], Any] | None = None
    _weights: Callable[[], Mapping[str, Any]] | None = None
    _processes: Processes | None = None
    _last_weights: LastWeights | None = None
    _all_refuse = False
    _waiting: WaitingReports  # from begin or load_state_dict on

    @property
    def num_steps(self) -> int:
        """Updates counted so far."""
        return self._run.num_steps if self._run else 0

    @property
    def sampling(self) -> str:
        """How the run draws its batches; empty before it begins."""
        return self._run.sampling if self._run else ""

    @property
    def ledger(self) -> GradNormLedger:
        """The record up to now; training may go on.

        Where ``noise_std``, ``max_grad_norm`` or ``sample_rate`` changed within the
        updates of one row, the row carries the least noise and the largest of the
        others: none of its updates is charged too little.

        Raises:
            AccountingError: If nothing has been recorded, or the run cannot be
                accounted; it says why.
        """
        run = self._begun()
        self._fetch_waiting()
        if run.refusal:
            raise AccountingError(run.refusal)
        return run.ledger()

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
    ) -> None:
        """Start the record of a run, or continue the one that was just loaded.

        Args:
            num_examples: Number of examples, n.
            sample_rate: Expected share of the examples in an update, in (0, 1].
            sampling: ``"poisson"``, or ``"fixed"`` for any other schedule that does
                not look at the data and draws an example at most once an epoch.
            data_set: Fingerprint of the data set.
            sweep: For mode ``"swept"``: returns an object with ``grad_norms`` and
                possibly ``confidences``, ``errors``, ``correct``, each ``(n,)``.
            weights: For ``weights_dir``: returns the state dict of now.
            processes: Of a distributed run; all begin it. Rows hold what all observed,
                and the first process keeps the weights.
            last_weights: Knows the name of the weights that the last update left.

        Raises:
            ValueError: If an argument is outside its domain or missing, or a loaded
                record is of another run.
        """
        positive(num_examples=num_examples, remedy="Count the examples.")
        positive(sample_rate=sample_rate, remedy="Nothing is ever drawn at rate 0.")
        NoisySGD(0, sample_rate, noise_std=0.0, sampling=sampling)  # checks them
        require_callable(
            "sweep", sweep, self.mode == "swept", "Recorder(criterion=...)"
        )
        require_callable(
            "weights", weights, self.weights_dir is not None, "a state dict"
        )
        run = RecordedRun(self.mode, num_examples, sample_rate, sampling, data_set)
        if self._resumed:
            self._begun().require_same(run)
        else:
            self._run = run
        self._resumed = False
        self._sweep, self._weights = sweep, weights
        self._processes, self._all_refuse = processes, False
        self._last_weights = last_weights
        self._waiting = WaitingReports()
        if self._starts_with_a_row and not self._begun().steps:
            self._write_row()

    def observe(self, indices: Tensor, grad_norms: Tensor) -> None:
        """Report rows that enter the update to come; call before ``step``.

        Reports are put down later, many updates at once, unless the recorder is
        strict. A swept recorder measures for itself and ignores the report. A norm
        that is not finite makes the ledger refuse.

        Args:
            indices: int64 ``(b,)``, which examples; of one named twice the later
                norm stays.
            grad_norms: float ``(b,)``, L2 norms before clipping.

        Raises:
            ValueError: If the lengths differ or an index is no example's.
        """
        expect(
            indices.shape == grad_norms.shape and grad_norms.dim() == 1,
            "grad_norms",
            f"a tensor of shape {tuple(grad_norms.shape)}",
            f"must have one norm per index, shape {tuple(indices.shape)}",
            "Report one norm for each row of the batch.",
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
        """Do as ``observe``, with what fits and is never written to again."""
        run = self._begun()
        if self.mode == "swept" or run.refusal:
            return
        self._waiting.add(indices, grad_norms, step=run.num_steps + 1)
        is_here = grad_norms.device.type == "cpu"
        if self._waiting.are_many or (self.strict and is_here):
            self._fetch_waiting()

    def step(
        self,
        *,
        noise_std: float,
        max_grad_norm: float,
        sample_rate: float | None = None,
    ) -> None:
        """Count one update of the weights, and write a row when one is due.

        Args:
            noise_std: Standard deviation of its noise on the **sum** of the
                per-example gradients.
            max_grad_norm: Its clip norm, ``inf`` without clipping.
            sample_rate: Its sample rate; default: the one of ``begin``.
        """
        run = self._begun()
        self._resumed = False
        rate = run.sample_rate if sample_rate is None else sample_rate
        run.count_step(Settings(float(noise_std), float(max_grad_norm), float(rate)))
        if self._last_weights is not None:
            self._last_weights.updated()
        is_over = run.refusal if self._processes is None else self._all_refuse
        if not is_over and run.row_is_due(self.every):
            self._write_row()

    def name_weights(self) -> None:
        """Have the ledger name the weights that the last update left.

        They are hashed, once after an update. Without it, or where the model is not
        known, the ledger does not say whose weights it describes.
        """
        run, last = self._begun(), self._last_weights
        if last is not None and run.weights in ("", CHANGED):
            run.weights = last.name() or run.weights

    def merge(self) -> None:
        """Give every process of a distributed run what all have observed so far.

        Rows are merged when they are written; until the next one, a process has its
        own observations only. Call it in all processes, after the same update, before
        one of them reads the ledger or saves a checkpoint for all. Afterwards their
        ledgers are equal, and the one of a single process that drew the same batches.

        Raises:
            AccountingError: If nothing is recorded, or the recorder is strict and the
                run cannot be accounted.
        """
        run = self._begun()
        self._fetch_waiting()
        reason = merge_(run, self._processes) if self._processes else ""
        self._all_refuse = bool(reason)
        if reason:
            self.refuse(reason)

    def refuse(self, reason: str) -> None:
        """Let training go on, but give no ledger of it any more, and warn once.

        Args:
            reason: What cannot be accounted, and the remedy. The first one stays.

        Raises:
            AccountingError: At once, if the recorder is strict.
        """
        run = self._begun()
        if self.strict:
            raise AccountingError(reason)
        if not run.refusal:
            run.refusal = reason
            warnings.warn(f"This run has no ledger any more. {reason}", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Everything recorded, as tensors, numbers and strings for a checkpoint."""
        run = self._begun()
        self._fetch_waiting()
        self.name_weights()
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
        """
        loaded = RecordedRun.from_state_dict(state)
        expect(
            loaded.source == self.mode,
            "the resumed record's mode",
            repr(loaded.source),
            f"must be this recorder's, {self.mode!r}",
            "Resume with the Recorder of the run saved.",
        )
        if self._run and not self._resumed:
            loaded.require_same(self._run)
        self._run, self._resumed, self._waiting = loaded, True, WaitingReports()
        if self._last_weights is not None:
            self._last_weights.forget()

    def _begun(self) -> RecordedRun:
        """The run, once there is one."""
        if self._run is None:
            raise AccountingError(
                "Nothing is being recorded yet. Call make_private, make_monitored or "
                "Recorder.begin first."
            )
        return self._run

    def _write_row(self) -> None:
        """Close the interval with a row for the weights of now."""
        run = self._begun()
        self.merge()
        row = {"grad_norms": run.observed}
        if self.mode == "swept" and not run.refusal:
            measured = cast(Callable[[], Any], self._sweep)()
            row = float32_row(measured, run.num_examples)
            norms = row["grad_norms"]
            self._refuse_unless_finite(norms, np.full(len(norms), run.num_steps))
        if run.refusal:
            return
        rank = 0 if self._processes is None else self._processes.rank
        if self.weights_dir is not None and rank == 0:
            weights = cast(Callable[[], Mapping[str, Any]], self._weights)
            save_weights(self.weights_dir, run.num_steps, weights(), run.data_set)
        run.close_row(row)

    def _fetch_waiting(self) -> None:
        """Keep what waits as the examples' latest observation, in order of reports."""
        reports = self._waiting.take()
        if reports is not None:
            indices, norms, steps = (column.numpy() for column in reports)
            self._begun().observe(indices, norms, steps=steps)
            self._refuse_unless_finite(norms, steps)

    def _refuse_unless_finite(
        self, norms: NDArray[np.float32], steps: NDArray[np.int64]
    ) -> None:
        """A gradient that is no number has no finite loss."""
        diverged = ~np.isfinite(norms)
        if diverged.any():
            self.refuse(
                f"A gradient norm was not finite by update {steps[diverged].min()}: "
                "training has diverged, and no privacy loss is finite. Lower the "
                "learning rate."
            )
