"""Requests are carried out once each, whenever the process dies."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from opacus_pi.accounting import GradNormLedger, NoisySGD
from opacus_pi.files.kinds import UNLEARNED_WEIGHTS
from opacus_pi.files.weights_file import read_weights, write_weights
from opacus_pi.unlearning import FineTune, Unlearner
from opacus_pi.unlearning.deletion_record import verify
from opacus_pi.unlearning.requests import DeletionRequest, DeletionRequests
from opacus_pi.unlearning.rivals import NegGradPlus
from opacus_pi.unlearning.stopping import StopWhen

SIZE = 20
_PLAIN = FineTune()


def data():
    torch.manual_seed(1)
    return TensorDataset(torch.randn(SIZE, 4), torch.arange(SIZE) % 2)


def unlearner():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    return Unlearner(
        model,
        criterion=nn.CrossEntropyLoss(),
        generator=torch.Generator().manual_seed(2),
    )


def requests(path, **options):
    return DeletionRequests(path / "deletions.jsonl", SIZE, **options)


def submitted(path):
    mine = requests(path, rows_of={"ann": [9, 8], "bob": [3]})
    mine.submit("a", indices=[5, 2])
    mine.submit("b", user="ann")
    mine.submit("c", user="bob")
    return mine


def test_submitting_is_durable_and_idempotent(tmp_path):
    mine = submitted(tmp_path)
    assert mine.submit("a", indices=[2, 5]) == DeletionRequest("a", (2, 5))
    again = requests(tmp_path)
    assert again.pending == [
        DeletionRequest("a", (2, 5)),
        DeletionRequest("b", (8, 9)),
        DeletionRequest("c", (3,)),
    ]
    assert len(again.record.entries()) == 3


def test_one_by_one(tmp_path):
    mine, worker = submitted(tmp_path), unlearner()
    results = mine.process(worker, data(), num_epochs=1)
    assert [r.record["forget_indices"] for r in results] == [[2, 5], [8, 9], [3]]
    assert mine.pending == []
    np.testing.assert_array_equal(worker.forgotten, [2, 3, 5, 8, 9])
    kinds = [e["kind"] for e in mine.record.entries()]
    assert kinds == ["request"] * 3 + ["done"] * 3
    assert mine.process(worker, data(), num_epochs=1) == []
    verify(mine.record.path)


def test_together(tmp_path):
    results = submitted(tmp_path).process(
        unlearner(), data(), together=True, num_epochs=1
    )
    assert [r.record["forget_indices"] for r in results] == [[2, 3, 5, 8, 9]]
    assert requests(tmp_path).pending == []


def test_later_requests_continue_from_the_stored_weights(tmp_path):
    mine, first = submitted(tmp_path), unlearner()
    mine.process(first, data(), num_epochs=1)
    mine.submit("d", indices=[0])
    fresh = unlearner()
    (result,) = requests(tmp_path).process(fresh, data(), num_epochs=0)
    np.testing.assert_array_equal(fresh.forgotten, [0, 2, 3, 5, 8, 9])
    assert result.record["forgotten_before"] == [2, 3, 5, 8, 9]
    for a, b in zip(
        fresh.model.state_dict().values(),
        first.model.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_resumed_unlearner_plans_for_what_is_left(tmp_path):
    mine, first = submitted(tmp_path), unlearner()
    mine.process(first, data(), num_epochs=1)
    fresh = unlearner()
    requests(tmp_path).resume(fresh)
    np.testing.assert_array_equal(fresh.forgotten, [2, 3, 5, 8, 9])
    mechanism = NoisySGD(10, sample_rate=0.2, noise_std=1.0, max_grad_norm=1.0)
    fresh.ledger = GradNormLedger(mechanism, [10], [np.linspace(0.1, 0.5, SIZE)])
    plan = fresh.plan([3, 0])
    assert plan.num_retain == SIZE - 6 and plan.forgotten_again.tolist() == [3]
    for a, b in zip(
        fresh.model.state_dict().values(),
        first.model.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_resuming_what_never_began_changes_nothing(tmp_path):
    fresh = unlearner()
    submitted(tmp_path).resume(fresh)
    assert fresh.forgotten.size == 0


def claimed(path):
    """The kind of guarantee in a new process, and what is unmet."""
    fresh = noisy_unlearner()
    requests(path).resume(fresh)
    guarantee = fresh.plan([3]).guarantee
    return guarantee.kind, {a.statement: a.evidence for a in guarantee.unmet}


def noisy_unlearner(method=_PLAIN):
    """Of a run with noise, of which a guarantee can be an estimate."""
    torch.manual_seed(0)
    mechanism = NoisySGD(10, sample_rate=0.2, noise_std=1.0, max_grad_norm=1.0)
    return Unlearner(
        nn.Linear(4, 2),
        criterion=nn.CrossEntropyLoss(),
        method=method,
        ledger=GradNormLedger(mechanism, [10], [np.linspace(0.1, 0.5, SIZE)]),
    )


LOOKS = "unlearning never looks at the forget set"
ENDS = "the number of updates does not depend on the forget set"


@pytest.mark.parametrize(
    ("method", "stop", "broken"),
    [
        (FineTune(), None, {}),
        (NegGradPlus(), None, {LOOKS: "NegGradPlus uses it"}),
        (FineTune(), StopWhen("score", 1.0), {ENDS: "ended by 'score'"}),
    ],
    ids=["plain", "looked", "stopped"],
)
def test_earlier_runs_cost_the_claim_in_a_new_process_too(
    tmp_path, method, stop, broken
):
    mine = requests(tmp_path)
    mine.submit("a", indices=[3])
    options = {"stop": stop, "evaluate": lambda model: {"score": 0.0}}
    mine.process(noisy_unlearner(method), data(), num_epochs=1, **options)
    kind, unmet = claimed(tmp_path)
    assert kind == ("empirical" if broken else "estimate")
    assert unmet.keys() & {LOOKS, ENDS} == broken.keys()
    assert all(evidence in unmet[statement] for statement, evidence in broken.items())


def test_weights_that_do_not_describe_their_runs_cost_the_claim(tmp_path):
    """As files were before they did."""
    mine = requests(tmp_path)
    mine.submit("a", indices=[3])
    facts = {"honoured": '["a"]', "forgotten": "[3]"}
    state = noisy_unlearner().model.state_dict()
    write_weights(mine.weights_path, UNLEARNED_WEIGHTS, state, facts)
    kind, unmet = claimed(tmp_path)
    assert kind == "empirical" and unmet[LOOKS] == "an earlier run is not described"


class Killed(BaseException):
    """Stands for the death of the process: nothing in memory survives it."""


@pytest.mark.parametrize(
    "where, owner", [("unlearn", Unlearner), ("_store", None), ("_done", None)]
)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at_call", [1, 2, 3])
def test_each_request_once_whenever_the_process_dies(
    tmp_path, monkeypatch, where, owner, after, at_call
):
    submitted(tmp_path)
    owner = owner or DeletionRequests
    calls = []

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == at_call and not after:
            raise Killed
        result = original(self, *args, **kwargs)
        if len(calls) == at_call and after:
            raise Killed
        return result

    stored = []
    store = DeletionRequests._store

    def counting(self, *args):
        store(self, *args)
        stored.append(1)

    monkeypatch.setattr(DeletionRequests, "_store", counting)
    original = getattr(owner, where)
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, dying)
        with pytest.raises(Killed):
            requests(tmp_path).process(unlearner(), data(), num_epochs=1)
    last = unlearner()
    mine = requests(tmp_path)
    mine.process(last, data(), num_epochs=1)
    assert mine.pending == []
    done = [e for e in mine.record.entries() if e["kind"] == "done"]
    assert [i for e in done for i in e["body"]["ids"]] == ["a", "b", "c"]
    np.testing.assert_array_equal(last.forgotten, [2, 3, 5, 8, 9])
    assert mine._honoured() == {"a", "b", "c"}
    assert len(stored) == 3  # the weights went through one unlearning per request


def test_weights_that_went_missing_or_were_changed_are_noticed(tmp_path):
    mine = submitted(tmp_path)
    mine.process(unlearner(), data(), num_epochs=1)
    content = mine.weights_path.read_bytes()
    mine.weights_path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="must match its checksum"):
        mine.process(unlearner(), data())
    mine.weights_path.write_bytes(content)
    state, facts = read_weights(mine.weights_path, UNLEARNED_WEIGHTS)
    other = {name: value + 1 for name, value in state.items()}
    write_weights(mine.weights_path, UNLEARNED_WEIGHTS, other, facts)
    with pytest.raises(ValueError, match="3 recorded"):
        mine.process(unlearner(), data())
    mine.weights_path.unlink()
    with pytest.raises(ValueError, match="3 recorded"):
        mine.process(unlearner(), data())


def test_weights_of_another_model_are_refused_and_nothing_is_loaded(tmp_path):
    mine = submitted(tmp_path)
    mine.process(unlearner(), data(), num_epochs=1)
    torch.manual_seed(0)
    other = Unlearner(nn.Linear(4, 2), criterion=nn.CrossEntropyLoss())
    before = {k: v.clone() for k, v in other.model.state_dict().items()}
    with pytest.raises(
        ValueError, match="must fit the unlearner's model, got .* differ"
    ):
        mine.process(other, data())
    assert all(torch.equal(v, before[k]) for k, v in other.model.state_dict().items())


def test_a_record_about_another_training_set_is_refused(tmp_path):
    submitted(tmp_path)
    smaller = DeletionRequests(tmp_path / "deletions.jsonl", 9)
    with pytest.raises(
        ValueError, match="entry must be about rows of 9 examples, .*got 1"
    ):
        _ = smaller.pending
    with pytest.raises(ValueError, match="record of another training set"):
        smaller.process(unlearner(), range(9))


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        ("request", {"id": "a", "indices": [1]}, "a new request"),
        ("request", {"id": 1, "indices": [1]}, "with a name and rows"),
        ("request", {"id": "z"}, "with a name and rows"),
        ("request", {"id": "z", "indices": [2, 1]}, "each once, sorted"),
        ("request", {"id": "z", "indices": [True]}, "each once, sorted"),
        ("request", {"id": "z", "indices": []}, "each once, sorted"),
        ("done", {"ids": ["z"], "weights_sha256": "0" * 64}, "that were open"),
        ("done", {"ids": "a", "weights_sha256": "0" * 64}, "that were open"),
        ("done", {"ids": ["a"]}, "the hash of the weights"),
    ],
)
def test_entries_that_make_no_sense_are_refused(tmp_path, kind, body, message):
    mine = submitted(tmp_path)
    mine.record.append(kind, body)  # an unbroken chain
    with pytest.raises(ValueError, match=message):
        _ = mine.pending


@pytest.mark.parametrize(
    "facts",
    [
        {"honoured": "{}", "forgotten": "[]"},
        {"honoured": "[1]", "forgotten": "[]"},
        {"honoured": "[]", "forgotten": "[99]"},
        {"honoured": "[", "forgotten": "[]"},
        {"honoured": "[]", "forgotten": "[]", "history": "[]"},
        {"honoured": "[]", "forgotten": "[]", "history": '{"stop": "", "looked": ""}'},
        {"honoured": "[]", "forgotten": "[]", "history": '{"stop": null, "looked": 1}'},
        {},
    ],
)
def test_weights_that_say_nothing_clear_are_refused(tmp_path, facts):
    mine = submitted(tmp_path)
    write_weights(mine.weights_path, UNLEARNED_WEIGHTS, {"w": torch.zeros(2)}, facts)
    with pytest.raises(ValueError, match="must name the requests it honours"):
        mine.process(unlearner(), data())


def test_two_processes_do_not_work_at_once(tmp_path):
    mine = submitted(tmp_path)
    with requests(tmp_path)._alone(), pytest.raises(RuntimeError, match="another"):
        mine.process(unlearner(), data())


@pytest.mark.parametrize(
    "facts, message",
    [
        ({}, "neither"),
        ({"indices": [1], "user": "ann"}, "both"),
        ({"user": "eve"}, "user must .*got eve"),
        ({"indices": []}, "at least one index"),
        ({"indices": [1, 1]}, "duplicates"),
        ({"indices": [SIZE]}, r"in \[0, 20\)"),
    ],
)
def test_bad_requests_are_refused_and_not_written(tmp_path, facts, message):
    mine = submitted(tmp_path)
    with pytest.raises(ValueError, match=message):
        mine.submit("z", **facts)
    assert len(mine.record.entries()) == 3


def test_one_name_one_request(tmp_path):
    with pytest.raises(ValueError, match="request_id must .*got a"):
        submitted(tmp_path).submit("a", indices=[7])


def test_the_training_set_must_fit(tmp_path):
    with pytest.raises(ValueError, match="train_set"):
        submitted(tmp_path).process(unlearner(), range(7))
