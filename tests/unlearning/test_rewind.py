"""Rewinds by ``Unlearner``: where to, what for, and what is refused."""

import contextlib
import dataclasses
import math
import re
import shutil
import warnings
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from opacus_pi import AccountingError, Unlearner
from opacus_pi.accounting.filtered_rewind import DeletionPolicy, restart_update
from opacus_pi.accounting.training_bound import training_epsilon
from opacus_pi.ledger.custody import Custody, Link
from opacus_pi.recording import Checkpoints
from opacus_pi.unlearning import claims
from tests.integration.rewinding import CRITERION, SIZE, Saved, net, weights

POLICY = DeletionPolicy(2.5, 1e-7)  # a little below the worst case of one example


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """A private training with a state after every update, and its policy."""
    return Saved(tmp_path_factory.mktemp("private") / "s", POLICY, noise=2.0)


def parameters(model):
    """Names and values of the parameters, without gradients."""
    return [(name, p.detach()) for name, p in model.named_parameters()]


def without(data_set, example):
    """The data set with zeros in place of one example."""
    x, y = (t.clone() for t in data_set.tensors)
    x[example] = 0
    return TensorDataset(x, y)


@pytest.mark.parametrize("norm", [False, True])
def test_an_exact_rewind_equals_a_training_that_never_saw_the_example(norm, tmp_path):
    """Without noise, on fixed batches, there is only one such training."""
    options = {"private": False, "noise": 0.0, "poisson": False, "norm": norm}
    saved = Saved(tmp_path / "s", every=2, **options)
    example, first = saved.late(4)
    result = saved.unlearner().rewind(saved.data, [example], checkpoints=saved.states)
    assert result.record["start"] == (first - 1) // 2 * 2
    assert result.record["num_steps"] == 15 - result.record["start"]
    # the reference: the same batches from the first update on, without the example
    torch.manual_seed(0)
    reference = net(norm)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    record = saved.states.record
    for step in range(1, 16):
        batch = torch.tensor([int(i) for i in record.batch(step) if i != example])
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5 ** ((step - 1) // 5)
        optimizer.zero_grad()
        x, y = saved.data[batch]
        CRITERION(reference(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(
        weights(result.model), weights(reference), rtol=0, atol=1e-5
    )


def test_an_exact_rewind_claims_divergence_zero_in_both_directions(private):
    example, first = private.late(4)
    unlearner = private.unlearner()
    plan = unlearner.plan_rewind([example], checkpoints=private.states)
    assert (plan.start, plan.num_steps, plan.first_update) == (first - 1, 15, first)
    guarantee = plan.guarantee
    assert guarantee.kind == "certified if"
    assert guarantee.epsilon(1e-9) == guarantee.reverse_epsilon(1e-9) == 0
    assert max(guarantee.divergences) == max(guarantee.reverse_divergences) == 0
    declared = " ".join(a.statement for a in guarantee.declarations)
    assert "criterion" in declared and "not chosen from the data" in declared
    assert f"update {first}" in plan.text() and "of the training" in str(plan)
    assert plan.num_bytes == private.states.size(first - 1)
    assert 0 < plan.cost == (15 - plan.start) / 15


def test_the_result_does_not_depend_on_what_the_example_was(private):
    """With the same generator, also if the example's values are not there any more."""
    example, _ = private.late(4)
    results = []
    for data_set in (private.data, without(private.data, example)):
        unlearner = private.unlearner(generator=torch.Generator().manual_seed(5))
        unlearner._split = lambda *_: (np.array([example]), None, None)
        result = unlearner.rewind(data_set, [example], checkpoints=private.states)
        results.append(weights(result.model))
    assert torch.equal(*results)
    assert not torch.equal(results[0], weights(private.net))


@pytest.mark.parametrize(
    ("place", "layer", "said"),
    [
        (1, torch.nn.GELU(), r"1: GELU(approximate=none), in the training Tanh()"),
        (2, torch.nn.Dropout(0.1), "2: Dropout(p=0.1), in the training Dropout(p=0.5)"),
        (2, torch.nn.Sequential(), "2: Sequential(), in the training Dropout(p=0.5)"),
    ],
)
def test_a_model_with_the_same_tensors_and_other_modules_is_refused(
    place, layer, said, tmp_path
):
    saved = Saved(tmp_path / "s", POLICY, dropout=True)
    other, example = net(dropout=True), saved.late(2)[0]
    other.load_state_dict(saved.net.state_dict())
    worker = Unlearner(other, criterion=CRITERION, ledger=saved.engine.ledger)
    exact = {"checkpoints": saved.states}
    assert worker.rewind(saved.data, [example], **exact).guarantee.epsilon(1e-5) == 0
    other[place] = layer
    worker = Unlearner(other, criterion=CRITERION, ledger=saved.engine.ledger)
    for run in (worker.plan_rewind, lambda *a, **b: worker.rewind(saved.data, *a, **b)):
        with pytest.raises(ValueError, match=f"modules are not.*{re.escape(said)}"):
            run([example], **exact)


def test_states_that_do_not_list_the_modules_stay_readable(private, monkeypatch):
    load = Checkpoints.load

    def older(states, step):
        return {k: v for k, v in load(states, step).items() if k != "modules"}

    monkeypatch.setattr(Checkpoints, "load", older)
    example, _ = private.late(4)
    result = private.unlearner().rewind(
        private.data, [example], checkpoints=private.states
    )
    declared = [a.statement for a in result.guarantee.declarations]
    assert (
        "the code inside the modules of the model is that of the training" in declared
    )


def test_weights_that_a_rewind_does_not_use_are_said(private):
    example, _ = private.late(4)
    other = net()
    worker = Unlearner(other, criterion=CRITERION, ledger=private.engine.ledger)
    with pytest.warns(UserWarning, match="They are not used: the rewind starts from"):
        worker.rewind(private.data, [example], checkpoints=private.states)
    with warnings.catch_warnings():  # the trained model, then what the rewind left
        warnings.filterwarnings("error", "The weights of this model")
        worker = private.unlearner()
        for one in (example, (example + 1) % SIZE):
            with contextlib.suppress(ValueError):  # no state before its first use
                worker.rewind(private.data, [one], checkpoints=private.states)


def test_two_rewinds_draw_different_noise(private):
    example, _ = private.late(4)
    unlearner = private.unlearner()
    other = private.unlearner()
    one, two = (
        each.rewind(private.data, [example], checkpoints=private.states).model
        for each in (unlearner, other)
    )
    assert not torch.equal(weights(one), weights(two))


def test_requests_that_are_carried_out_with_one_seed_do_not_share_noise(tmp_path):
    """Else two models would differ by an example, and by no noise."""
    saved = Saved(tmp_path / "s", noise=5.0, every=15)
    start = saved.states.load(0)["model"]
    moves = []
    for example in (0, 0, 1):
        generator = torch.Generator().manual_seed(3)
        model = (
            saved.unlearner(generator=generator)
            .rewind(saved.data, [example], checkpoints=saved.states)
            .model
        )
        moves.append(
            torch.cat([(p - start[n]).flatten() for n, p in parameters(model)])
        )
    assert torch.equal(moves[0], moves[1])
    assert abs(float(torch.corrcoef(torch.stack(moves[1:]))[0, 1])) < 0.5


def test_the_seed_of_the_training_does_not_give_its_noise_again(tmp_path):
    """The same seed everywhere, and from the first state: the noise is another."""
    saved = Saved(tmp_path / "s", seed=0, noise=5.0)
    generator = torch.Generator().manual_seed(0)
    first = saved.states.record.first_updates()
    example = int(np.flatnonzero(first == 1)[0])
    result = saved.unlearner(generator=generator).rewind(
        saved.data, [example], checkpoints=saved.states
    )
    start = saved.states.load(0)["model"]

    def move(model):
        return torch.cat([(p - start[n]).flatten() for n, p in parameters(model)])

    moves = torch.stack([move(result.model), move(saved.net)])
    assert abs(float(torch.corrcoef(moves)[0, 1])) < 0.5


def by_budget(private, wanted):
    """An example whose deletion is free, or is not; and where the rule goes back to."""
    record, states = private.states.record, private.states.steps
    starts = [restart_update(record, [i], POLICY.mu, states) for i in range(SIZE)]
    drawn = record.first_updates() <= 15
    for i in np.flatnonzero(drawn):
        if (starts[i] == 15) == (wanted == "free"):
            return int(i), starts[i]
    pytest.fail("the training must have both kinds")


def test_a_free_deletion_keeps_the_trained_model(private):
    example, _ = by_budget(private, "free")
    unlearner = private.unlearner()
    options = {"checkpoints": private.states, "deletion_policy": POLICY}
    plan = unlearner.plan_rewind([example], **options)
    assert plan.is_free and plan.cost == 0 and "nothing is trained again" in plan.text()
    result = unlearner.rewind(private.data, [example], **options)
    assert torch.equal(weights(result.model), weights(private.net))
    guarantee = result.guarantee
    assert guarantee.kind == "certified if"
    assert guarantee.epsilon(1e-7) == guarantee.reverse_epsilon(1e-7) == 2.5
    assert guarantee.epsilon(1e-8) > 2.5
    for order, value in zip(guarantee.orders, guarantee.divergences, strict=True):
        assert value == pytest.approx(order * POLICY.mu**2 / 2, rel=1e-12)
        assert value >= order * POLICY.mu**2 / 2
    assert guarantee.divergences == guarantee.reverse_divergences


def test_a_deletion_that_is_not_free_goes_back_to_where_the_rule_says(private):
    example, start = by_budget(private, "not free")
    result = private.unlearner().rewind(
        private.data,
        [example],
        checkpoints=str(private.states.directory),
        deletion_policy=POLICY,
        evaluate=lambda model: {"norm": float(weights(model).norm())},
    )
    assert result.record["start"] == start < 15
    assert result.record["policy"]["epsilon"] == 2.5
    assert len(result.trace.metrics["norm"]) == 2
    assert not torch.equal(weights(result.model), weights(private.net))


def test_a_plan_that_keeps_no_worst_case_computes_no_estimate(private, monkeypatch):
    """The estimate takes most of the time of a claim, and only a kept one shows it."""

    def refused(*arguments):
        pytest.fail("an estimate was computed that nothing shows")

    monkeypatch.setattr(claims, "_losses", refused)
    example, start = by_budget(private, "not free")
    options = {"checkpoints": private.states, "deletion_policy": POLICY}
    assert private.unlearner().plan_rewind([example], **options).start == start


def test_a_policy_above_the_worst_case_makes_every_deletion_free(tmp_path):
    """However often it was clipped; a set counts with the bound of its size."""
    policy = DeletionPolicy(3.0, 1e-5)
    saved = Saved(tmp_path / "s", policy, every=5, noise=3.0)
    record, unlearner = saved.states.record, saved.unlearner()
    worst = [
        training_epsilon((saved.engine.ledger,), size, policy.delta)
        for size in (1, 2, 3)
    ]
    assert worst[1] < policy.epsilon < worst[2]
    starts = [restart_update(record, [i], policy.mu, [0, 5, 10]) for i in range(SIZE)]
    one, two, three = np.argsort(starts, kind="stable")[:3].tolist()
    assert starts[three] < 15  # by its charges alone none of them would be free
    options = {"checkpoints": saved.states, "deletion_policy": policy}
    plan = unlearner.plan_rewind([one], **options)
    assert plan.is_free and plan.guarantee.kind == "certified if"
    assert any(map(math.isfinite, plan.guarantee.estimates))
    found = plan.guarantee.epsilon(policy.delta)
    assert found == min(worst[0], saved.engine.get_epsilon(policy.delta))
    assert plan.guarantee.reverse_epsilon(policy.delta) <= policy.epsilon
    unlearner.rewind(saved.data, [one], **options)
    later = unlearner.plan_rewind([two], **options)
    assert later.is_free
    assert later.guarantee.epsilon(policy.delta) == pytest.approx(worst[1], rel=1e-9)
    unlearner.rewind(saved.data, [two], **options)
    assert unlearner.plan_rewind([three], **options).start < 15


def test_a_plan_says_what_a_rewind_would_cost(private):
    example, start = by_budget(private, "not free")
    unlearner = private.unlearner()
    options = {"checkpoints": private.states, "deletion_policy": POLICY}
    plan = unlearner.plan([example], **options)
    assert plan.rewind is not None and plan.rewind.start == start
    assert plan.rewind.cost_text in plan.text() and "after update" in plan.text()
    exact = unlearner.plan([example], checkpoints=private.states).rewind
    assert exact is not None and exact.policy is None
    assert unlearner.plan([example]).rewind is None
    with pytest.raises(ValueError, match="together with deletion_policy"):
        unlearner.plan([example], deletion_policy=POLICY)


def test_an_update_that_fails_leaves_the_unlearner_as_it_was(private):
    example, _ = private.late(4)
    unlearner = private.unlearner()

    def fails(model, optimizer, batch):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        unlearner.rewind(
            private.data, [example], checkpoints=private.states, update=fails
        )
    assert torch.equal(weights(unlearner.model), weights(private.net))
    assert not len(unlearner.forgotten)


def test_a_later_request_joins_the_earlier_set(private):
    free, _ = by_budget(private, "free")
    other, start = by_budget(private, "not free")
    unlearner = private.unlearner()
    options = {"checkpoints": private.states, "deletion_policy": POLICY}
    unlearner.rewind(private.data, [free], **options)
    plan = unlearner.plan_rewind([other], **options)
    both = restart_update(
        private.states.record, [free, other], POLICY.mu, private.states.steps
    )
    assert plan.start == both <= start
    assert plan.gone.tolist() == sorted([free, other])
    result = unlearner.rewind(private.data, [other], **options)
    assert result.record["forgotten_before"] == [free]
    assert unlearner.forgotten.tolist() == sorted([free, other])
    # and a third one starts from the states of the training again, not from the result
    third = int(np.setdiff1d(np.arange(SIZE), [free, other])[0])
    assert unlearner.plan_rewind([third], **options).start <= both


def test_nothing_is_trained_again_for_examples_that_were_never_drawn(tmp_path):
    saved = Saved(tmp_path / "s", train=False)
    saved.train(1)
    never = np.flatnonzero(saved.states.record.first_updates() > 5)
    plan = saved.unlearner().plan_rewind(never[:1], checkpoints=saved.states)
    assert plan.is_free and "None of them was ever drawn" in plan.text()
    assert plan.guarantee.epsilon(1e-9) == 0


def refused(saved, match, *, error=ValueError, forget=(0,), **options):
    options = {"checkpoints": saved.states, **options}
    unlearner = saved.unlearner()
    before = weights(unlearner.model)
    with pytest.raises(error, match=match):
        unlearner.rewind(saved.data, list(forget), **options)
    assert torch.equal(weights(unlearner.model), before)
    assert not len(unlearner.forgotten)


def test_a_policy_that_was_made_after_training_is_refused(tmp_path, private):
    saved = Saved(tmp_path / "s", every=5)
    refused(saved, "fixed before training", deletion_policy=POLICY)
    other = DeletionPolicy(7.0, 1e-5)
    refused(private, "cannot be changed after", deletion_policy=other)


def test_no_ledger_and_states_of_other_runs_are_refused(tmp_path, private):
    bare = Unlearner(private.net, criterion=CRITERION)
    with pytest.raises(ValueError, match="must be the ledger of the run"):
        bare.rewind(private.data, [0], checkpoints=private.states)
    other = Saved(tmp_path / "other", every=5, seed=9)
    refused(private, "of the ledger's run", checkpoints=other.states)
    with pytest.raises(FileNotFoundError, match="Recorder\\(checkpoints"):
        private.unlearner().rewind(private.data, [0], checkpoints=tmp_path / "none")
    refused(private, "must be the Checkpoints", checkpoints=None)


def test_a_directory_that_lacks_the_last_updates_is_refused(tmp_path):
    saved = Saved(tmp_path / "s", every=7)  # the last update has no state
    other = Checkpoints(tmp_path / "s")
    refused(saved, "flush", checkpoints=other)
    saved.states.flush()
    example, _ = saved.late(8)
    saved.unlearner().rewind(saved.data, [example], checkpoints=other)


def test_broken_custody_is_refused(private):
    unlearner = private.unlearner()
    broken = Custody((Link("draw", "broken", "A batch was used twice."),))
    unlearner.ledger = unlearner.ledger.__class__(
        **{
            **{n: getattr(unlearner.ledger, n) for n in ("mechanism", "steps")},
            "grad_norms": unlearner.ledger.grad_norms,
            "source": unlearner.ledger.source,
            "data_set": unlearner.ledger.data_set,
            "custody": broken,
        }
    )
    with pytest.raises(AccountingError, match="used twice"):
        unlearner.rewind(private.data, [0], checkpoints=private.states)


def test_missing_states_are_refused_where_they_matter(tmp_path, private):
    folder = tmp_path / "copy"
    shutil.copytree(private.states.directory, folder)
    (folder / "state-00000000.pt").unlink()
    states = Checkpoints(folder)
    early = int(np.flatnonzero(private.states.record.first_updates() == 1)[0])
    refused(private, "no state was saved before it", forget=[early], checkpoints=states)
    refused(
        private,
        "must have all states",
        forget=[early],
        checkpoints=states,
        deletion_policy=POLICY,
    )


def test_a_block_of_participations_that_is_missing_is_refused(tmp_path, private):
    folder = tmp_path / "copy"
    shutil.copytree(private.states.directory, folder)
    sorted(folder.glob("participations-*"))[3].unlink()
    refused(private, "must cover all updates", checkpoints=folder)


@pytest.mark.parametrize("kept", ["all", "only early"])
def test_the_last_block_of_participations_that_is_missing_is_named(
    tmp_path, private, kept
):
    folder = tmp_path / "copy"
    shutil.copytree(private.states.directory, folder)
    sorted(folder.glob("participations-*"))[-1].unlink()
    end = Checkpoints(folder).record.num_steps
    for state in folder.glob("state-*") if kept == "only early" else ():
        if int(state.stem.removeprefix("state-")) > end:
            state.unlink()
    reason = "has a state of update" if kept == "all" else "and the ledger has"
    with pytest.raises(ValueError, match=f"{reason}.* missing.*estore") as caught:
        private.unlearner().rewind(private.data, [0], checkpoints=folder)
    assert f"end after update {end}" in str(caught.value)
    assert "must be those" not in str(caught.value)


def test_all_blocks_of_participations_that_are_missing_are_named(tmp_path, private):
    folder = tmp_path / "copy"
    shutil.copytree(private.states.directory, folder)
    for block in folder.glob("participations-*"):
        block.unlink()
    refused(private, "states of a training, and no participations", checkpoints=folder)


def test_a_filtered_rewind_of_training_without_clipping_is_refused(tmp_path):
    saved = Saved(tmp_path / "s", POLICY, private=False, noise=0.1)
    refused(saved, "exact rewind", deletion_policy=POLICY)
    normed = Saved(tmp_path / "n", POLICY, private=False, noise=0.1, norm=True)
    refused(normed, "no BatchNorm", deletion_policy=POLICY)


@pytest.mark.parametrize("epsilon", [0.1, 1000.0])
def test_a_policy_for_adaptive_clipping_is_refused(tmp_path, epsilon):
    """It also releases how many gradients were clipped, which is not charged.

    No policy is so large that the worst case is within it: there is none.
    """
    policy = DeletionPolicy(epsilon, 1e-5)
    saved = Saved(tmp_path / "s", policy, noise=3.0, clipping="adaptive", train=False)
    saved.train(1)
    refused(saved, "flat clipping", deletion_policy=policy)
    claim = saved.unlearner().plan([3]).guarantee
    assert claim.kind == "empirical" and claim.epsilon(1e-5) == math.inf
    (noise,) = (a for a in claim.unmet if "added noise" in a.statement)
    assert "the clip norm was adapted to the data" in noise.evidence


def test_a_model_that_was_changed_is_not_kept(private):
    example, _ = by_budget(private, "free")
    unlearner = private.unlearner()
    torch.nn.init.zeros_(unlearner.model[0].weight)
    with pytest.raises(ValueError, match="at the end of training"):
        unlearner.rewind(
            private.data,
            [example],
            checkpoints=private.states,
            deletion_policy=POLICY,
        )


def test_forgetting_everything_is_refused(private):
    refused(private, "must leave at least one", forget=range(SIZE))
    with pytest.raises(ValueError, match="must leave at least one"):
        private.unlearner().plan_rewind(range(SIZE), checkpoints=private.states)


class ChangedInBetween(Saved):
    """A training whose loop changes something after its first epoch."""

    def __init__(self, folder, change, **options):
        self.change = change
        super().__init__(folder, **options)

    def train(self, epochs=3):
        super().train(1)
        self.num_before = self.states.record.num_steps
        self.change(self)
        super().train(epochs - 1)


def freeze(run):
    run.optimizer.zero_grad()
    run.net[0].requires_grad_(False)


def less_momentum(run):
    run.plain.param_groups[0]["momentum"] = 0.1


def without_dropout(run):
    run.net[2].eval()


def less_dropout(run):
    run.net[2].p = 0.1


def without_momentum_so_far(run):
    run.plain.state.clear()


def new_state(run):
    run.plain.state = defaultdict(dict)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        freeze,
        less_momentum,
        without_dropout,
        less_dropout,
        without_momentum_so_far,
        new_state,
    ],
)
def test_a_change_between_updates_is_not_repeated(tmp_path, change, private):
    options = {"private": private, "dropout": True, "poisson": False}
    run = ChangedInBetween(tmp_path, change, **options)
    first = run.states.record.first_updates()
    early = int(first.argmin())
    before = run.num_before + 1
    with pytest.raises(ValueError, match=f"changed something before update {before}"):
        run.unlearner().rewind(run.data, [early], checkpoints=run.states)
    assert run.states.record.first_change(run.num_before) == before
    assert run.states.record.first_change(before) is None


def test_layers_that_are_frozen_stay_frozen_in_a_rewind(tmp_path):
    run = Saved(tmp_path, train=False)
    run.net[0].requires_grad_(False)
    run.train()
    frozen = run.net[0].weight.clone()
    example, _ = run.late()
    unlearner = run.unlearner()
    result = unlearner.rewind(run.data, [example], checkpoints=run.states)
    assert torch.equal(result.model[0].weight, frozen)
    assert not torch.equal(result.model[-1].weight, run.net[-1].weight)


def test_states_of_an_earlier_release_say_nothing_of_changes(tmp_path):
    run = Saved(tmp_path)
    record = dataclasses.replace(run.states.record, conditions=None)
    assert record.first_change(0) is None


def other_denominator(run):
    run.optimizer.expected_batch_size = 4


def summed_instead(run):
    run.optimizer.loss_reduction = "sum"


@pytest.mark.parametrize("change", [other_denominator, summed_instead])
def test_a_change_of_what_opacus_divides_by_is_not_repeated(tmp_path, change):
    run = ChangedInBetween(tmp_path, change, poisson=False)
    early = int(run.states.record.first_updates().argmin())
    with pytest.raises(
        ValueError, match=f"changed something before update {run.num_before + 1}"
    ):
        run.unlearner().rewind(run.data, [early], checkpoints=run.states)


def state_loaded_again(run):
    run.optimizer.load_state_dict(run.optimizer.state_dict())


def nothing(run):
    pass


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.ASGD, None])
@pytest.mark.parametrize("change", [state_loaded_again, nothing])
def test_loading_the_same_state_is_no_change(tmp_path, change, make, private):
    options = {"private": private, "poisson": False, "make_optimizer": make}
    run = ChangedInBetween(tmp_path, change, **options)
    early = int(run.states.record.first_updates().argmin())
    result = run.unlearner().rewind(run.data, [early], checkpoints=run.states)
    assert result.record["num_steps"] == run.states.record.num_steps


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("is_before", [True, False])
def test_a_training_with_hooks_on_its_steps_needs_their_update(
    tmp_path, private, is_before
):
    run = Saved(tmp_path, train=False, poisson=False, private=private)
    name = "register_step_pre_hook" if is_before else "register_step_post_hook"
    getattr(run.plain, name)(lambda *_: None)
    run.train()
    early = int(run.states.record.first_updates().argmin())

    def update(model, optimizer, batch):
        x, y = batch
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        optimizer.step()

    with pytest.raises(ValueError, match="Hooks were on the steps of the optimizer"):
        run.unlearner().rewind(run.data, [early], checkpoints=run.states)
    result = run.unlearner().rewind(
        run.data, [early], checkpoints=run.states, update=update
    )
    assert result.guarantee.epsilon(1e-5) == 0.0


# ------------------------------------------- several requests, exact and by policy
def exact_then_by_policy(saved):
    """Two examples: an exact rewind for one starts before the policy's of both."""
    first = saved.states.record.first_updates()
    states = saved.states.steps
    for a in np.argsort(first):
        for b in range(SIZE):
            both = restart_update(saved.states.record, [a, b], POLICY.mu, states)
            if a != b and first[a] - 1 < both:
                return int(a), int(b), int(first[a]) - 1
    raise AssertionError("no such pair")


def test_a_request_by_policy_leaves_an_exact_one_exact(private):
    a, b, before_a = exact_then_by_policy(private)
    by_policy = {"checkpoints": private.states, "deletion_policy": POLICY}
    unlearner = private.unlearner()
    unlearner.rewind(private.data, [a], checkpoints=private.states)
    assert unlearner.forgotten_exactly.tolist() == [a]
    plan = unlearner.plan_rewind([b], **by_policy)
    assert plan.start <= before_a and plan.num_kept_exact == 1
    assert "), which stay exactly forgotten" in plan.text()
    assert plan.guarantee.epsilon(POLICY.delta) == POLICY.epsilon
    kept = [x for x in plan.guarantee.assumptions if "stay exactly" in x.statement]
    assert len(kept) == 1 and kept[0].met
    result = unlearner.rewind(private.data, [b], **by_policy)
    assert result.record["start"] == plan.start
    third = int(np.setdiff1d(np.arange(SIZE), [a, b])[0])
    assert unlearner.plan_rewind([third], **by_policy).start <= before_a


def test_an_example_that_was_never_drawn_limits_no_later_rewind(tmp_path):
    policy = POLICY
    saved = Saved(tmp_path / "s", policy, noise=2.0, train=False)
    saved.train(1)
    first = saved.states.record.first_updates()
    never, drawn = np.flatnonzero(first > 5)[0], np.flatnonzero(first <= 5)[0]
    unlearner = saved.unlearner()
    options = {"checkpoints": saved.states, "deletion_policy": policy}
    wanted = unlearner.plan_rewind([never, drawn], **options).start
    unlearner.rewind(saved.data, [never], checkpoints=saved.states)
    plan = unlearner.plan_rewind([drawn], **options)
    assert (plan.start, plan.num_kept_exact) == (wanted, 0)


def test_the_worst_case_of_the_policy_does_not_bring_an_exact_one_back(tmp_path):
    policy = DeletionPolicy(1000.0, 1e-5)
    saved = Saved(tmp_path / "s", policy)
    example, first = saved.late(4)
    other = (example + 1) % SIZE
    options = {"checkpoints": saved.states, "deletion_policy": policy}
    unlearner = saved.unlearner()
    assert unlearner.plan_rewind([other], **options).is_free
    unlearner.rewind(saved.data, [example], checkpoints=saved.states)
    assert unlearner.plan_rewind([other], **options).start <= first - 1


def test_a_plan_by_policy_says_if_an_exact_rewind_costs_no_more(private):
    words, costs_no_more = "does not need more updates and has ε = 0", []
    for example in range(SIZE):
        plan = private.unlearner().plan_rewind(
            [example], checkpoints=private.states, deletion_policy=POLICY
        )
        exact = private.unlearner().plan_rewind([example], checkpoints=private.states)
        costs_no_more.append(exact.start >= plan.start)
        assert (words in plan.text()) == costs_no_more[-1]
        assert words not in exact.text()
    assert not all(costs_no_more)


NO_MORE = "An exact rewind (without the deletion policy) does not need more updates"


@pytest.mark.parametrize(
    ("numbers", "said", "not_said"),
    [
        # the policy has ε = 2; the training made 15 updates
        (
            {"start": 9, "exact_start": 4, "kept_epsilon": 8.0},
            "An exact rewind makes 11 updates again and has ε = 0. Without any rewind "
            "ε is at most 8; this one lowers the bound to 2, by 75 %.",
            "hardly helps",
        ),
        (
            {"start": 9, "exact_start": 4, "kept_epsilon": 2.1},
            "ε is at most 2.1; this one lowers the bound to 2, by 4.8 %, so it hardly "
            "helps.",
            NO_MORE,
        ),
        (
            {"start": 9, "exact_start": 4, "kept_epsilon": math.inf},
            "11 updates again",
            "Without any rewind",
        ),
        (
            {"start": 9, "exact_start": 9, "kept_epsilon": 8.0, "clip_charge": 1.5},
            f"{NO_MORE} and has ε = 0. The noise is too small for this policy",
            "Without any rewind",
        ),
        (
            {"start": 9, "exact_start": 9, "clip_charge": 0.5},
            f"{NO_MORE} and has ε = 0.",
            "too small",
        ),
        (
            {"start": 15, "exact_start": 4, "kept_epsilon": 2.1, "clip_charge": 1.5},
            "nothing is trained again",
            "ε",
        ),
        (
            {"start": 9, "policy": None, "kept_epsilon": 2.1, "clip_charge": 1.5},
            "of the training, about",
            "ε",
        ),
    ],
)
def test_a_plan_by_policy_says_what_the_policy_is_worth(
    private, numbers, said, not_said
):
    plan = private.unlearner().plan_rewind(
        [3], checkpoints=private.states, deletion_policy=POLICY
    )
    numbers = {"policy": DeletionPolicy(2.0, 1e-5), **numbers}
    text = dataclasses.replace(plan, **numbers).cost_text
    assert said in text and not_said not in text


def test_a_plan_has_the_bound_without_a_rewind_and_the_charge_of_an_update(private):
    options = {"checkpoints": private.states, "deletion_policy": POLICY}
    plan = private.unlearner().plan_rewind([3], **options)
    guarantee = private.unlearner().plan([3], delta=POLICY.delta).guarantee
    delta = POLICY.delta
    kept = max(guarantee.epsilon(delta), guarantee.reverse_epsilon(delta))
    assert plan.kept_epsilon == pytest.approx(kept)
    record = private.states.record
    charge = (record.max_grad_norm[0] / record.noise_std[0] / POLICY.mu) ** 2
    assert plan.clip_charge == pytest.approx(charge)
    exact = private.unlearner().plan_rewind([3], checkpoints=private.states)
    assert (exact.kept_epsilon, exact.clip_charge) == (math.inf, 0)


def test_a_plan_counts_what_was_observed_and_lists_what_is_declared(private):
    plan = private.unlearner().plan_rewind([3], checkpoints=private.states)
    others = [a for a in plan.guarantee.assumptions if a.met and not a.is_declared]
    text = plan.text()
    assert f"observed or derived: {len(others)} more, all of them met" in text
    assert all(str(a) in text for a in plan.guarantee.declarations)
    assert not any(str(a) in text for a in others)
    assert all(str(a) in plan.guarantee.text() for a in others)


def test_a_plan_does_not_offer_the_exact_rewind_that_it_describes(private):
    guarantee = private.unlearner().plan(list(range(9))).guarantee
    assert guarantee.is_too_large(1e-5)
    plan = private.unlearner().plan(list(range(9)), checkpoints=private.states)
    assert "An exact rewind has ε = 0" not in plan.text()


def test_a_plan_with_states_does_not_ask_for_them(private):
    options = {"checkpoints": private.states, "deletion_policy": POLICY}
    plan = private.unlearner().plan([3], **options)
    assert "if the training saved states" not in plan.text()


@pytest.mark.parametrize("policy", [None, POLICY])
def test_what_was_forgotten_before_is_not_trained_again(private, policy):
    example, _ = private.late(4)
    options = {"checkpoints": private.states, "deletion_policy": policy}
    unlearner = private.unlearner()
    done = unlearner.rewind(private.data, [example], **options)
    with pytest.warns(UserWarning, match="nothing is trained again"):
        again = unlearner.rewind(private.data, [example], **options)
    assert torch.equal(weights(again.model), weights(done.model))
    assert again.record["num_steps"] == 0 and again.record["start"] is None
    assert again.guarantee.epsilon(1e-5) == done.guarantee.epsilon(1e-5)
    with torch.no_grad():
        next(unlearner.model.parameters()).add_(1.0)
    if not done.record["num_steps"]:
        # the trained model would be kept, which this one is not any more
        with pytest.raises(ValueError, match="would be kept.*has other weights") as one:
            unlearner.plan_rewind([example], **options)
        with pytest.raises(ValueError) as two, pytest.warns(UserWarning, match="again"):
            unlearner.rewind(private.data, [example], **options)
        assert str(one.value) == str(two.value)
        return
    assert not unlearner.plan_rewind([example], **options).is_free
    with pytest.warns(UserWarning, match="the rewind is made again"):
        again = unlearner.rewind(private.data, [example], **options)
    assert again.record["num_steps"] == done.record["num_steps"]


def test_a_plan_that_keeps_the_trained_model_refuses_another(private):
    """Only then: any other rewind starts from a saved state, whatever the weights."""
    free, _ = by_budget(private, "free")
    options = {"checkpoints": private.states, "deletion_policy": POLICY}
    other = private.unlearner()
    assert other.plan_rewind([free], **options).is_free
    with torch.no_grad():
        next(other.model.parameters()).add_(1.0)
    for plan in (other.plan_rewind, other.plan):
        with pytest.raises(ValueError, match="Pass the model as it was at the end of"):
            plan([free], **options)
    assert not other.plan_rewind([free], checkpoints=private.states).is_free


def test_a_plan_for_what_was_forgotten_keeps_the_rewound_model(private):
    example, _ = by_budget(private, "not free")
    options = {"checkpoints": private.states, "deletion_policy": POLICY}
    unlearner = private.unlearner()
    unlearner.rewind(private.data, [example], **options)
    unlearner.plan_rewind([example], **options)


def test_an_exact_rewind_after_one_by_policy_is_made(private):
    example, _ = by_budget(private, "not free")
    unlearner = private.unlearner()
    unlearner.rewind(
        private.data, [example], checkpoints=private.states, deletion_policy=POLICY
    )
    with pytest.warns(UserWarning, match="the rewind is made again"):
        result = unlearner.rewind(private.data, [example], checkpoints=private.states)
    assert result.record["num_steps"] > 0 and result.guarantee.epsilon(1e-9) == 0


def test_what_is_declared_of_the_loss_depends_on_what_was_checked(private):
    unlearner = private.unlearner()

    def declared(state):
        links = (Link("loss", state, "As seen."),)
        ledger = dataclasses.replace(unlearner.ledger, custody=Custody(links))
        other = private.unlearner()
        other.ledger = ledger
        plan = other.plan_rewind([0], checkpoints=private.states)
        return str(plan)

    assert "the engine does not see the training loop" in declared("unchecked")
    assert "does not see the training loop" not in declared("checked")
    assert "was checked, but the ledger does not name" in declared("checked")


def test_a_model_of_another_shape_is_refused_in_one_line(private):
    unlearner = private.unlearner()
    torch.manual_seed(0)
    unlearner.model = torch.nn.Sequential(
        torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)
    )
    with pytest.raises(ValueError) as caught:
        unlearner.rewind(private.data, [0], checkpoints=private.states)
    assert "differ, such as 0.weight ((9, 5), saved (8, 5))" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unlearning_from_a_model_that_no_run_left_is_said(private):
    unlearner = private.unlearner()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unlearner.unlearn(private.data, [0], num_epochs=1)
    other = private.unlearner()
    other.model = net()
    with pytest.warns(UserWarning, match="No recorded run left the weights of this"):
        other.unlearn(private.data, [0], num_epochs=1)
