"""Requests are carried out once each, whenever the process dies."""

import os
import sqlite3
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from opacus_pi import Recorder
from opacus_pi.accounting import GradNormLedger, NoisySGD
from opacus_pi.files.kinds import UNLEARNED_WEIGHTS
from opacus_pi.files.weights_file import read_weights, write_weights
from opacus_pi.ledger import fingerprint
from opacus_pi.models.weights_name import weights_name
from opacus_pi.unlearning import FineTune, Unlearner
from opacus_pi.unlearning import requests as requests_module
from opacus_pi.unlearning.deletion_log import DeletionLog, verify
from opacus_pi.unlearning.honouring_weights import stored_weights
from opacus_pi.unlearning.listed_requests import list_requests
from opacus_pi.unlearning.log_lock import locked
from opacus_pi.unlearning.loop import StopWhen
from opacus_pi.unlearning.requests import (
    DeletionRequest,
    DeletionRequests,
    remaining_by_log,
    requested_indices,
)
from opacus_pi.unlearning.rivals import NegGradPlus
from opacus_pi.unlearning.user_names import hashed_name

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
    return DeletionRequests(path / "deletions.db", SIZE, **options)


def names(found):
    return [request.request_id for request in found]


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
    assert len([*again.log.entries()]) == 3


def test_one_by_one(tmp_path):
    mine, worker = submitted(tmp_path), unlearner()
    results = mine.process(worker, data(), num_epochs=1)
    assert [r.record["forget_indices"] for r in results] == [[2, 5], [8, 9], [3]]
    assert mine.pending == []
    np.testing.assert_array_equal(worker.forgotten, [2, 3, 5, 8, 9])
    kinds = [e.kind for e in mine.log.entries()]
    assert kinds == ["request"] * 3 + ["remaining", "done"] * 3
    assert mine.process(worker, data(), num_epochs=1) == []
    verify(mine.log.path)


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
    """Of a run with noise, whose worst case is a bound."""
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
        (FineTune(), StopWhen("score", 1.0), {ENDS: "evaluation of 'score'"}),
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
    assert kind == ("empirical" if broken else "certified if")
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
    "owner, where",
    [
        (Unlearner, "unlearn"),
        (requests_module, "store_weights"),
        (DeletionRequests, "_log_done"),
    ],
)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at_call", [1, 2, 3])
def test_each_request_once_whenever_the_process_dies(
    tmp_path, monkeypatch, owner, where, after, at_call
):
    submitted(tmp_path)
    calls = []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == at_call and not after:
            raise Killed
        result = original(*args, **kwargs)
        if len(calls) == at_call and after:
            raise Killed
        return result

    stored = []
    store = requests_module.store_weights

    def counting(*args):
        store(*args)
        stored.append(1)

    monkeypatch.setattr(requests_module, "store_weights", counting)
    original = getattr(owner, where)
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, dying)
        with pytest.raises(Killed):
            requests(tmp_path).process(unlearner(), data(), num_epochs=1)
    last = unlearner()
    mine = requests(tmp_path)
    mine.process(last, data(), num_epochs=1)
    assert mine.pending == []
    entries = [*mine.log.entries()]
    done = [n for e in entries if e.kind == "done" for n in e.payload["requests"]]
    assert [entries[n].name for n in done] == ["a", "b", "c"]
    np.testing.assert_array_equal(last.forgotten, [2, 3, 5, 8, 9])
    weights = stored_weights(mine.weights_path, SIZE)
    assert weights.entries == {entries[n].hash for n in done}
    assert len(stored) == 3  # the weights went through one unlearning per request


def test_weights_that_went_missing_or_were_changed_are_noticed(tmp_path):
    mine = submitted(tmp_path)
    mine.process(unlearner(), data(), num_epochs=1)
    content = mine.weights_path.read_bytes()
    mine.weights_path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="does not match its checksum"):
        mine.process(unlearner(), data())
    mine.weights_path.write_bytes(content)
    state, facts = read_weights(mine.weights_path, UNLEARNED_WEIGHTS)
    other = {name: value + 1 for name, value in state.items()}
    write_weights(mine.weights_path, UNLEARNED_WEIGHTS, other, facts)
    with pytest.raises(
        ValueError, match="does not have the weights that honour the 3 logged"
    ):
        mine.process(unlearner(), data())
    mine.weights_path.unlink()
    with pytest.raises(
        ValueError, match="does not have the weights that honour the 3 logged"
    ):
        mine.process(unlearner(), data())


def test_weights_of_another_model_are_refused_and_nothing_is_loaded(tmp_path):
    mine = submitted(tmp_path)
    mine.process(unlearner(), data(), num_epochs=1)
    torch.manual_seed(0)
    other = Unlearner(nn.Linear(4, 2), criterion=nn.CrossEntropyLoss())
    before = {k: v.clone() for k, v in other.model.state_dict().items()}
    with pytest.raises(
        ValueError, match="do not fit the unlearner's model: they differ"
    ):
        mine.process(other, data())
    assert all(torch.equal(v, before[k]) for k, v in other.model.state_dict().items())


def test_the_log_of_another_model_is_refused(tmp_path):
    first = requests(tmp_path)
    first.submit("a", indices=[2])
    first.process(unlearner(), data(), num_epochs=1)
    other = unlearner()
    with torch.no_grad():
        other.model[0].weight[0, 0] += 1
    before = other.model.state_dict()["0.weight"].clone()
    again = requests(tmp_path)
    with pytest.raises(ValueError, match="the log is of another model"):
        again.resume(other)
    assert torch.equal(other.model.state_dict()["0.weight"], before)
    again.resume(unlearner())  # the model as it was trained
    latest = unlearner()
    latest.model.load_state_dict(read_weights(again.weights_path, UNLEARNED_WEIGHTS)[0])
    again.submit("b", indices=[4])
    assert len(again.process(latest, data(), num_epochs=1)) == 1


def test_a_misspelt_option_is_named_also_if_nothing_is_pending(tmp_path):
    with pytest.raises(TypeError, match="num_epoch"):
        requests(tmp_path).process(unlearner(), data(), num_epoch=1)
    with pytest.raises(TypeError, match=r"Recorder\.__init__\(\).*'chekpoints'"):
        Recorder(chekpoints=None)


def test_the_last_result_is_of_all_requests_that_were_carried_out(tmp_path):
    mine = submitted(tmp_path)
    assert mine.last_result(unlearner().model) is None
    *_, last = mine.process(unlearner(), data(), num_epochs=1)
    again = mine.last_result(unlearner().model)
    assert again.record == last.record and again.guarantee == last.guarantee
    assert again.trace == last.trace
    for one, other in zip(
        again.model.state_dict().values(), last.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)
    more = mine.last_result(last.model, ["a"])
    assert more.record["requests"] == ["a", "c"]
    assert more.record["forget_indices"] == [2, 3, 5]
    assert more.record["forgotten_before"] == [8, 9]
    with pytest.raises(ValueError, match="must name requests that were carried out"):
        mine.last_result(last.model, ["nobody"])
    mine.redact("c")  # its examples are named nowhere, so not even as the last ones
    (left,) = {
        tuple(mine.last_result(last.model, [n]).record["forget_indices"]) for n in "a"
    }
    assert left == (2, 5)


def test_a_log_may_be_opened_through_a_link(tmp_path):
    mine = requests(tmp_path)
    mine.submit("a", indices=[2])
    mine.process(unlearner(), data(), num_epochs=1)
    (tmp_path / "link.db").symlink_to(tmp_path / "deletions.db")
    linked = DeletionRequests(tmp_path / "link.db", SIZE)
    linked.submit("b", indices=[3])
    assert len(linked.process(unlearner(), data(), num_epochs=1)) == 1
    assert linked.weights_path == mine.weights_path
    os.link(tmp_path / "deletions.db", tmp_path / "other.db")
    with pytest.raises(ValueError, match="more than one name .* open it under that"):
        DeletionRequests(tmp_path / "other.db", SIZE).resume(unlearner())


def test_the_files_stay_together_if_the_process_changes_its_directory(
    tmp_path, monkeypatch
):
    """The log was named by a relative path; the key is made with the first user."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(home)
    mine = DeletionRequests("deletions.db", SIZE, {"ann": [8, 9]})
    monkeypatch.chdir(elsewhere)
    mine.submit("b", user="ann")
    mine.process(unlearner(), data(), num_epochs=1)
    assert not [*elsewhere.iterdir()]
    names = {"deletions.db" + end for end in ("", ".key", ".lock", ".safetensors")}
    assert {path.name for path in home.iterdir()} == names
    for place in ("../home/deletions.db", home / "deletions.db"):
        again = DeletionRequests(place, SIZE)
        assert [r.request_id for r in again.submitted_by("ann")] == ["b"]


def test_what_remains_is_read_through_a_link(tmp_path):
    mine = submitted(tmp_path)
    mine.process(unlearner(), data(), num_epochs=1)
    mine.redact("a")
    mine.redact("b")
    link = tmp_path / "links" / "link.db"
    link.parent.mkdir()
    link.symlink_to(mine.log.path)
    for found, wanted in zip(
        remaining_by_log(link), remaining_by_log(mine.log.path), strict=True
    ):
        np.testing.assert_array_equal(found.forgotten, wanted.forgotten)


def test_a_log_of_another_number_of_examples_takes_no_request(tmp_path):
    """It would name a position that the log's own training set does not have."""
    submitted(tmp_path)
    before = [*DeletionLog(tmp_path / "deletions.db").entries()]
    for size in (SIZE + 1, SIZE - 1):
        other = DeletionRequests(tmp_path / "deletions.db", size)
        with pytest.raises(ValueError, match=f"num_examples must be {SIZE}"):
            other.submit("late", indices=[size - 1])
    assert [*DeletionLog(tmp_path / "deletions.db").entries()] == before
    DeletionRequests(tmp_path / "deletions.db", SIZE).submit("late", indices=[3])


def test_a_log_of_an_earlier_release_names_no_number_of_examples(tmp_path):
    log = DeletionLog(tmp_path / "deletions.db")
    log.append("request", {"indices": [2]}, name="old")
    mine = requests(tmp_path)
    mine.submit("new", indices=[3])
    assert [r.request_id for r in mine.pending] == ["old", "new"]


def test_a_record_about_another_training_set_is_refused(tmp_path):
    submitted(tmp_path)
    smaller = DeletionRequests(tmp_path / "deletions.db", 9)
    with pytest.raises(
        ValueError, match="num_examples must be 20, the number in entry 0"
    ):
        _ = smaller.pending
    with pytest.raises(ValueError, match="log belongs to another training set"):
        smaller.process(unlearner(), range(9))


def with_other_labels():
    inputs, labels = data().tensors
    return TensorDataset(inputs, labels.flip(0))


def test_runs_name_their_data_set_and_another_of_the_same_length_is_refused(tmp_path):
    mine = submitted(tmp_path)
    mine.process(unlearner(), data(), num_epochs=1)
    mine.submit("later", indices=[1])
    content = mine.log.path.read_bytes()
    number = len(list(mine.log.entries()))
    with pytest.raises(ValueError, match="data_set must be TensorDataset:.* entry"):
        mine.process(unlearner(), with_other_labels(), num_epochs=1)
    path, other = mine.log.path, fingerprint(with_other_labels())
    with pytest.raises(ValueError, match="belongs to another training set"):
        requested_indices(path, SIZE, other)
    with pytest.raises(ValueError, match=f"got {other[:36]}"):
        DeletionRequests(path, SIZE, data_set=other)
    assert len(list(mine.log.entries())) == number and path.read_bytes() == content
    assert len(requested_indices(path, SIZE, fingerprint(data()))) > 1
    assert mine.process(unlearner(), data(), num_epochs=1)


def test_a_pending_request_names_its_data_set_if_it_is_known(tmp_path):
    path, own = tmp_path / "deletions.db", fingerprint(data())
    mine = DeletionRequests(path, SIZE, data_set=own)
    mine.submit("a", indices=[3])
    assert mine.submit("a", indices=[3]).indices == (3,)
    assert requested_indices(path, SIZE).tolist() == [3]
    assert requested_indices(path, SIZE, own).tolist() == [3]
    # without the hash of inputs, as a data set that reads files has none
    assert requested_indices(path, SIZE, fingerprint(data(), inputs=False)).size == 1
    with pytest.raises(ValueError, match="the one in entry 0 of the deletion log"):
        DeletionRequests(path, SIZE).process(unlearner(), with_other_labels())
    # a request that was logged without a data set is kept as it is
    DeletionRequests(tmp_path / "old.db", SIZE).submit("a", indices=[3])
    old = DeletionRequests(tmp_path / "old.db", SIZE, data_set=own)
    assert old.submit("a", indices=[3]).indices == (3,)


@pytest.mark.parametrize(
    ("kind", "name", "payload", "message"),
    [
        ("request", None, {"indices": [1]}, "with a name and indices"),
        ("request", "z", {}, "with a name and indices"),
        (
            "request",
            "z",
            {"indices": [2, 1]},
            "sorted indices below .*, each of them once",
        ),
        (
            "request",
            "z",
            {"indices": [True]},
            "sorted indices below .*, each of them once",
        ),
        ("request", "z", {"indices": []}, "sorted indices below .*, each of them once"),
        ("done", None, {"requests": [9], "weights_sha256": "0" * 64}, "were pending"),
        ("done", None, {"requests": "a", "weights_sha256": "0" * 64}, "were pending"),
        (
            "done",
            None,
            {"requests": [True], "weights_sha256": "0" * 64},
            "were pending",
        ),
        ("done", None, {"requests": [0]}, "the hash of the weights"),
    ],
)
def test_entries_that_make_no_sense_are_refused(tmp_path, kind, name, payload, message):
    mine = submitted(tmp_path)
    mine.log.append(kind, payload, name=name)  # an unbroken chain
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
    with pytest.raises(ValueError, match="lists the requests that its weights honour"):
        mine.process(unlearner(), data())


def test_two_processes_do_not_work_at_once(tmp_path):
    mine = submitted(tmp_path)
    with locked(mine.log.path), pytest.raises(RuntimeError, match="another"):
        mine.process(unlearner(), data())


@pytest.mark.parametrize(
    "facts, message",
    [
        ({}, "neither"),
        ({"indices": [19], "user": "ann"}, "must be examples of the user 'ann'"),
        ({"user": "eve"}, "user must be one of the 2 users .*got eve"),
        ({"user": ["ann"]}, "must be a string or a whole number"),
        ({"indices": []}, "at least one index"),
        ({"indices": [1, 1]}, "duplicates"),
        ({"indices": [SIZE]}, r"in \[0, 20\)"),
    ],
)
def test_bad_requests_are_refused_and_not_written(tmp_path, facts, message):
    mine = submitted(tmp_path)
    with pytest.raises(ValueError, match=message):
        mine.submit("z", **facts)
    assert len([*mine.log.entries()]) == 3
    assert os.listdir(tmp_path) == ["deletions.db", "deletions.db.key"]


def test_some_examples_of_a_user(tmp_path):
    mine = DeletionRequests(tmp_path / "d.db", SIZE, {"ann": [1, 4, 7]})
    assert mine.submit("a", indices=[7, 1], user="ann").indices == (1, 7)
    assert [r.request_id for r in mine.submitted_by("ann")] == ["a"]


def test_examples_that_were_forgotten_before_need_no_run(tmp_path):
    mine = requests(tmp_path)
    mine.submit("a", indices=[1, 2])
    mine.submit("same", indices=[2])
    assert len(mine.process(unlearner(), data(), num_epochs=1)) == 1
    stored = mine.weights_path.read_bytes()
    mine.submit("again", indices=[1, 2])
    fresh = requests(tmp_path)
    assert fresh.process(unlearner(), data(), num_epochs=1) == []
    assert fresh.pending == [] and mine.weights_path.read_bytes() == stored
    mine.submit("more", indices=[1, 3])
    last = unlearner()
    (result,) = requests(tmp_path).process(last, data(), num_epochs=1)
    assert result.record["requests"] == ["more"]
    assert last.forgotten.tolist() == [1, 2, 3] and verify(mine.log.path)


@pytest.mark.parametrize("name", [None, True, 1.5, (1,), b"a", ["a"], np.bool_(True)])
def test_a_name_of_another_type_is_refused_and_not_written(tmp_path, name):
    mine = submitted(tmp_path)
    before = mine.log.path.read_bytes()
    for call in (partial(mine.submit, indices=[1]), mine.redact):
        with pytest.raises(
            ValueError, match="request_id must be a string or a whole number, got"
        ):
            call(name)
    assert mine.log.path.read_bytes() == before


def test_a_whole_number_is_the_name_of_its_digits(tmp_path):
    mine = submitted(tmp_path)
    request = DeletionRequest("1042", (3,))
    for name in (1042, np.int64(1042), "1042"):
        assert mine.submit(name, indices=[3]) == request
    assert mine.pending[3:] == [request]
    for name in ("", "\ud800", "\0", "ü" * 3000, '"'):
        assert mine.submit(name, indices=[4]).request_id == name
    assert [r.request_id for r in requests(tmp_path).pending[4:]][1] == "\ud800"
    verify(mine.log.path)


def test_one_name_one_request(tmp_path):
    with pytest.raises(
        ValueError, match="request_id 'a' was submitted before for other"
    ):
        submitted(tmp_path).submit("a", indices=[7])


def test_the_training_set_must_fit(tmp_path):
    with pytest.raises(ValueError, match="train_set"):
        submitted(tmp_path).process(unlearner(), range(7))


# ------------------------------------------------------------------ users' names


def bytes_of(folder):
    return b"".join(path.read_bytes() for path in folder.iterdir())


def test_a_users_name_is_stored_as_a_keyed_hash(tmp_path):
    mine = submitted(tmp_path)
    assert b"ann" not in mine.log.path.read_bytes()
    key = tmp_path / "deletions.db.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_bytes().strip() not in mine.log.path.read_bytes()
    again = requests(tmp_path, rows_of={"ann": [1]})
    assert again.submitted_by("ann") == [DeletionRequest("b", (8, 9))]
    again.submit("e", user="ann")
    assert [r.request_id for r in again.submitted_by("ann")] == ["b", "e"]
    assert again.submitted_by("eve") == []


def test_the_key_may_be_an_argument(tmp_path):
    own = {"rows_of": {"ann": [9]}, "key": b"k" * 32}
    requests(tmp_path, **own).submit("a", user="ann")
    assert os.listdir(tmp_path) == ["deletions.db"]
    assert requests(tmp_path, **own).submitted_by("ann")
    with pytest.raises(ValueError, match="key must be the key .* another one, in key="):
        requests(tmp_path, key=b"l" * 32).submitted_by("ann")
    with pytest.raises(ValueError, match="the key file must exist, because the log"):
        requests(tmp_path).submitted_by("ann")
    for key in (b"short", "k" * 32):
        with pytest.raises(ValueError, match="key must be at least 16 bytes"):
            requests(tmp_path, key=key)


def test_names_are_stored_when_asked(tmp_path):
    mine = requests(tmp_path, rows_of={"ann": [9]}, store_names=True)
    mine.submit("a", user="ann")
    assert b"ann" in mine.log.path.read_bytes()
    assert os.listdir(tmp_path) == ["deletions.db"]
    assert mine.submitted_by("ann") == [DeletionRequest("a", (9,))]


def test_a_lost_key_is_not_silently_replaced(tmp_path):
    mine = submitted(tmp_path)
    key = tmp_path / "deletions.db.key"
    content = key.read_bytes()
    key.unlink()
    fresh = requests(tmp_path, rows_of={"bob": [3]})
    with pytest.raises(ValueError, match="the key file must exist, because the log"):
        fresh.submit("e", user="bob")
    for damaged in (b"", content[:10], b"\xff" * 65, b"my notes"):
        key.write_bytes(damaged)
        with pytest.raises(ValueError, match="the key file must contain 32 bytes"):
            fresh.submit("e", user="bob")
        assert key.read_bytes() == damaged
    assert len(mine.pending) == 3
    key.write_bytes(content)
    fresh.submit("e", user="bob")
    assert [r.request_id for r in mine.submitted_by("bob")] == ["c", "e"]


def test_with_the_key_of_another_log_no_request_seems_to_be_missing(tmp_path):
    places = [tmp_path / name for name in ("mine", "other")]
    for place in places:
        place.mkdir()
        submitted(place)
    keys = [place / "deletions.db.key" for place in places]
    own = keys[0].read_bytes()
    keys[0].write_bytes(keys[1].read_bytes())
    fresh = requests(places[0], rows_of={"bob": [3]})
    before = fresh.log.path.read_bytes()
    for call in (fresh.submitted_by, lambda name: fresh.submit("e", user=name)):
        with pytest.raises(
            ValueError, match=r"entry 1 of .*another one, that of .*If "
        ):
            call("bob")
    assert fresh.log.path.read_bytes() == before and verify(fresh.log.path)
    assert [r.request_id for r in fresh.pending] == ["a", "b", "c"]
    fresh.submit("e", indices=[3])  # needs no key
    keys[0].write_bytes(own)
    again = requests(places[0], rows_of={"bob": [3]})
    again.submit("f", user="bob")
    assert [r.request_id for r in again.submitted_by("bob")] == ["c", "f"]


def test_a_log_without_its_key_says_so(tmp_path):
    mine = submitted(tmp_path)
    (tmp_path / "deletions.db.key").unlink()
    with pytest.raises(ValueError, match="the key file must exist.*Restore the file"):
        requests(tmp_path).submitted_by("ann")
    assert os.listdir(tmp_path) == ["deletions.db"] and verify(mine.log.path)


def test_a_new_key_may_begin_when_no_hashed_name_is_left(tmp_path):
    mine = submitted(tmp_path)
    mine.process(unlearner(), data(), num_epochs=1)
    (tmp_path / "deletions.db.key").unlink()
    for name in ("b", "c"):
        mine.redact(name)
    fresh = requests(tmp_path, rows_of={"ann": [3]})
    assert fresh.submitted_by("ann") == []
    fresh.submit("e", user="ann")
    assert [r.request_id for r in fresh.submitted_by("ann")] == ["e"]


def test_an_earlier_release_did_not_say_which_key_it_used(tmp_path):
    mine = requests(tmp_path, key=b"k" * 32)
    facts = {"indices": [3], "user_hash": hashed_name("ann", b"k" * 32)}
    mine.log.append("request", facts, name="a")
    assert mine.submitted_by("ann") == [DeletionRequest("a", (3,))]
    with pytest.warns(UserWarning, match="1 names were hashed by an earlier release"):
        assert requests(tmp_path, key=b"l" * 32).submitted_by("ann") == []


def test_processes_that_submit_first_share_one_key(tmp_path):
    barrier = threading.Barrier(4)

    def submit(number):
        mine = requests(tmp_path, rows_of={"ann": [number]})
        barrier.wait()
        mine.submit(number, user="ann")

    with ThreadPoolExecutor(4) as pool:
        [*pool.map(submit, range(4))]
    found = requests(tmp_path).submitted_by("ann")
    assert sorted(request.request_id for request in found) == ["0", "1", "2", "3"]


# ------------------------------------------------------------------ withdrawal


def test_a_withdrawn_request_is_not_carried_out(tmp_path):
    mine = submitted(tmp_path)
    head = mine.log.head
    mine.withdraw("b", "wrong rows of ann")
    mine.withdraw("b")  # after a crash a caller may repeat it
    found = verify(mine.log.path, head)
    assert (found.num_added, mine.log.last.kind) == (1, "withdrawal")
    assert mine.log.last.payload == {"request": 1, "reason": "wrong rows of ann"}
    assert [r.request_id for r in mine.pending] == ["a", "c"] == names(mine.submitted)
    assert mine.submitted_by("ann") == []
    assert requested_indices(mine.log.path, SIZE).tolist() == [2, 3, 5]
    with pytest.raises(ValueError, match="'b' is the name of a request that was with"):
        mine.submit("b", user="ann")
    (result,) = mine.process(unlearner(), data(), together=True, num_epochs=1)
    assert result.record["forget_indices"] == [2, 3, 5]
    assert [row.state for row in list_requests(mine.log.path)] == [
        "carried out",
        "withdrawn",
        "carried out",
    ]
    mine.submit("b2", user="ann")
    (later,) = mine.process(unlearner(), data(), num_epochs=1)
    assert later.record["forget_indices"] == [8, 9]


@pytest.mark.parametrize("logged", [True, False])
def test_what_was_carried_out_or_is_unknown_is_not_withdrawn(
    tmp_path, logged, monkeypatch
):
    mine = submitted(tmp_path)
    if not logged:  # killed after the weights were stored
        monkeypatch.setattr(mine, "_log_done", lambda *_: None)
    mine.process(unlearner(), data(), num_epochs=0, together=True)
    head = mine.log.head
    with pytest.raises(ValueError, match="must name a pending request.*It was carried"):
        mine.withdraw("a")
    with pytest.raises(ValueError, match="must name a request of this log"):
        mine.withdraw("z")
    with pytest.raises(ValueError, match="reason must be a string"):
        mine.withdraw("a", None)
    assert mine.log.head == head


def test_no_result_is_shown_for_a_withdrawn_request(tmp_path):
    found = requests(tmp_path)
    found.submit("a", indices=[3])
    found.withdraw("a")
    with pytest.raises(ValueError, match="withdrawn, so nothing was forgotten"):
        found.last_result(unlearner().model, ["a"])


def test_the_log_of_a_training_set_of_another_length_says_so(tmp_path):
    requests(tmp_path).submit("a", indices=[3])
    shown = repr(DeletionRequests(tmp_path / "deletions.db", SIZE - 1))
    assert f"num_examples must be {SIZE}, the number in entry 0" in shown


def test_a_request_is_not_withdrawn_during_a_run(tmp_path):
    mine = submitted(tmp_path)
    with locked(mine.log.path), pytest.raises(RuntimeError, match="another process"):
        mine.withdraw("a")
    assert len(mine.pending) == 3


def test_a_name_for_other_examples_leads_to_the_withdrawal(tmp_path):
    mine = submitted(tmp_path)
    with pytest.raises(ValueError, match="request a is pending, .*log withdraw .*db"):
        mine.submit("a", indices=[7])
    mine.process(unlearner(), data(), num_epochs=0)
    with pytest.raises(ValueError, match="Use another name.$"):
        mine.submit("a", indices=[7])


def test_a_withdrawn_request_can_be_redacted(tmp_path):
    """What remains is told apart as if the withdrawn request had never been there."""
    mine = submitted(tmp_path)
    mine.withdraw("c")
    mine.redact("c")
    mine.process(unlearner(), data(), num_epochs=0)
    mine.redact("a")
    assert requested_indices(mine.log.path, SIZE).tolist() == [2, 5, 8, 9]
    assert {row.state for row in list_requests(mine.log.path)} == {
        "redacted",
        "carried out",
    }
    latest = remaining_by_log(mine.log.path)[0]
    assert latest.forgotten.tolist() == [2, 5, 8, 9]
    mine.submit("c", indices=[3])  # the name is free again
    assert names(mine.pending) == ["c"]


@pytest.mark.parametrize("number", [0, 7, True, None])
def test_an_entry_that_withdraws_what_is_not_pending_is_refused(tmp_path, number):
    mine = submitted(tmp_path)
    mine.process(unlearner(), data(), num_epochs=0)
    mine.log.append("withdrawal", {"request": number, "reason": ""})
    with pytest.raises(ValueError, match="an entry about a request that was pending"):
        _ = mine.pending


# ------------------------------------------------------------------ redaction


def test_a_redacted_request_is_gone_and_the_log_verifies(tmp_path):
    mine = requests(tmp_path, rows_of={"ann": [17, 18]}, store_names=True)
    mine.submit("a", indices=[2])
    mine.submit("request-of-annabel", user="ann")
    mine.process(unlearner(), data(), num_epochs=1)
    head = mine.log.head
    assert b"annabel" in bytes_of(tmp_path) and b"[17,18]" in bytes_of(tmp_path)
    mine.redact("request-of-annabel", "on demand")
    assert b"ann" not in bytes_of(tmp_path)
    assert b"[17,18]" not in mine.log.path.read_bytes()
    found = verify(mine.log.path, head)
    assert (found.redacted, found.num_added) == ((1,), 1)
    assert [e.redacted for e in mine.log.entries()] == [False, True, *[False] * 5]


def test_what_was_redacted_stays_forgotten(tmp_path):
    mine = submitted(tmp_path)
    mine.process(unlearner(), data(), num_epochs=1)
    for name in ("a", "b"):
        mine.redact(name)
    assert requested_indices(mine.log.path, SIZE).tolist() == [2, 3, 5, 8, 9]
    mine.submit("d", indices=[0])
    fresh = unlearner()
    (result,) = requests(tmp_path).process(fresh, data(), num_epochs=0)
    assert result.record["forgotten_before"] == [2, 3, 5, 8, 9]
    assert fresh.forgotten.tolist() == [0, 2, 3, 5, 8, 9]
    mine.weights_path.unlink()
    with pytest.raises(
        ValueError, match="only this file contains the examples of redacted"
    ):
        requested_indices(mine.log.path, SIZE)


def test_the_name_of_a_redacted_request_is_free(tmp_path):
    mine = submitted(tmp_path)
    mine.process(unlearner(), data(), num_epochs=1)
    mine.redact("a")
    with pytest.raises(ValueError, match="must name a request of this log"):
        mine.redact("a")
    mine.submit("a", indices=[7])
    assert mine.pending == [DeletionRequest("a", (7,))]


def test_a_pending_request_is_not_redacted(tmp_path):
    mine = submitted(tmp_path)
    with pytest.raises(
        ValueError, match="still pending. Carry it out first, with process"
    ):
        mine.redact("a")
    with pytest.raises(ValueError, match="must name a request of this log"):
        mine.redact("z")
    assert len(mine.pending) == 3


def test_only_the_requests_in_a_log_name_examples(tmp_path):
    mine = submitted(tmp_path)
    (result,) = mine.process(unlearner(), data(), num_epochs=1, together=True)
    (done,) = (e for e in mine.log.entries() if e.kind == "done")
    run = done.payload["run"]
    assert (run["num_forget"], run["num_forgotten_before"]) == (5, 0)
    assert not {"forget_indices", "forgotten_before", "requests"} & run.keys()
    # For the owner only: the seed is in the record, what remains in its own entry.
    assert "seed" not in run and "remaining" not in done.payload
    assert result.record["seed"] == 2
    assert done.payload["requests"] == [0, 1, 2]
    assert not {"epsilon", "reverse_epsilon", "delta"} & done.payload.keys()  # no bound


def test_what_it_shows_names_nobody(tmp_path):
    mine = submitted(tmp_path)
    mine.process(unlearner(), data(), num_epochs=0)
    mine.submit("d", indices=[0])
    mine.redact("a")
    assert repr(mine) == (
        "DeletionRequests(num_examples=20, num_users=2, num_requests=4, num_pending=1, "
        "num_done=3, num_withdrawn=0, num_redacted=1)"
    )
    mine.log.path.write_bytes(b"damaged")
    assert "must be a deletion log" in repr(mine)


def test_files_are_the_owners_alone(tmp_path):
    submitted(tmp_path).process(unlearner(), data(), num_epochs=1)
    assert sorted(os.listdir(tmp_path)) == [
        f"deletions.db{end}" for end in ("", ".key", ".lock", ".safetensors")
    ]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o600}


def test_permissions_that_others_have_are_taken(tmp_path):
    submitted(tmp_path)
    places = [tmp_path / "deletions.db", tmp_path / "deletions.db.key"]
    for place in places:
        place.chmod(0o644)
    with pytest.warns(UserWarning, match="mode 0644"):
        requests(tmp_path, rows_of={"ann": [9, 8]}).submitted_by("ann")
    assert {stat.S_IMODE(place.stat().st_mode) for place in places} == {0o600}


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    mine, victim = submitted(tmp_path), tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "deletions.db.lock").symlink_to(victim)
    with pytest.raises(OSError, match="is a link, which is not opened"):
        mine.process(unlearner(), data(), num_epochs=1)
    assert victim.read_text() == "precious" and len(mine.pending) == 3


@pytest.mark.parametrize(
    "name",
    [None, True, 1.5, float("nan"), b"x", ("a",), ["a"], {"a"}, 10**5000, -(10**1000)],
    ids=lambda name: type(name).__name__,
)
def test_ids_of_other_types_are_refused_before_anything_is_written(tmp_path, name):
    mine = submitted(tmp_path)
    before = mine.log.path.read_bytes()
    with pytest.raises(ValueError, match=r"request_id must be a string or a whole"):
        mine.submit(name, indices=[1])
    if name is not None:
        with pytest.raises(ValueError, match=r"user must be a string or a whole"):
            mine.submit("d", user=name)
    assert mine.log.path.read_bytes() == before and len(mine.pending) == 3


@pytest.mark.parametrize(
    "indices",
    [
        *([], [True], [1.0], ["1"], [1, 1], [-1], [SIZE], [10**30], [[1]], 3, "3"),
        *(None, {1}, [None], [1j], np.ma.masked_array([1, 2], [False, True])),
    ],
)
def test_indices_of_other_kinds_are_refused_before_anything_is_written(
    tmp_path, indices
):
    mine = submitted(tmp_path)
    before = mine.log.path.read_bytes()
    with pytest.raises(ValueError, match="indices"):
        mine.submit("d", indices=indices)
    assert mine.log.path.read_bytes() == before


@pytest.mark.parametrize("user", [7, "7", np.int64(7)])
def test_people_may_be_numbers(tmp_path, user):
    for key in (7, "7", np.int64(7)):
        mine = requests(tmp_path, rows_of={key: [4], 70: [5]})
        assert mine.submit("a", user=user).indices == (4,)
    assert [r.request_id for r in mine.submitted_by(user)] == ["a"]
    mine = requests(tmp_path, rows_of={7: [4], "7": [5]})
    with pytest.raises(ValueError, match="has this user twice"):
        mine.submit("b", user=user)
    with pytest.raises(ValueError, match="must be one of the 2 users"):
        mine.submit("b", user="07")


def test_a_log_without_its_last_entries_is_known_by_the_weights_beside_it(tmp_path):
    """The chain alone cannot show it: entries and payloads were both removed."""
    mine = requests(tmp_path)
    for name, row in (("a", 3), ("b", 5)):
        mine.submit(name, indices=[row])
        mine.process(unlearner(), data(), num_epochs=0)
    assert requested_indices(mine.log.path, SIZE).tolist() == [3, 5]
    with closing(sqlite3.connect(mine.log.path)) as connection, connection:
        for table in ("entries", "payloads"):
            connection.execute(f"DELETE FROM {table} WHERE number > 1")
    assert verify(mine.log.path).num_entries == 2
    with pytest.raises(ValueError, match="does not have the weights that honour"):
        requested_indices(mine.log.path, SIZE)


@pytest.mark.parametrize(
    ("together", "wanted"), [(False, [[2, 5], [8, 9], [3]]), (True, [[2, 3, 5, 8, 9]])]
)
def test_each_run_is_evaluated_on_what_it_forgets(tmp_path, together, wanted):
    given = []

    def evaluation_of(forgotten):
        given.append(forgotten.tolist())
        return lambda model: {"first": float(forgotten[0])}

    mine = submitted(tmp_path)
    with pytest.raises(ValueError, match="evaluate and evaluation_of were both given"):
        mine.process(
            *(unlearner(), data()), evaluation_of=evaluation_of, evaluate=lambda m: {}
        )
    results = mine.process(
        *(unlearner(), data()),
        together=together,
        evaluation_of=evaluation_of,
        num_epochs=1,
    )
    assert given == wanted == [result.record["forget_indices"] for result in results]
    for result, rows in zip(results, wanted, strict=True):
        assert result.trace.metrics == {"first": [rows[0]] * 2}


def recorded(model, left):
    """An unlearner whose ledger names the weights of a model."""
    norms = np.full((1, SIZE), 0.5)
    facts = {"data_set": fingerprint(data()), "weights": weights_name(left)}
    return Unlearner(
        model,
        criterion=nn.CrossEntropyLoss(),
        ledger=GradNormLedger(NoisySGD(10, 0.1, 2.0, 1.0), [10], norms, **facts),
    )


@pytest.mark.parametrize("together", [False, True])
def test_the_ledger_of_another_model_costs_no_request(tmp_path, together):
    found, model, other = requests(tmp_path), nn.Linear(4, 2), nn.Linear(4, 2)
    for name, example in (("a", 3), ("b", 5)):
        found.submit(name, indices=[example])
    before, weights = found.log.head, weights_name(other)
    options = {"together": together, "num_epochs": 1}
    with pytest.raises(ValueError, match="No recorded run left .* stay pending. Pass"):
        found.process(recorded(other, left=model), data(), **options)
    assert found.log.head == before and not found.weights_path.exists()
    assert weights_name(other) == weights and len(found.pending) == 2
    bare = Unlearner(other, criterion=nn.CrossEntropyLoss())
    assert found.process(bare, data(), **options)[0].guarantee.kind == "empirical"
    assert found.pending == []


def test_later_runs_start_from_weights_that_the_ledger_need_not_name(tmp_path):
    found, model = requests(tmp_path), nn.Linear(4, 2)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for name, example in (("a", 3), ("b", 5), ("c", 7)):
        found.submit(name, indices=[example])
        if name == "c":  # a new process, with the trained model
            model = nn.Linear(4, 2)
            model.load_state_dict(start)
        trained = nn.Linear(4, 2)
        trained.load_state_dict(start)
        worker = recorded(model, left=trained)
        (result,) = found.process(worker, data(), num_epochs=1)
        assert result.record["unlearned_weights"] == weights_name(result.model)
        model = worker.model
