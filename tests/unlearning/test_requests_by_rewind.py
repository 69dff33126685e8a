"""Deletion requests that are carried out by going back to saved states."""

import numpy as np
import pytest
import safetensors
import torch

from opacus_pi.accounting.filtered_rewind import DeletionPolicy
from opacus_pi.files.kinds import UNLEARNED_WEIGHTS
from opacus_pi.files.weights_file import write_weights
from opacus_pi.unlearning import FineTune, deletion_statement
from opacus_pi.unlearning import requests as requests_module
from opacus_pi.unlearning.claims import claim
from opacus_pi.unlearning.deletion_log import verify
from opacus_pi.unlearning.honouring_weights import stored_weights
from opacus_pi.unlearning.next_run import next_run
from opacus_pi.unlearning.requests import DeletionRequests
from opacus_pi.unlearning.rivals import SCRUB
from tests.integration.rewinding import SIZE, Saved, weights

POLICY = DeletionPolicy(2.0, 1e-5)


class Killed(BaseException):
    """The process dies here."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("private") / "s", POLICY, noise=2.0)


def requests(path):
    return DeletionRequests(path / "deletions.db", SIZE)


def submitted(path, saved):
    first, second = np.argsort(-saved.states.record.first_updates(), kind="stable")[3:5]
    mine = requests(path)
    mine.submit("a", indices=[int(first)])
    mine.submit("b", indices=[int(second)])
    return mine, [int(first), int(second)]


@pytest.mark.parametrize("policy", [None, POLICY])
def test_each_request_goes_back_for_all_sets_so_far(tmp_path, saved, policy):
    mine, (first, second) = submitted(tmp_path, saved)
    worker = saved.unlearner()
    options = {"checkpoints": saved.states, "deletion_policy": policy}
    both = worker.plan_rewind([first, second], **options)
    results = mine.process(worker, saved.data, **options)
    assert [r.record["requests"] for r in results] == [["a"], ["b"]]
    assert results[1].record["start"] == both.start <= results[0].record["start"]
    assert results[1].record["forgotten_before"] == [first]
    assert results[1].guarantee.kind == "certified if"
    done = [e.payload for e in mine.log.entries() if e.kind == "done"]
    assert [d["run"]["start"] for d in done] == [r.record["start"] for r in results]
    assert all("forget_indices" not in d["run"] for d in done)
    epsilon = 0.0 if policy is None else policy.epsilon
    for entry in done:
        assert entry["epsilon"] <= epsilon and entry["reverse_epsilon"] <= epsilon
        assert entry["delta"] == 1e-5
    verify(mine.log.path)


def test_a_later_process_starts_from_the_states_again(tmp_path, saved):
    mine, (first, second) = submitted(tmp_path, saved)
    mine.process(saved.unlearner(), saved.data, checkpoints=saved.states)
    early = int(np.argmin(saved.states.record.first_updates()))
    mine.submit("c", indices=[early])
    fresh = saved.unlearner()
    (result,) = requests(tmp_path).process(
        fresh, saved.data, checkpoints=str(saved.states.directory)
    )
    assert result.record["start"] == 0
    assert fresh.forgotten.tolist() == sorted([first, second, early])
    assert result.guarantee.epsilon(1e-9) == 0


@pytest.mark.parametrize("name", ["store_weights", "sha256_of"])
def test_each_request_once_if_the_process_dies(tmp_path, saved, monkeypatch, name):
    """Before the weights are stored, or after it and before the log says so."""
    mine, rows = submitted(tmp_path, saved)

    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(requests_module, name, dies)
        mine.process(saved.unlearner(), saved.data, checkpoints=saved.states)
    assert len(requests(tmp_path).pending) == 2
    fresh = saved.unlearner()
    left = requests(tmp_path).process(fresh, saved.data, checkpoints=saved.states)
    assert [r.record["requests"] for r in left] == [["a"], ["b"]]
    assert [r.guarantee.epsilon(1e-5) for r in left] == [0, 0]
    assert requests(tmp_path).pending == []
    assert fresh.forgotten.tolist() == sorted(rows)


def test_what_cannot_be_carried_out_stays_pending_and_nothing_is_written(
    tmp_path, saved
):
    mine, _ = submitted(tmp_path, saved)
    worker = saved.unlearner()
    with pytest.raises(ValueError, match="cannot be changed after"):
        mine.process(
            worker,
            saved.data,
            checkpoints=saved.states,
            deletion_policy=DeletionPolicy(7.0, 1e-5),
        )
    with pytest.raises(ValueError, match="together with deletion_policy"):
        mine.process(worker, saved.data, deletion_policy=POLICY)
    assert len(mine.pending) == 2 and not mine.weights_path.exists()
    assert torch.equal(weights(worker.model), weights(saved.net))


def test_an_entry_that_the_log_would_refuse_changes_no_weights(
    tmp_path, saved, monkeypatch
):
    mine, _ = submitted(tmp_path, saved)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="JSON"):
        patch.setattr(
            requests_module, "run_facts", lambda result: {"run": float("nan")}
        )
        mine.process(saved.unlearner(), saved.data, checkpoints=saved.states)
    assert not mine.weights_path.exists() and len(mine.pending) == 2


def test_a_later_process_by_policy_leaves_exact_requests_exact(tmp_path, saved):
    first = saved.states.record.first_updates()
    exact, other = (int(i) for i in np.argsort(first, kind="stable")[:2])
    mine = requests(tmp_path)
    mine.submit("a", indices=[exact])
    mine.process(saved.unlearner(), saved.data, checkpoints=saved.states)
    assert next_run(mine.log.path, SIZE).forgotten_exactly.tolist() == [exact]
    mine.redact("a")
    mine.submit("b", indices=[other])
    by_policy = {"checkpoints": saved.states, "deletion_policy": POLICY}
    fresh = saved.unlearner()
    (result,) = requests(tmp_path).process(fresh, saved.data, **by_policy)
    assert result.record["start"] < first[exact]
    assert result.record["num_kept_exact"] == 1
    assert fresh.forgotten_exactly.tolist() == [exact]


def test_a_request_for_forgotten_examples_is_free(tmp_path, saved):
    mine, (first, second) = submitted(tmp_path, saved)
    mine.process(saved.unlearner(), saved.data, checkpoints=saved.states)
    mine.submit("again", indices=[first, second])
    fresh = saved.unlearner()
    with pytest.warns(UserWarning, match="nothing is trained again"):
        (result,) = requests(tmp_path).process(
            fresh, saved.data, checkpoints=saved.states
        )
    assert result.record["num_steps"] == 0 and mine.pending == []


def test_weights_of_an_earlier_release_count_as_exact(tmp_path, saved):
    mine, rows = submitted(tmp_path, saved)
    mine.process(saved.unlearner(), saved.data, checkpoints=saved.states)
    with safetensors.safe_open(mine.weights_path, "pt") as file:
        facts = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}
    del facts["forgotten_exactly"]
    old = tmp_path / "old.safetensors"
    facts.pop("checksum", None)
    kept = {k: facts[k] for k in ("honoured_entries", "forgotten", "history")}
    write_weights(old, UNLEARNED_WEIGHTS, state, kept)
    assert sorted(stored_weights(old, SIZE).forgotten_exactly) == sorted(rows)


def forgets(path, saved, name, example, **options):
    """Carry out one request, as a new process does, on the model as it was trained."""
    mine = requests(path)
    mine.submit(name, indices=[example])
    worker = saved.unlearner()
    (result,) = mine.process(worker, saved.data, **options)
    return result, worker


BY_REWIND, BY_TUNING = "rewind", "tuning"


@pytest.mark.parametrize(
    "ways",
    [
        (BY_TUNING, BY_REWIND, BY_TUNING, BY_TUNING, BY_REWIND),
        (BY_REWIND, BY_TUNING, BY_REWIND),
    ],
)
def test_a_log_may_mix_rewinds_and_fine_tuning(tmp_path, saved, ways):
    """Every run takes the model as it was trained, whatever the runs before it were."""
    options = {
        BY_REWIND: {"checkpoints": saved.states},
        BY_TUNING: {"num_epochs": 1},
    }
    for number, way in enumerate(ways):
        result, worker = forgets(tmp_path, saved, number, number, **options[way])
        is_rewind = way == BY_REWIND
        assert worker.history.rewound == is_rewind
        assert (result.guarantee.epsilon(1e-9) == 0) == is_rewind
        if is_rewind:  # of all requests until now
            assert worker.forgotten_exactly.tolist() == list(range(number + 1))
            late = np.array([SIZE - 1])  # a plan, which has no weights, says the same
            next_run = (FineTune(), worker.model, worker.ledger, late, worker.history)
            assert claim(*next_run, has_weights=False).kind == "empirical"
        elif BY_REWIND in ways[:number]:
            assert result.guarantee.kind == "empirical"
            assert "Carry out this request by a rewind" in str(result.guarantee)
            assert "no earlier run changed the weights" not in str(result.guarantee)


def test_a_rewind_after_fine_tuning_a_rewound_model_is_made(tmp_path, saved):
    """The present weights are those of fine-tuning: no rewind has left them."""
    forgets(tmp_path, saved, "a", 0, checkpoints=saved.states)
    forgets(tmp_path, saved, "b", 1, num_epochs=1)
    with pytest.warns(UserWarning, match="the rewind is made again"):
        result, _ = forgets(tmp_path, saved, "c", 1, checkpoints=saved.states)
    assert result.record["num_steps"] > 0


def test_no_policy_keeps_a_model_that_was_fine_tuned(tmp_path):
    wide = DeletionPolicy(1000.0, 1e-5)
    saved = Saved(tmp_path / "states", wide)
    forgets(tmp_path, saved, "a", 0, num_epochs=1)
    options = {"checkpoints": saved.states, "deletion_policy": wide}
    with pytest.raises(ValueError, match="make an exact rewind"):
        forgets(tmp_path, saved, "b", 1, **options)


def test_what_is_said_after_rewinds_and_fine_tuning_is_the_sequence(tmp_path, saved):
    first = np.argsort(saved.states.record.first_updates(), kind="stable")
    a, b, c, d = (int(i) for i in first[:4])
    mine = requests(tmp_path)
    exact = {"checkpoints": saved.states}

    def carried_out(name, example, **options):
        mine.submit(name, indices=[example])
        worker = saved.unlearner()
        (result,) = requests(tmp_path).process(worker, saved.data, **options)
        shown = deletion_statement(result, 1e-5)
        assert type(shown).from_json(shown.to_json()) == shown
        return worker, result.record, shown

    _, record, shown = carried_out("a", a, **exact)
    assert record["earlier_runs"] == [] and record["forgotten_exactly"] == [a]
    assert "earlier_runs" not in shown.facts() and "Earlier runs" not in str(shown)

    _, record, shown = carried_out("b", b, num_epochs=1)
    assert record["earlier_runs"] == [["exact rewind", 1]]
    assert record["forgotten_exactly"] == [a]
    assert shown.num_forgotten == 2 and shown.num_forgotten_exactly == 1
    assert "Earlier runs of this model: exact rewind. 1 of the examples was" in str(
        shown
    )

    _, record, shown = carried_out("c", c, num_epochs=1)
    assert shown.earlier_runs == (("exact rewind", 1), ("FineTune()", 1))

    worker = saved.unlearner()
    mine.resume(worker)
    plan = worker.plan([d])
    assert plan.earlier_runs == (("exact rewind", 1), ("FineTune()", 2))
    said = "Earlier runs of these weights: exact rewind, FineTune() (2 times). 1 of the"
    assert said in str(plan) and plan.num_forgotten_exactly == 1
    assert "they come from a rewind, or from runs after one" in str(plan)

    # A later rewind starts from a saved state: what was run before counts no more.
    worker, record, shown = carried_out("d", d, **exact)
    assert record["earlier_runs"] == [] and "Earlier runs" not in str(shown)
    assert record["forgotten_exactly"] == sorted([a, b, c, d])
    evidence = [x.evidence for x in worker.plan([int(first[9])]).guarantee.assumptions]
    assert "the last run was a rewind, which starts from a saved state" in evidence

    done = [e.payload["run"] for e in mine.log.entries() if e.kind == "done"]
    assert [run["num_forgotten_exactly"] for run in done] == [1, 1, 1, 4]
    assert all("forgotten_exactly" not in run for run in done)


def test_a_run_that_may_have_looked_ends_what_was_exact(tmp_path, saved):
    a, b = (int(i) for i in saved.states.record.first_updates().argsort()[:2])
    worker = saved.unlearner()
    worker.rewind(saved.data, [a], checkpoints=saved.states)
    worker.method = SCRUB()
    result = worker.unlearn(saved.data, [b], num_epochs=1)
    assert result.record["forgotten_exactly"] == []
    assert deletion_statement(result, 1e-5).num_forgotten_exactly == 0


def test_weights_that_were_changed_between_two_runs_have_no_known_sequence(saved):
    a, b = (int(i) for i in saved.states.record.first_updates().argsort()[:2])
    worker = saved.unlearner()
    worker.rewind(saved.data, [a], checkpoints=saved.states)
    with torch.no_grad():
        next(worker.model.parameters()).add_(1.0)
    result = worker.unlearn(saved.data, [b], num_epochs=1)
    assert result.record["earlier_runs"] is None
    assert result.record["forgotten_exactly"] == [] and worker.history.runs is None
    assert "is not known" in str(worker.plan([b]))
