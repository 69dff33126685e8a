"""An export shows an auditor the whole chain, and only what is disclosed."""

import hashlib
import json
import re
import stat

import pytest
import torch
from torch.utils.data import TensorDataset

from opacus_pi import Unlearner
from opacus_pi.accounting import fingerprint
from opacus_pi.cli import main
from opacus_pi.files.kinds import UNLEARNED_WEIGHTS
from opacus_pi.files.weights_file import read_weights
from opacus_pi.unlearning import (
    DeletionLog,
    DeletionRequests,
    deletion_statement,
    export_log,
    exported_entries,
    verify_export,
)
from opacus_pi.unlearning.honouring_weights import weights_path_of


@pytest.fixture
def log(tmp_path):
    log = DeletionLog(tmp_path / "deletions.db")
    for number, name in enumerate(("ada's", "ben's", "eve's")):
        log.append("request", {"indices": [number], "user": name}, name=name)
    log.append("done", {"entries": [0, 1]})
    log.redact(0, "retention is over")
    return log


@pytest.fixture
def path(log, tmp_path):
    export_log(log, tmp_path / "export.json", disclose=[1, 4])
    return tmp_path / "export.json"


def test_the_chain_is_whole_and_the_rest_withheld(log, path):
    entries, found = [*log.entries()], exported_entries(path)
    hashes = [(e.number, e.time, e.kind, e.hash) for e in entries]
    assert [(e.number, e.time, e.kind, e.hash) for e in found] == hashes
    shown = [entries[i].payload if i in (1, 4) else None for i in range(5)]
    assert [e.payload for e in found] == shown and found[1].name == "ben's"
    text = path.read_text()
    assert "ben's" in text and "eve's" not in text and "ada's" not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    checked = verify_export(path, log.head)
    assert (checked.head, checked.num_entries) == (log.head, 5)
    assert checked.redacted == (0,) and checked.num_added == 0


@pytest.mark.parametrize("name", ["body", "name", "salt", "hash", "number"])
def test_a_name_that_is_given_twice_is_refused(log, path, name):
    """Readers that take the first of two would read something else."""
    text = path.read_text()
    start = text.rindex(f'"{name}"')
    path.write_text(f'{text[:start]}"{name}": "false", {text[start:]}')
    json.loads(path.read_text())  # which takes the last
    with pytest.raises(ValueError, match="must be a whole file"):
        verify_export(path, log.head)


def test_the_hashes_need_no_program_of_ours(path):
    """As the page for auditors describes them."""
    previous = "0" * 64
    for e in json.loads(path.read_text())["entries"]:
        chained = [e["number"], e["time"], e["kind"], e["commitment"], previous]
        previous = hashlib.sha256(json.dumps(chained).encode()).hexdigest()
        assert previous == e["hash"]
        if content := e.get("content"):
            said = json.dumps([content["name"], content["body"]]).encode()
            salted = bytes.fromhex(content["salt"]) + said
            assert hashlib.sha256(salted).hexdigest() == e["commitment"]


def edit(path, change):
    content = json.loads(path.read_text())
    change(content["entries"])
    path.write_text(json.dumps(content))


EDITS = {
    "time": lambda entries: entries[2].update(time="2020-01-01T00:00:00+00:00"),
    "content": lambda entries: entries[1]["content"].update(body='{"indices": [9]}'),
    "salt": lambda entries: entries[1]["content"].update(salt="00" * 32),
    "added content": lambda entries: entries[2].update(entries[1] | entries[2]),
    "removed": lambda entries: entries.pop(2),
    "order": lambda entries: entries.reverse(),
    "state": lambda entries: entries[2].update(state="disclosed"),
    "number": lambda entries: entries[2].update(number=True),
    "missing": lambda entries: entries[2].pop("commitment"),
    "no entry": lambda entries: entries.append({}),
    "one fact more": lambda entries: entries[2].update(note="erased"),
    "content says more": lambda entries: entries[1]["content"].update(note="erased"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_noticed(path, name):
    edit(path, EDITS[name])
    with pytest.raises(ValueError, match="Entry [0-5] breaks the chain"):
        verify_export(path)


def test_an_export_that_says_more_than_a_log_is_refused(path):
    content = json.loads(path.read_text()) | {"note": "every request was honoured"}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="unedited export.*says more .*'note'"):
        verify_export(path)


def test_a_byte_order_mark_changes_nothing(log, path):
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert verify_export(path, log.head).num_added == 0


def test_missing_last_entries_are_noticed_by_the_head(log, path):
    edit(path, lambda entries: entries.pop())
    assert verify_export(path).num_entries == 4
    with pytest.raises(ValueError, match="head must be"):
        verify_export(path, log.head)


@pytest.mark.parametrize("number", [0, 5, -1])
def test_what_is_not_there_cannot_be_disclosed(log, tmp_path, number):
    with pytest.raises(ValueError, match="an entry that was not redacted"):
        export_log(log, tmp_path / "other.json", disclose=[number])
    assert not (tmp_path / "other.json").exists()


@pytest.mark.parametrize(
    ("kind", "payload", "is_shown"),
    [
        ("remaining", {"fingerprint": "some:3"}, False),
        ("training set", {"data_set": "A:3"}, False),
        ("request", {"indices": [3], "data_set": "A:3"}, False),
        ("done", {"requests": [0], "run": {"data_set": "A:3"}}, False),
        ("done", {"requests": [0], "run": {"seed": 7, "num_steps": 1}}, False),
        ("done", {"requests": [0], "remaining": {"fingerprint": "some:3"}}, False),
        ("done", {"requests": [0], "run": {"num_steps": 1}}, True),
        ("request", {"indices": [3], "run": "seed"}, True),
    ],
)
def test_seeds_and_what_remains_are_never_disclosed(tmp_path, kind, payload, is_shown):
    log, path = DeletionLog(tmp_path / "d.db"), tmp_path / "export.json"
    log.append(kind, payload)
    if is_shown:
        export_log(log, path, disclose=[0])
        assert exported_entries(path)[0].payload == payload
        return
    with pytest.raises(ValueError, match="disclose must name entries that others may"):
        export_log(log, path, disclose=[0])
    export_log(log, path)
    assert verify_export(path, log.head).num_added == 0
    assert exported_entries(path)[0].payload is None


def test_nothing_that_others_see_can_be_used_to_try_examples(tmp_path):
    """No hash over the training set, whose other examples they may hold."""
    examples = TensorDataset(torch.randn(20, 4), torch.arange(20) % 2)
    name, log = fingerprint(examples), tmp_path / "d.db"
    hashes = re.findall("[0-9a-f]{16}", name)
    assert len(hashes) >= 3
    requests = DeletionRequests(log, 20, data_set=name)
    model = torch.nn.Linear(4, 2)
    unlearner = Unlearner(model, criterion=torch.nn.CrossEntropyLoss())
    for request, example in (("a", 3), ("b", 5)):
        requests.submit(request, indices=[example])
    (result,) = requests.process(unlearner, examples, together=True, num_epochs=1)
    path, kinds = tmp_path / "export.json", [e.kind for e in requests.log.entries()]
    assert kinds == ["training set", "request", "request", "remaining", "done"]
    export_log(requests.log, path, disclose=[1, 4])
    shown = path.read_text() + deletion_statement(result, 1e-5).to_json()
    assert not [part for part in hashes if part in shown]
    with pytest.raises(ValueError, match="belongs to another training set"):
        DeletionRequests(log, 20, data_set=name.replace(hashes[0], "0" * 16))
    # The weights may be released: what is stored beside them must not follow from them.
    file = weights_path_of(log)
    _, facts = read_weights(file, UNLEARNED_WEIGHTS)
    assert len(facts["random"]) == 64 and facts["random"] not in shown


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kind": 1, "version": 1}', "\udcff"]
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="of the kind opacus_pi.DeletionLogExport"):
        verify_export(path)


def test_the_command_line_verifies_it(log, path, capsys):
    words = ["verify", str(path), log.head]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert (
        out.startswith("verified: a deletion log for an auditor") and "redacted" in out
    )
    edit(path, EDITS["time"])
    assert main(words) == 1 and "NOT VERIFIED" in capsys.readouterr().out
