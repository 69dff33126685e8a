"""Plan and run rewinds: go back to a saved state, and train again without a set.

*Exact rewind.* Until an example is drawn for the first time, training with it and
without it are the same. So a model that goes back to a state from before, and trains
the rest without the example, has exactly the distribution of a retrained model: all
divergences are 0, in both directions, for any network, optimizer and loss.

*Filtered rewind.* With a deletion policy that was fixed before training, examples may
stay in the updates that they are in, as long as the sum of their charges stays within
the policy; often nothing has to be trained again at all
(``accounting.filtered_rewind``). Where the policy allows what any set of this size can
do in the worst case, every deletion is free, and no charge is even looked at.

*Both.* Examples that an exact rewind has forgotten stay exactly forgotten: a later
filtered rewind goes back before their first use, too. When that was depends on the
draws alone, so the filter still does not look ahead.

*What breaks them:* a record that does not know who was in a batch; states of another
run; hyper-parameters, or requests, that were chosen by looking at the trained model.
The exact rewind also holds for models with BatchNorm, whose statistics are in the
state. The filtered one does not: an example then acts on the gradients of others.
"""

import copy
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

from opacus_pi._torch_compat import BatchNormBase
from opacus_pi._validate import expect, require
from opacus_pi.accounting import GradNormLedger
from opacus_pi.accounting.filtered_rewind import DeletionPolicy, restart_update
from opacus_pi.accounting.guarantee import Guarantee
from opacus_pi.integration.rerun import (
    MakeOptimizer,
    Rerun,
    Update,
    require_architecture,
    require_flat_clipping,
    require_repeatable,
)
from opacus_pi.ledger.fingerprint import fingerprint
from opacus_pi.ledger.participation_record import ParticipationRecord
from opacus_pi.ledger.same_data import same_data_set
from opacus_pi.models.own_losses import Criterion
from opacus_pi.models.weights_name import weights_name
from opacus_pi.recording.checkpoints import Checkpoints, policy_in
from opacus_pi.unlearning.claims import EngineFacts, claim
from opacus_pi.unlearning.methods import FineTune
from opacus_pi.unlearning.rewind_claims import ALIKE, rewind_claim
from opacus_pi.unlearning.rewind_plan import RewindPlan
from opacus_pi.unlearning.same_training_data import require_same_preparation

__all__ = ["Loop", "OtherWeights", "RecordedTraining", "require_states", "states_of"]

_NO_EXAMPLES = np.empty(0, dtype=np.int64)
_AGAIN = "Train again with Recorder(checkpoints=Checkpoints(directory, every=...))."


class OtherWeights(ValueError):
    """The trained model would be kept, but the model has other weights."""


@dataclass(frozen=True)
class Loop:
    """One update of the training loop, as a rewind repeats it.

    Args:
        criterion: ``criterion(outputs, targets)``, one loss per example.
        update: ``update(model, optimizer, batch)``; None: the mean loss, one step.
        make_optimizer: ``params -> Optimizer``; None: torch's of the recorded class.
        collate_fn: Makes a batch of a list of items; None: torch's.
    """

    criterion: Criterion
    update: Update | None = None
    make_optimizer: MakeOptimizer | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None


def states_of(checkpoints: Checkpoints | str | os.PathLike[str]) -> Checkpoints:
    """Return the saved states that a caller named by themselves or by a directory.

    Args:
        checkpoints: The object of the recorder, or its directory.
    """
    if isinstance(checkpoints, Checkpoints):
        return checkpoints
    expect(
        isinstance(checkpoints, str | os.PathLike),
        "checkpoints",
        type(checkpoints).__name__,
        "must be the Checkpoints of the recorder, or their directory",
        f"If the training saved no states, a rewind is not possible. {_AGAIN}",
    )
    return Checkpoints(checkpoints)


def _require_run_of(
    ledger: GradNormLedger, states: Checkpoints, record: ParticipationRecord
) -> None:
    """Refuse states of another run than the ledger's, and a record that ends too early.

    Args:
        ledger: The ledger of the run.
        states: The saved states.
        record: Their participations.

    Raises:
        ValueError: In these cases, with the remedy.
    """
    mechanism, found = ledger.mechanism, record.num_steps
    is_alike = record.sampling == mechanism.sampling and same_data_set(
        record.data_set, ledger.data_set or ""
    )
    if is_alike and found < mechanism.num_steps:
        states.require_whole(record)
        raise ValueError(
            f"checkpoints: the participations in {states.directory} end after update "
            f"{found}, and the ledger has {mechanism.num_steps} updates. If they are "
            "of the ledger's run, their last file participations-*.safetensors is "
            "missing, or was not written: restore it from a copy, or call "
            "recorder.checkpoints.flush() in the process that trained. Otherwise pass "
            "the checkpoints of the ledger's run."
        )
    expect(
        is_alike and found == mechanism.num_steps,
        "checkpoints",
        f"a run of {found} updates on {record.data_set}",
        f"must be those of the ledger's run, {mechanism.num_steps} updates on "
        f"{ledger.data_set}",
        "Pass the checkpoints of this run.",
    )


def require_states(
    checkpoints: Checkpoints | str | os.PathLike[str] | None,
    policy: DeletionPolicy | None,
) -> None:
    """Refuse a deletion policy without the states that it goes back to.

    Args:
        checkpoints: The saved states, or None.
        policy: The deletion policy, or None.

    Raises:
        ValueError: If there is a policy and no states.
    """
    expect(
        checkpoints is not None or policy is None,
        "checkpoints",
        None,
        "must be given together with deletion_policy",
        "Pass the Checkpoints of the recorder, or their directory.",
    )


@dataclass(frozen=True)
class RecordedTraining:
    """A model, the ledger of its training, and the states that were saved.

    Args:
        model: The model that the caller has.
        ledger: The ledger of its training.
        states: The saved states.
        record: Its participations.
        engine_facts: What the engine of the training knows.
        has_weights: Whether the model holds the trained weights, or is only an
            architecture.
    """

    model: nn.Module
    ledger: GradNormLedger
    states: Checkpoints
    record: ParticipationRecord
    engine_facts: EngineFacts
    has_weights: bool = True

    @classmethod
    def of(
        cls,
        model: nn.Module,
        ledgers: tuple[GradNormLedger, ...],
        states: Checkpoints,
        engine_facts: EngineFacts,
        *,
        has_weights: bool = True,
    ) -> "RecordedTraining":
        """Bring together what belongs to one run, or refuse.

        Args:
            model: The model that the caller has.
            ledgers: The ledger of its training, and no other.
            states: The saved states.
            engine_facts: What the engine of the training knows.
            has_weights: As in the class.

        Raises:
            ValueError: If there is no ledger or several, or the states are those of
                another run, or incomplete.
            AccountingError: If a link of the chain of custody is broken.
        """
        expect(
            len(ledgers) == 1,
            "ledger",
            f"{len(ledgers)} ledgers",
            "must be the ledger of the run whose states were saved",
            "Pass Unlearner(engine, ...), or Unlearner(..., ledger=engine.ledger).",
        )
        ledger, record = ledgers[0], states.record
        if ledger.custody is not None:
            ledger.custody.require_intact()
        _require_run_of(ledger, states, record)
        expect(
            not ledger.weights
            or not record.weights
            or ledger.weights == record.weights,
            "checkpoints",
            f"a run that ended with the weights {record.weights}",
            "must be those of the ledger's run, which ended with the weights "
            f"{ledger.weights}",
            "Pass the checkpoints of this run.",
        )
        return cls(model, ledger, states, record, engine_facts, has_weights)

    def require_architecture(self, plan: RewindPlan) -> None:
        """Refuse a model that the state of a plan does not fit, before it is run.

        Args:
            plan: Made by ``plan``.

        Raises:
            ValueError: If its tensors or modules are not those of the training.
        """
        steps = self.states.steps
        if steps:
            step = plan.start if plan.start in steps else steps[-1]
            require_architecture(self.model, self.states.load(step))

    def has_other_weights(self, left: str) -> bool:
        """Return whether no recorded run left the weights of the model.

        Args:
            left: Name of the weights that the last run of unlearning left; empty: none.
        """
        known = self.record.weights
        return bool(known) and weights_name(self.model) not in (known, left)

    def start(self, gone: NDArray[np.int64], policy: DeletionPolicy | None) -> int:
        """Return after which update these examples must be left out.

        Args:
            gone: All examples that are forgotten after the rewind.
            policy: The deletion policy, which is that of the run; None: an exact
                rewind.

        Raises:
            ValueError: If there is no state to go back to, or a state is missing.
        """
        record, steps = self.record, self.states.steps
        first = int(record.first_updates()[gone].min())
        if policy is None:
            if first > record.num_steps:
                return record.num_steps
            before = [step for step in steps if step < first]
            start = max(before, default=-1)
        else:
            self._require_states()
            start = restart_update(record, gone, policy.mu, steps)
        require(
            start in steps or start == record.num_steps,
            f"An example to forget was first drawn in update {first}, and no "
            "state was saved before it (states were saved after the updates "
            f"{list(steps[:5])}).",
            "Retrain from the start without these examples.",
        )
        return start

    def _require_policy(self, policy: DeletionPolicy) -> None:
        """Refuse a policy that was not fixed before training, and BatchNorm."""
        fixed = policy_in(self.record.policy)
        expect(
            fixed is not None,
            "deletion_policy",
            policy,
            "must have been fixed before training",
            "A policy that is made after a run certifies nothing. Use an exact rewind, "
            "or train with Checkpoints(directory, deletion_policy=...).",
        )
        expect(
            policy == fixed,
            "deletion_policy",
            policy,
            f"must be that of the run, {fixed}",
            "Pass the policy of the run: it cannot be changed after training.",
        )
        layers = [
            n for n, m in self.model.named_modules() if isinstance(m, BatchNormBase)
        ]
        expect(
            not layers,
            "model",
            f"batch statistics in {layers[:1]}",
            "must have no BatchNorm for a filtered rewind",
            "In BatchNorm layers an example acts on the gradients of others. Use an "
            "exact rewind.",
        )

    def _require_states(self) -> None:
        """Refuse states that are not all there, or of a training that did not clip."""
        missing = sorted(set(self.record.kept) - set(self.states.steps))
        expect(
            not missing,
            "checkpoints",
            f"no states of the updates {missing[:5]}",
            "must have all states that the run kept",
            "Restore them from a copy: the proof does not hold if states were removed.",
        )
        require_flat_clipping(self.states.load(self.states.steps[0]))

    def _kept(
        self,
        forget: NDArray[np.int64],
        forgotten_before: NDArray[np.int64],
        policy: DeletionPolicy,
    ) -> tuple[float, Guarantee | None]:
        """Return the bound if the trained model is kept, and whether that is enough.

        It depends on the size of the set and on the recorded noise and sampling, not
        on which examples are forgotten.

        Args:
            forget: The examples to forget.
            forgotten_before: Examples of earlier requests.
            policy: The deletion policy.

        Returns:
            ε at the policy's δ, in both directions, or ``inf`` if there is no bound;
            and the guarantee if it is within the policy: nothing is trained again then.
        """
        found = self._claim(forget, forgotten_before, policy, with_estimate=False)
        if found.kind not in ("certified", "certified if"):
            return math.inf, None
        epsilon = max(found.epsilon(policy.delta), found.reverse_epsilon(policy.delta))
        if epsilon > policy.epsilon:
            return epsilon, None
        found = self._claim(forget, forgotten_before, policy, with_estimate=True)
        return epsilon, replace(found, method=f"the trained model, kept {ALIKE}")

    def _claim(
        self,
        forget: NDArray[np.int64],
        forgotten_before: NDArray[np.int64],
        policy: DeletionPolicy,
        *,
        with_estimate: bool,
    ) -> Guarantee:
        """Return what may be claimed if the trained model is kept as it is.

        Args:
            forget: The examples to forget.
            forgotten_before: Examples of earlier requests.
            policy: The deletion policy.
            with_estimate: Whether to compute the estimate, too, which takes long.
        """
        return claim(
            FineTune(),
            self.model,
            self.ledger,
            forget,
            forgotten_before=forgotten_before,
            has_weights=self.has_weights,
            engine_facts=self.engine_facts,
            delta=policy.delta,
            with_estimate=with_estimate,
        )

    def rest(
        self,
        plan: RewindPlan,
        train_set: Dataset[Any],
        loop: "Loop",
        *,
        seed: int,
    ) -> Rerun | None:
        """Return the training that a plan needs, or None if it needs none.

        Args:
            plan: Made by ``plan``.
            train_set: The data set of the run.
            loop: How one update is made.
            seed: A seed of the caller's, so that the result can be repeated.

        Raises:
            ValueError: If the training cannot be repeated, or a state is missing or
                damaged, or the model that would be kept is not the trained one.
        """
        if plan.is_free:
            self.require_trained()
            return None
        require_same_preparation(self.ledger.data_set or "", fingerprint(train_set))
        state = self.states.load(plan.start)
        require_repeatable(self.record, state, train_set)
        require(
            loop.update is not None or not self.record.has_step_hooks(plan.start),
            "Hooks were on the steps of the optimizer during the training "
            "(register_step_pre_hook or register_step_post_hook). A rewind makes the "
            "updates with a new optimizer, without these hooks.",
            "Pass rewind(..., update=...), a function that makes one update with "
            "whatever the hooks did. If they changed neither gradients nor weights, it "
            "only has to make the update.",
        )
        return Rerun(
            model=copy.deepcopy(self.model),
            criterion=loop.criterion,
            train_set=train_set,
            record=self.record,
            state=state,
            forget=plan.gone,
            generator=fresh_generator(self.record, plan, seed),
            update=loop.update,
            make_optimizer=loop.make_optimizer,
            collate_fn=loop.collate_fn,
        )

    def require_trained(self) -> None:
        """Refuse to keep a model that has not the weights of the training.

        Raises:
            OtherWeights: If it has others.
        """
        if weights_name(self.model) != self.record.weights:
            raise OtherWeights(
                "Nothing has to be trained again for this request, so the trained "
                "model would be kept. But this model has other weights. Pass the model "
                "as it was at the end of training. If earlier requests were carried "
                "out by fine-tuning, make an exact rewind (no deletion_policy): it "
                "starts from a saved state, whatever the weights are."
            )

    def plan(
        self,
        forget: NDArray[np.int64],
        forgotten_before: NDArray[np.int64],
        policy: DeletionPolicy | None,
        forgotten_exactly: NDArray[np.int64] = _NO_EXAMPLES,
    ) -> RewindPlan:
        """Return the plan for a set, with what may be claimed afterwards.

        Args:
            forget: The examples to forget, sorted.
            forgotten_before: Examples of earlier requests.
            policy: The deletion policy; None: an exact rewind.
            forgotten_exactly: Those of ``forgotten_before`` that an exact rewind has
                forgotten. They stay so.

        Raises:
            ValueError: As ``start``, or if the policy is not that of the run, or the
                updates that must be made again were made under changing conditions.
        """
        record, gone = self.record, np.union1d(forgotten_before, forget)
        kept, worst, first = math.inf, None, record.first_updates()
        used = forgotten_exactly[first[forgotten_exactly] <= record.num_steps]
        exact = used if policy is not None else _NO_EXAMPLES
        if policy is not None:
            self._require_policy(policy)
        if policy is not None and not len(exact):  # else the model would have them
            kept, worst = self._kept(forget, forgotten_before, policy)
        start = record.num_steps if worst is not None else self.start(gone, policy)
        if len(exact):
            start = min(start, self.start(exact, None))
        _require_same_conditions(record, start)
        left = record.num_steps - start
        expected = left * record.sample_rate * (record.num_examples - len(gone))
        if record.sampling != "poisson":
            again = (record.steps > start) & ~np.isin(record.indices, gone)
            expected = float(np.count_nonzero(again))
        return RewindPlan(
            forget=forget,
            forgotten_before=forgotten_before,
            start=start,
            num_steps=record.num_steps,
            first_update=int(first[gone].min()),
            updates_per_epoch=1 / record.sample_rate,
            num_samples=expected,
            num_bytes=self.states.size(start) if left else 0,
            policy=policy,
            guarantee=worst
            or rewind_claim(
                self.ledger,
                record,
                self.engine_facts.data_set,
                start,
                policy,
                len(exact),
            ),
            exact_start=None if policy is None else self._exact_start(gone),
            num_kept_exact=len(exact),
            kept_epsilon=kept,
            clip_charge=0.0 if policy is None else _clip_charge(record, policy),
        )

    def _exact_start(self, gone: NDArray[np.int64]) -> int | None:
        """Return where an exact rewind would start; None if it has no state for it.

        Args:
            gone: All examples that are forgotten after it.
        """
        try:
            return self.start(gone, None)
        except ValueError:
            return None


def _clip_charge(record: ParticipationRecord, policy: DeletionPolicy) -> float:
    """Return the part of a policy that one update at the clip norm uses at most.

    Args:
        record: The run's participations and settings.
        policy: The deletion policy.
    """
    with np.errstate(divide="ignore"):
        ratios = record.max_grad_norm / record.noise_std / policy.mu
    return float(np.square(ratios).max(initial=0.0))


def _require_same_conditions(record: ParticipationRecord, start: int) -> None:
    """Refuse to repeat updates that were not all made under the same conditions.

    Args:
        record: The run's participations and settings.
        start: Number of updates after which the state to go back to was saved.
    """
    changed = record.first_change(start)
    expect(
        changed is None,
        "checkpoints",
        f"a run whose loop changed something before update {changed}",
        f"must be of a run whose updates after update {start} train the same "
        "parameters, with the same options of the optimizer except learning rates, the "
        "same expected_batch_size and loss_reduction, a state of the optimizer that is "
        "not cleared in between, and the same modules in evaluation mode and rates of "
        "dropout",
        "A rewind does not follow such changes. Retrain from the start without these "
        "examples; to be able to rewind, freeze or thaw layers and change options of "
        "the optimizer in a run of its own, which begins with a new make_private.",
    )


def fresh_generator(
    record: ParticipationRecord, plan: RewindPlan, seed: int
) -> torch.Generator:
    """Return a generator whose seed no training and no other rewind has used.

    With the seed of the training the noise would be that of its first updates, which
    the saved state depends on. The name of the run is random, so its hash is new. Two
    rewinds with the same noise would differ by the examples that only one of them has
    forgotten, without noise. So the hash is also over the examples that are left out.

    Args:
        record: Has the name of the run.
        plan: Where to go back to, and what is left out.
        seed: A seed of the caller's, so that the result can be repeated.
    """
    text = f"{record.run}/{plan.start}/{seed}/{plan.gone.tolist()}".encode()
    number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 2
    return torch.Generator().manual_seed(number)
