"""Run an unlearning method on a copy of a model.

``run`` is a generator of updates for callers that decide themselves when to evaluate
and when to stop. ``unlearn`` is the whole procedure: it splits the training set, runs
the epochs, evaluates after each, and returns the model with what may be claimed and a
record of what was run.

>>> import torch
>>> model = torch.nn.Linear(2, 3)
>>> unlearner = Unlearner(model, criterion=torch.nn.CrossEntropyLoss())
>>> batch = torch.randn(8, 2), torch.arange(8) % 3
>>> [step for step in unlearner.run([batch], num_steps=2)]
[1, 2]
"""

import copy
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from opacus_pi._shown import Shown, stable_repr
from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices, expect
from opacus_pi.accounting import fingerprint
from opacus_pi.accounting.conversion import check_delta, warn_of_large_delta
from opacus_pi.accounting.filtered_rewind import DeletionPolicy
from opacus_pi.accounting.guarantee import Guarantee
from opacus_pi.evaluation.trace import UnlearningTrace
from opacus_pi.integration.rerun import Update
from opacus_pi.ledger.erased_examples import not_erased
from opacus_pi.ledger.grad_norm_ledger import require_ledgers
from opacus_pi.ledger.run_identity import RunIdentity
from opacus_pi.models.batches import size_of
from opacus_pi.models.collating import Collating
from opacus_pi.models.copies import training_copy
from opacus_pi.models.live_modules import LiveModules, own_parameters_only
from opacus_pi.models.own_losses import Criterion, per_example_criterion
from opacus_pi.models.weights_name import weights_name
from opacus_pi.recording.checkpoints import Checkpoints
from opacus_pi.recording.random_states import RandomStates
from opacus_pi.unlearning.callbacks import Callback
from opacus_pi.unlearning.claims import (
    EngineFacts,
    Ledgers,
    claim,
    left_other_weights,
    runs_in,
)
from opacus_pi.unlearning.history import History, Runs
from opacus_pi.unlearning.loop import (
    MakeOptimizer,
    MakeScheduler,
    StopRule,
    Updates,
    updates,
)
from opacus_pi.unlearning.methods import Batch, FineTune, Method, Task
from opacus_pi.unlearning.plan import PastRun, Plan, make_plan, require_rest
from opacus_pi.unlearning.resuming import RunFile
from opacus_pi.unlearning.rewind import (
    Loop,
    RecordedTraining,
    require_states,
    states_of,
)
from opacus_pi.unlearning.rewind_plan import RewindPlan
from opacus_pi.unlearning.same_training_data import require_same_as_before
from opacus_pi.unlearning.watching import Evaluate, Watch

_FINE_TUNE = FineTune()
_NOTHING_NEW = (
    "Every example to forget was forgotten before: nothing new is forgotten. "
    "The model is only trained further on the rest."
)
_OTHER_WEIGHTS = (
    "No recorded run left the weights of this model: it is another one, or was loaded "
    "or changed after training. So the ledger says nothing of it, and the guarantee "
    "has no number."
)
_KEPT = (
    "Every example to forget was forgotten before: nothing new is forgotten, "
    "and nothing is trained again."
)
_STAYS = (
    "Every example to forget was forgotten before, by a rewind that left the "
    "weights of this model. These weights are kept: nothing is trained again."
)
_NOT_USED = (
    "The weights of this model are not those that the recorded training left, nor "
    "those of an earlier run of unlearning. They are not used: the rewind starts from "
    "a saved state of the recorded training. If you meant another model, pass the "
    "ledger and the checkpoints of its training."
)
_REWOUND_AGAIN = (
    "Every example to forget was forgotten before. But this model is not known "
    "to be what such a rewind leaves for all examples that were forgotten so far: it "
    "was trained further, or another kind of run forgot some of them. So the rewind is "
    "made again."
)
_NO_UPDATE = (
    "num_epochs=0 makes no update: the model keeps the weights that were trained with "
    "the forget set, and the guarantee is what holds for these. Pass num_epochs=1 or "
    "more to fine-tune without the set."
)


@dataclass(frozen=True, repr=False)
class UnlearningResult(Shown):
    """The result of one call of ``Unlearner.unlearn``.

    Args:
        model: The unlearned model, in evaluation mode.
        trace: The evaluations, before the first update and after each epoch.
        guarantee: What may be claimed.
        record: What was run, JSON-able. It lists the forgotten examples.
    """

    model: nn.Module
    trace: UnlearningTrace
    guarantee: Guarantee
    record: dict[str, Any]

    def _shown(self) -> dict[str, Any]:
        run = ("method", "num_epochs", "num_steps")
        return {
            "model": type(self.model).__name__,
            **{name: self.record[name] for name in run if name in self.record},
            "evaluations": len(self.trace),
            "guarantee": self.guarantee.kind,
        }


class Unlearner:
    """Copy of a model that forgets examples; the caller's model is never changed.

    Args:
        model: A module, plain or wrapped by Opacus, or an engine with ``module`` and
            ``ledger``.
        criterion: ``criterion(outputs, targets)``, one loss per example; a torch loss
            module is taken with ``reduction="none"``. Updates use the batch mean.
        method: ``FineTune()``, ``Langevin(...)``, ``L1Sparse(...)`` or your own.
        optimizer: ``params -> Optimizer``; default SGD, lr 0.01, momentum 0.9. A new
            one is made for every run.
        scheduler: ``optimizer -> scheduler``, stepped after each pass; default none.
        ledger: The ledger of the training (or those of several runs of it), for
            ``plan`` and the guarantee; default the engine's, if an engine was given.
        generator: For everything random; default a new one, seeded from torch's.

    Attributes:
        model: The copy.
        trace: The latest ``unlearn``'s trace, readable while it runs and after an
            interrupt.
        forgotten: int64, sorted: every example that ``unlearn`` was asked to forget.
        forgotten_exactly: int64, sorted: those that an exact rewind has forgotten. No
            later run uses them.
        history: What the guarantee needs to know about the runs of this model.
    """

    def __init__(
        self,
        model: nn.Module | Any,
        *,
        criterion: Criterion,
        method: Method = _FINE_TUNE,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        ledger: Ledgers | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._engine_facts = EngineFacts()
        if not isinstance(model, nn.Module) and hasattr(model, "module"):
            if ledger is None:
                ledger, self._engine_facts = model.ledger, _facts_of(model)
            model = model.module
        expect(
            isinstance(model, nn.Module),
            "model",
            type(model).__name__,
            "must be a torch module, or an engine that has prepared one",
            "Call engine.make_private or engine.make_monitored first.",
        )
        expect(
            hasattr(method, "needs_forget_set") and not isinstance(method, type),
            "method",
            repr(method),
            "must be an unlearning method",
            "Pass for example FineTune() or Langevin(noise_std=0.02).",
        )
        _require_types(optimizer, scheduler, ledger)
        self.model, self._live = training_copy(model), LiveModules(model)
        self.method = method
        self.ledger = ledger
        self.trace = UnlearningTrace(unit="epochs")
        self.forgotten: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.forgotten_exactly: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._data_set: str | None = None
        self.history = History()
        self._criterion = per_example_criterion(criterion)
        self._optimizer = optimizer or _default_optimizer
        self._given_optimizer = optimizer
        self._scheduler = scheduler
        self._generator = generator or _seeded_from_torch()

    def run(
        self,
        retain_loader: Iterable[Batch],
        num_steps: int,
        *,
        forget_loader: Iterable[Batch] | None = None,
    ) -> Iterator[int]:
        """Update the copy, and return control to the caller after each update.

        The caller decides when to evaluate and when to stop. ``self.model`` is in
        training mode during updates and may be evaluated in between.

        Args:
            retain_loader: Batches ``(x, y)`` of the retain set, iterated as often as
                needed. An empty batch is an update with mean gradient 0.
            num_steps: Largest number of updates; the method's schedules end there.
            forget_loader: Batches of the forget set, for methods that use it.

        Returns:
            An iterator over 1, 2, ..., the updates done.

        Raises:
            ValueError: If the method needs a forget loader and there is none; in the
                first update, if the copy computes with the original's parameters.
        """
        expect(
            num_steps >= 0,
            "num_steps",
            num_steps,
            "must be at least 0",
            "Pass the number of updates.",
        )
        expect(
            forget_loader is not None or not self.method.needs_forget_set,
            "forget_loader",
            None,
            f"must be given, because {type(self.method).__name__} uses the forget set",
            "Call run(..., forget_loader=...), or call unlearn instead.",
        )
        task = self._task(retain_loader, forget_loader)
        steps = updates(self.method, task, num_steps, self._optimizer, self._scheduler)
        return _of_own_parameters(steps, self.model, self._live)

    def unlearn(  # noqa: PLR0913
        self,
        train_set: Dataset[Any],
        forget_indices: ArrayLike,
        num_epochs: int = 25,
        evaluate: Evaluate | None = None,
        batch_size: int = 64,
        stop: StopRule | None = None,
        *,
        delta: float = 1e-5,
        callbacks: Sequence[Callback] = (),
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> UnlearningResult:
        """Forget a set: fine-tune on the rest of the training set by the method.

        A second call is a second request: it starts from the unlearned model and also
        leaves out what was forgotten before. Earlier results keep their own model.
        A run that fails before its first update leaves the unlearner as it was.
        Warns if all of a request was forgotten before, no epoch is asked for, or
        ``delta`` is not below 1/n.

        Args:
            train_set: The data set that the model was trained on.
            forget_indices: Positions in it, each once, not all of them.
            num_epochs: Passes over the retain set at most; ``plan(...).budget()`` gives
                a number that fits the forget set's privacy loss.
            evaluate: ``model -> dict`` of numbers, called with the model in evaluation
                mode before the first update and after each epoch.
            batch_size: Examples per batch.
            stop: ``StopWhen`` or ``StopAtPlateau``: ends the run at the evaluation that
                satisfies it. The guarantee needs a number of updates that does not
                depend on the forget set, and lists this as not met, even if the rule
                did not end the run.
            delta: δ in (0, 1) at which the guarantee states ε.
            callbacks: Told about the start, each epoch and the end.
            checkpoint: File that is written after each epoch but the last, and removed
                at the end. If it exists, the run continues from it, with the random
                states that it has, and ends as an unbroken run would have ended.
            progress: Whether to show a progress bar. Default: in a terminal only.
            collate_fn: Makes a batch of a list of items, such as the one that pads
                texts of different lengths. Default: torch's.

        Returns:
            Model, trace, guarantee and record.

        Raises:
            ValueError: If the indices are empty, repeated or out of range, no example
                would be left, ``num_epochs`` is negative, ``evaluate`` returns anything
                but named numbers, the ledger or an earlier run of this unlearner is of
                another data set or order, ``delta`` is outside (0, 1), ``stop`` is
                given without ``evaluate``, or the checkpoint is of another run.
        """
        check_delta(delta)
        _check_run(num_epochs, evaluate, stop)
        forget, gone, retain = self._split(train_set, forget_indices)
        num_fresh = len(gone) - len(self.forgotten)
        self._warn(num_fresh, num_epochs)
        record = {
            **self._settings(),
            "data_set": fingerprint(train_set),
            "forget_indices": forget.tolist(),
            "forgotten_before": self.forgotten.tolist(),
            "num_epochs": num_epochs,
            "batch_size": batch_size,
            "stop": None if stop is None else asdict(stop),
            "started": _now(),
        }
        start = weights_name(self.model)
        file = None if checkpoint is None else RunFile(checkpoint, start, record)
        watch = Watch(evaluate, stop, callbacks, progress, file)
        guarantee = self._claim(forget, delta, stop, record["data_set"])
        if math.isfinite(guarantee.epsilon(delta)):
            warn_of_large_delta(delta, len(gone) + len(retain))
        history = self.history.after(self.method, stop)
        with watch.all_or_nothing(self, self._generator):
            run = stable_repr(self.method) if num_epochs else ""
            self.history = history.begun(start, num_fresh, run)
            self.forgotten, self._data_set = gone, record["data_set"]
            self.model = copy.deepcopy(self.model)
            loaders = self._loaders(train_set, retain, gone, batch_size, collate_fn)
            costs = self._fit(loaders, num_epochs, watch)
        self.history = self.history.ended(weights_name(self.model))
        before = None if self.history.runs is None else history.runs
        record |= {**costs, **self._origin(), **self._sequence(before)}
        return UnlearningResult(self.model, self.trace, guarantee, record)

    def _warn(self, num_fresh: int, num_epochs: int) -> None:
        """Say before a run what it will not do.

        Args:
            num_fresh: How many examples are forgotten for the first time.
            num_epochs: How long it fine-tunes.
        """
        if left_other_weights(runs_in(self.ledger), self.model, self.history):
            warnings.warn(_OTHER_WEIGHTS, stacklevel=3)
        if not num_fresh:
            warnings.warn(_NOTHING_NEW if num_epochs else _KEPT, stacklevel=3)
        elif not num_epochs:
            warnings.warn(_NO_UPDATE, stacklevel=3)

    def _split(
        self, train_set: Dataset[Any], forget_indices: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the examples to forget and those to retain, after checking them.

        Args:
            train_set: The training set. Its fingerprint must be that in the ledger,
                because a position would name another example otherwise.
            forget_indices: What the caller passed.

        Returns:
            Sorted positions of the forget set, of all examples that are then forgotten,
            with those of earlier calls, and of the rest, which is retained.

        Raises:
            ValueError: As ``unlearn``.
        """
        name = fingerprint(train_set)
        for run in runs_in(self.ledger):
            run.require_data_set(name)
        require_same_as_before(self._data_set, name)
        size = size_of(train_set)
        forget = distinct_indices("forget_indices", forget_indices, size)
        gone = np.union1d(self.forgotten, forget)
        retain = np.setdiff1d(np.arange(size), gone)
        require_rest(len(retain), size)
        return forget, gone, retain

    def plan(
        self,
        forget_indices: ArrayLike,
        *,
        order: float = 8.0,
        assumed_noise_std: float | None = None,
        past_runs: Sequence[PastRun] = (),
        batch_size: int = 64,
        delta: float = 1e-5,
        checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
        deletion_policy: DeletionPolicy | None = None,
    ) -> Plan:
        """Return difficulty, cost and kind of guarantee, before anything is run.

        Examples that this unlearner forgot before are not in the retain set either, and
        the guarantee covers them too, as that of ``unlearn`` does.

        Args:
            forget_indices: The examples to forget.
            order: Rényi order of the privacy losses.
            assumed_noise_std: Noise on the sum of gradients to assume where training
                added none; the losses then are a ranking only.
            past_runs: ``(forget_indices, epochs it took)`` of sets unlearned from
                models of this training run; two of different difficulty give a
                prediction. For a run that ended before its set was forgotten, pass
                ``(forget_indices, inf, epochs it ran)``: it counts with the epochs that
                it ran, and the prediction is at best a lower bound.
            batch_size: Examples per batch, to count steps.
            delta: δ in (0, 1) at which the guarantee states ε.
            checkpoints: The saved states of the training, as in ``rewind``. The plan
                then also says how far back a rewind goes and what it costs.
            deletion_policy: The policy of the run, for a filtered rewind; None: an
                exact one.

        Returns:
            The plan.

        Raises:
            ValueError: If there is no ledger, or the indices or ``delta`` are bad, or
                training added no noise and none is assumed; with ``checkpoints`` also
                as ``plan_rewind``.
            AccountingError: With ``checkpoints``, as ``plan_rewind``.
        """
        check_delta(delta)
        plan = make_plan(
            runs_in(self.ledger),
            forget_indices,
            order=order,
            assumed_noise_std=assumed_noise_std,
            past_runs=past_runs,
            batch_size=batch_size,
            forgotten_before=self.forgotten,
        ).after(self.history, self.forgotten_exactly)
        plan = replace(plan.claiming(self._claim(plan.forget, delta)), delta=delta)
        require_states(checkpoints, deletion_policy)
        if checkpoints is None:
            return plan
        rewind = self.plan_rewind(
            plan.forget, checkpoints=checkpoints, deletion_policy=deletion_policy
        )
        return replace(plan, rewind=rewind)

    def plan_rewind(
        self,
        forget_indices: ArrayLike,
        *,
        checkpoints: Checkpoints | str | os.PathLike[str],
        deletion_policy: DeletionPolicy | None = None,
    ) -> RewindPlan:
        """Return how far ``rewind`` goes back, what it costs, and what it proves.

        Args:
            forget_indices: The examples to forget.
            checkpoints: As in ``rewind``.
            deletion_policy: The policy of the run; None: an exact rewind.

        Returns:
            The plan; nothing is trained.

        Raises:
            ValueError: As ``rewind``.
            AccountingError: As ``rewind``.
        """
        training = self._recorded(checkpoints)
        size = training.record.num_examples
        forget = distinct_indices("forget_indices", forget_indices, size)
        require_rest(size - len(np.union1d(self.forgotten, forget)), size)
        plan = training.plan(
            forget, self.forgotten, deletion_policy, self.forgotten_exactly
        )
        training.require_architecture(plan)
        if plan.is_free and not self._keeps_rewound(forget, deletion_policy):
            training.require_trained()
        return plan

    def rewind(
        self,
        train_set: Dataset[Any],
        forget_indices: ArrayLike,
        *,
        checkpoints: Checkpoints | str | os.PathLike[str],
        deletion_policy: DeletionPolicy | None = None,
        update: Update | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        evaluate: Evaluate | None = None,
    ) -> UnlearningResult:
        """Forget a set by going back to a saved state and training the rest without it.

        Without a policy the rewind is exact: it goes back to the last state from before
        the set was first drawn. With the deletion policy of the run it goes back to
        where the set's charges would exceed the policy. Often they never do, and the
        trained model is kept. The rest is trained with the recorded noise, clip norm,
        sample rate and learning rates, and with new random numbers.

        A second call is a second request: it covers the sets of both, and starts from
        the states of the recorded training again. What an exact rewind has forgotten
        stays exactly forgotten: a later one with a policy starts before the first use
        of these examples. A request for examples that were all forgotten before keeps
        the model if a rewind left it; a warning says whether it did.

        Args:
            train_set: The data set that the model was trained on.
            forget_indices: Positions in it, each once, not all of them.
            checkpoints: The ``Checkpoints`` of the recorder, or their directory.
            deletion_policy: The policy that was fixed before training. Default: an
                exact rewind.
            update: ``update(model, optimizer, batch)`` makes one update, for a training
                loop that did more than one backward pass of the mean loss. It gets the
                model and the optimizer as Opacus prepares them, if training was
                private. It must call ``optimizer.step()`` once.
            collate_fn: Makes a batch of a list of items. Default: torch's.
            evaluate: ``model -> dict`` of numbers, called before and after; only after
                the run if the weights of the model are of no known run, which a warning
                says: they are not used.

        Returns:
            Model, trace, guarantee and record.

        Raises:
            ValueError: If the indices are bad, there is no ledger, the states are
                missing or of another run, no state is from before the first use, the
                policy was not fixed before training, or the training cannot be
                repeated.
            AccountingError: If a link of the chain of custody is broken.
        """
        forget, _, _ = self._split(train_set, forget_indices)
        training = self._recorded(checkpoints, fingerprint(train_set))
        plan = training.plan(
            forget, self.forgotten, deletion_policy, self.forgotten_exactly
        )
        stays = self._is_rewound(forget, deletion_policy)
        rerun = None
        if not stays:
            rerun = training.rest(
                plan,
                train_set,
                Loop(self._criterion, update, self._given_optimizer, collate_fn),
                seed=int(torch.randint(2**62, (), generator=self._generator)),
            )
        record = {
            "data_set": fingerprint(train_set),
            "started": _now(),
            **plan.facts(),
            **({"num_steps": 0, "start": None} if stays else {}),
        }
        self.trace, clock = UnlearningTrace(unit="epochs"), time.perf_counter()
        self._evaluate_at(0, None if self._is_other(training) else evaluate)
        if rerun is not None:
            steps = _of_own_parameters(rerun.run(), rerun.model, self._live)
            for _ in tqdm(steps, total=plan.num_updates, disable=None):
                pass
        # Only now: an update that fails leaves the unlearner as it was.
        self.model = copy.deepcopy(self.model) if rerun is None else rerun.model
        before = self.history.runs if stays else ()
        runs = before if stays else ((record["method"], 1),)
        self.history = History(left=weights_name(self.model), runs=runs)
        self.forgotten = plan.gone
        if deletion_policy is None:
            self.forgotten_exactly = plan.gone
        if rerun is not None:
            self._evaluate_at(plan.num_updates / plan.updates_per_epoch, evaluate)
        self.model.eval()
        self.trace.cost["seconds"] = time.perf_counter() - clock
        record |= {**self.trace.cost, **self._origin(), **self._sequence(before)}
        return UnlearningResult(self.model, self.trace, plan.guarantee, record)

    def _is_rewound(
        self, forget: NDArray[np.int64], policy: DeletionPolicy | None
    ) -> bool:
        """Return whether a rewind keeps the present model, which one has left.

        Warns if all examples were forgotten before: the caller may not expect what
        follows.

        Args:
            forget: The examples to forget.
            policy: The deletion policy; None: an exact rewind.
        """
        stays = self._keeps_rewound(forget, policy)
        if np.isin(forget, self.forgotten).all():
            warnings.warn(_STAYS if stays else _REWOUND_AGAIN, stacklevel=3)
        return stays

    def _keeps_rewound(
        self, forget: NDArray[np.int64], policy: DeletionPolicy | None
    ) -> bool:
        """Return whether a rewind for these examples has left the present model.

        Args:
            forget: The examples to forget.
            policy: The deletion policy; None: an exact rewind, which all examples that
                were forgotten before must have had, too.
        """
        is_enough = policy is not None or np.array_equal(
            self.forgotten, self.forgotten_exactly
        )
        return (
            bool(np.isin(forget, self.forgotten).all())
            and is_enough
            and self.history.rewound
            and self.history.left == weights_name(self.model)
        )

    def _origin(self) -> dict[str, Any]:
        """Return what ties a run to its training and to its result, for the record."""
        return {
            "ledgers": [asdict(RunIdentity.of(run)) for run in runs_in(self.ledger)],
            "trained_weights": self.history.trained or None,
            "unlearned_weights": self.history.left,
        }

    def _sequence(self, before: Runs | None) -> dict[str, Any]:
        """Return which runs led to the model, for the record of the last one.

        Args:
            before: The runs before it, as in ``History``.
        """
        exactly = self.forgotten_exactly if self.history.keeps_exact else ()
        return {
            "earlier_runs": None if before is None else [list(run) for run in before],
            "forgotten_exactly": [int(i) for i in exactly],
            "finished": _now(),
        }

    def _recorded(
        self,
        checkpoints: Checkpoints | str | os.PathLike[str],
        data_set: str | None = None,
    ) -> RecordedTraining:
        """Return the recorded training that a rewind repeats a part of.

        Args:
            checkpoints: Its saved states, or their directory.
            data_set: Fingerprint of the data set of the run; None in a plan, which does
                not warn of weights that the run would not use.
        """
        training = RecordedTraining.of(
            self.model,
            runs_in(self.ledger),
            states_of(checkpoints),
            replace(self._engine_facts, data_set=data_set),
        )
        if data_set is not None and self._is_other(training):
            warnings.warn(_NOT_USED, stacklevel=3)
        return training

    def _is_other(self, training: RecordedTraining) -> bool:
        """Return whether the weights are of no known run, so that a rewind drops them.

        Args:
            training: The recorded training.
        """
        return training.has_other_weights(self.history.left)

    def _claim(
        self,
        forget: NDArray[np.int64],
        delta: float,
        stop: StopRule | None = None,
        data_set: str | None = None,
    ) -> Guarantee:
        """Return what may be claimed once this set and earlier ones are forgotten.

        It is computed before the first update, so that no result of the run can
        influence it.

        Args:
            forget: Sorted positions of the forget set.
            delta: δ at which the guarantee states ε.
            stop: The rule that may end the run early, or None.
            data_set: Fingerprint of the data set of the run; None in a plan.
        """
        return claim(
            self.method,
            self.model,
            self.ledger,
            forget,
            self.history,
            stop=stop,
            forgotten_before=self.forgotten,
            engine_facts=replace(self._engine_facts, data_set=data_set),
            delta=delta,
        )

    def _task(
        self,
        retain_loader: Iterable[Batch],
        forget_loader: Iterable[Batch] | None,
    ) -> Task:
        """Return the model and the data as a task for the method."""
        return Task(
            self.model, self._criterion, retain_loader, forget_loader, self._generator
        )

    def _fit(
        self,
        loaders: tuple[DataLoader[Any], DataLoader[Any] | None],
        num_epochs: int,
        watch: Watch,
    ) -> dict[str, Any]:
        """Run the epochs, evaluating after each; return the steps and the time.

        An epoch ends when the method has made as many updates as ``pass_length``
        announced for it. The model's gradients are freed at the end, so that a stored
        result is no larger than the model.

        Args:
            loaders: Of the retain set, and of the forget set if the method uses it.
            num_epochs: Passes over the retain set at most.
            watch: What is evaluated, told and saved meanwhile.

        Returns:
            ``num_steps`` and the entries of the trace's cost, for the record; before
            them what the run recorded at its start, if it is continued from a file.
        """
        clock = time.perf_counter() - watch.seconds_before
        random = self._random_states(loaders)
        self._begin(watch, random)
        task = self._task(*loaders)
        lengths = [self.method.pass_length(task, i) for i in range(num_epochs)]
        ends = np.cumsum(lengths, dtype=np.int64)
        idle = num_epochs == 0 or self._may_stop(watch.stop)
        num_steps = 0 if idle else int(ends[-1])

        def save(run: Updates) -> None:
            self.trace.cost["seconds"] = time.perf_counter() - clock
            watch.save(random, run, self.trace)

        run = Updates(
            self.method, task, num_steps, self._optimizer, self._scheduler, save
        )
        watch.restore(run, random)
        steps = _of_own_parameters(run, self.model, self._live)
        with watch.bar(run.step, num_steps) as bar:
            for step in steps:
                watch.updated()
                bar.update()
                epoch = int(np.searchsorted(ends, step)) + 1
                if step == ends[epoch - 1]:
                    metrics = self._evaluate_at(epoch, watch.evaluate)
                    for callback in watch.callbacks:
                        callback.on_epoch_end(self, epoch, metrics)
                    if self._may_stop(watch.stop):
                        break
        self.model.zero_grad(set_to_none=True)
        self.model.eval()
        self.trace.cost["seconds"] = time.perf_counter() - clock
        watch.end(self)
        begun = {} if watch.file is None else watch.file.record
        return {**begun, "num_steps": run.step, **self.trace.cost}

    def _begin(self, watch: Watch, random: RandomStates) -> None:
        """Evaluate the model before the first update, or take the saved evaluations.

        Args:
            watch: What is evaluated, told and saved.
            random: All generators of the run.
        """
        if watch.saved is None:
            self.trace = UnlearningTrace(unit="epochs")
            metrics = self._evaluate_at(0, watch.evaluate)
            for callback in watch.callbacks:
                callback.on_start(self, metrics)
        else:
            self.trace = UnlearningTrace(**watch.saved.trace)
        if watch.file is not None:
            watch.file.begin(random, watch.saved)

    def _random_states(
        self, loaders: tuple[DataLoader[Any], DataLoader[Any] | None]
    ) -> RandomStates:
        """Return all generators that a run draws from."""
        own = {"method": self._generator}
        for name, loader in zip(("retain", "forget"), loaders, strict=True):
            if loader is not None:
                own[name] = loader.generator
        return RandomStates(own)

    def _evaluate_at(self, epoch: float, evaluate: Evaluate | None) -> dict[str, float]:
        """Evaluate the copy, append the metrics to the trace, and return them.

        Args:
            epoch: Epochs done; 0 is before the first update.
            evaluate: ``model -> dict`` of numbers; None evaluates nothing.
        """
        if evaluate is None:
            return {}
        self.model.eval()
        metrics = evaluate(self.model)
        self.trace.append(epoch, metrics)
        return dict(metrics)

    def _may_stop(self, stop: StopRule | None) -> bool:
        """Return whether the evaluations so far satisfy the stopping rule."""
        return stop is not None and stop.reached(self.trace)

    def _loaders(
        self,
        train_set: Dataset[Any],
        retain: NDArray[np.int64],
        forget: NDArray[np.int64],
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any] | None,
    ) -> tuple[DataLoader[Any], DataLoader[Any] | None]:
        """Shuffled loaders of both sets, in an order that no method changes.

        The order comes from one draw of the generator, whether or not the forget set is
        used, so that methods are compared on the same batches.

        Args:
            train_set: The training set.
            retain: Positions of the retain set.
            forget: Positions of all examples to forget, those of earlier calls
                included: a method that uses the forget set must not let them come back.
                Erased examples cannot be read, and are left out.
            batch_size: Examples per batch.
            collate_fn: As for ``unlearn``.

        Returns:
            The loader of the retain set, and that of the forget set or None.
        """
        place = self._generator.device
        seed = int(torch.randint(2**62, (), generator=self._generator, device=place))

        def loader(indices: NDArray[np.int64], seed: int) -> DataLoader[Any]:
            order = torch.Generator().manual_seed(seed)
            subset = Subset(train_set, indices.tolist())
            return DataLoader(
                subset,
                batch_size,
                shuffle=True,
                generator=order,
                collate_fn=Collating(collate_fn),
            )

        if not self.method.needs_forget_set:
            return loader(retain, seed), None
        readable = not_erased(train_set, forget)
        expect(
            len(readable) > 0,
            "forget_indices",
            "erased examples only",
            "must have an example that can be read, because the method uses the "
            "forget set",
            "These examples were forgotten before. Leave them out, or use a method "
            "that needs no forget set.",
        )
        return loader(retain, seed), loader(readable, seed + 1)

    def _settings(self) -> dict[str, Any]:
        """Return method, optimizer and seed, for JSON.

        The optimizer is a function of the user's. It is called with a dummy weight to
        learn its class and its settings, of which the numbers and switches are kept.
        """
        optimizer = self._optimizer([nn.Parameter(torch.zeros(1))])
        numbers = {
            name: value
            for name, value in optimizer.defaults.items()
            if isinstance(value, int | float)
        }
        return {
            "method": stable_repr(self.method),
            "optimizer": {"name": type(optimizer).__name__, **numbers},
            "seed": self._generator.initial_seed(),
        }


def _check_run(
    num_epochs: int, evaluate: Evaluate | None, stop: StopRule | None
) -> None:
    """Check arguments of ``unlearn``.

    Args:
        num_epochs: As in ``unlearn``, as are the other arguments.
        evaluate: The evaluation, or None.
        stop: The rule that may end the run early, or None.

    Raises:
        ValueError: As ``unlearn``.
    """
    expect(
        stop is None or evaluate is not None,
        "evaluate",
        None,
        "must be given if stop is given",
        "stop decides by the metrics that evaluate(model) returns.",
    )
    expect(
        isinstance(num_epochs, int | np.integer) and num_epochs >= 0,
        "num_epochs",
        repr(num_epochs),
        "must be a whole number, at least 0",
        "Pass the number of passes over the examples that are kept.",
    )


def _of_own_parameters(
    steps: Iterable[int], copied: nn.Module, live: LiveModules
) -> Iterator[int]:
    """Yield the updates of a copy, unless it computes with the original's parameters.

    Args:
        steps: Make the updates.
        copied: The copy.
        live: The modules of the original.

    Raises:
        ValueError: Before the first backward pass.
    """
    with own_parameters_only(copied, live):
        yield from steps


def _facts_of(engine: Any) -> EngineFacts:
    """Return what an engine knows beside its ledger; nothing, if it is not one of ours.

    Args:
        engine: The engine that an unlearner was made from.
    """
    bound = getattr(engine, "accountant_bound", None)
    return EngineFacts(None if bound is None else bound())


def _now() -> str:
    """Return the time in UTC, for a record."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _default_optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return SGD with the constants of the paper's fine-tuning."""
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


def _seeded_from_torch() -> torch.Generator:
    """Return a new generator whose seed is drawn from torch's global one.

    A caller who has called ``torch.manual_seed`` gets the same run again.
    """
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())))


def _require_types(
    optimizer: MakeOptimizer | None,
    scheduler: MakeScheduler | None,
    ledger: Ledgers | None,
) -> None:
    """Refuse arguments of another type before they are first used."""
    for name, make in (("optimizer", optimizer), ("scheduler", scheduler)):
        expect(
            make is None or callable(make),
            name,
            type(make).__name__,
            f"must be a function that makes the {name}",
            "Pass for example optimizer=lambda params: SGD(params, lr=0.1).",
        )
    if ledger is not None:
        require_ledgers(ledger)
