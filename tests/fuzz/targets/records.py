"""Readers of deletion logs, of the weights that honour them, and of traces."""

import hashlib
import json
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from opacus_pi.evaluation import UnlearningTrace
from opacus_pi.unlearning import export_log, exported_entries, import_log
from opacus_pi.unlearning.deletion_log import START, DeletionLog, read_entries, verify
from opacus_pi.unlearning.entry_hashes import commitment_of, entry_hash
from opacus_pi.unlearning.request_entries import requests_of
from tests.fuzz import originals
from tests.fuzz.mutations import (
    edited_log,
    other_chain,
    other_json,
    other_log,
    written,
)
from tests.fuzz.targets.ledgers import N
from tests.fuzz.targets.target import TORCH_TYPES, Target, safetensors_edit
from tests.fuzz.targets.weights import state_check, state_equal

OLD_LOG = Path(__file__).parents[2] / "unlearning" / "json_lines" / "deletions.jsonl"


def deletion_reader(original):
    """Whoever noted the head sees every edit; the reader alone sees a broken chain."""
    wanted = _head(original)

    def read(path):
        before = path.read_bytes()
        try:
            found = [*DeletionLog(path).entries()]
            head = verify(path).head
        except ValueError:
            assert path.read_bytes() == before, "a refused log was changed"
            raise
        assert head == (found[-1].hash if found else START)
        return requests_of(found, N), found, head == wanted

    return read


def json_lines_reader(path):
    """Imports an old log, which is never changed."""
    before, new = path.read_bytes(), path.with_name("new")
    try:
        found = [*import_log(path, new, key=b"k" * 32).entries()]
    finally:
        assert path.read_bytes() == before, "an old log was changed"
        assert new.exists() or not path.with_name("new.key").exists()
    verify(new)
    return requests_of(found, 10**40), found, False


def deletion_check(answer):
    requests, entries, _ = answer
    for number, request in requests.submitted.items():
        if request is None:
            assert entries[number].redacted
            continue
        assert entries[number].name == request.request_id
        assert isinstance(request.request_id, str)
        rows = request.indices
        assert rows and all(type(i) is int and i >= 0 for i in rows)
        assert list(rows) == sorted(set(rows))
    assert requests.done <= set(requests.submitted)
    assert [e.number for e in entries] == list(range(len(entries)))
    assert all(type(e.number) is int for e in entries)


def deletion_equal(original):
    def equal(answer):
        _, entries, complete = answer
        said = [(e.number, e.time, e.kind, e.name, e.payload) for e in entries]
        return complete and said == wanted

    with _file(original) as path:
        wanted = [
            (e.number, e.time, e.kind, e.name, e.payload) for e in read_entries(path)
        ]
    return equal


def json_lines_equal(original):
    """The same lines, or fewer of them: of a prefix nothing tells that it is one."""

    def equal(answer):
        *entries, imported = answer[1]
        said = [(e.time, e.kind, e.name, e.payload) for e in entries]
        return imported.kind == "import" and said == wanted[: len(said)]

    with _file(original) as path:
        *entries, _ = json_lines_reader(path)[1]
        wanted = [(e.time, e.kind, e.name, e.payload) for e in entries]
    return equal


@contextmanager
def _file(content):
    """A file with some content."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "deletions")
        path.write_bytes(content)
        yield path


def _head(content):
    with _file(content) as path:
        return verify(path).head


def trace_check(run):
    assert all(isinstance(t, float) for t in run.times) and isinstance(run.unit, str)
    assert (np.diff(run.times) > 0).all() and np.isfinite(run.times).all()
    for name, values in run.metrics.items():
        assert isinstance(name, str) and len(values) == len(run.times)
        assert all(isinstance(v, float) for v in values)
    assert all(isinstance(v, float) for v in run.cost.values())


def trace_edit(content, chance, *, seal):
    said = other_json(json.loads(content), chance)
    if seal and isinstance(said, dict):
        said.pop("checksum", None)
        try:
            text = json.dumps(said, sort_keys=True)
        except RecursionError:
            return b"[" * 5000
        said["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    try:
        return written(said).encode()
    except RecursionError:
        return b'{"a":' * 5000


def export_check(found):
    assert [e.number for e in found] == list(range(len(found)))
    for entry in found:
        assert all(type(t) is str for t in (entry.time, entry.kind, entry.hash))
        assert entry.redacted or type(entry.payload) is dict


def export_edit(content, chance, *, seal):
    said = json.loads(content)
    if seal and chance.random() < 0.5:  # an entry that could have been
        entry = chance.choice(said["entries"])
        entry[chance.choice(("time", "kind"))] = chance.choice(["", "x", "2020"])
    else:
        said = other_json(said, chance)
    try:
        if seal:
            _seal_export(said["entries"])
        return written(said).encode()
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError):
        return b'{"a":' * 5000


def _seal_export(entries):
    """Give edited entries the hashes of an unbroken chain."""
    previous = START
    for number, entry in enumerate(entries):
        entry |= {"number": number, "previous": previous}
        if content := entry.get("content"):
            salt = bytes.fromhex(content["salt"])
            opened = commitment_of(salt, content["name"], content["body"])
            entry["commitment"] = opened
        facts = (entry[name] for name in ("time", "kind", "commitment"))
        entry["hash"] = previous = entry_hash(number, *facts, previous)


def _export(deletions, path):
    """The log of the deletions, half of it disclosed."""
    with _file(deletions) as log:
        export_log(DeletionLog(log), path, disclose=[0, 3])


def read_unlearned(log):
    killed = edited_log(  # before it logged "done"
        log,
        "DELETE FROM entries WHERE number > 1",
        "DELETE FROM payloads WHERE number > 1",
    )

    def read(path):
        (path.parent / "deletions").write_bytes(killed)
        mine = originals.requests_about(path.parent / "deletions")
        path.rename(mine.weights_path)
        worker = originals.unlearner()
        mine.resume(worker)
        return worker.model.state_dict()

    return read


def _deletions():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "deletions")
        originals.deletions(path)
        weights = path.with_name("deletions.safetensors").read_bytes()
        return path.read_bytes(), weights


def _unlearned_state(read, content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        path.write_bytes(content)
        return {name: value.clone() for name, value in read(path).items()}


def record_targets():
    """Deletions, the weights that one of them left, and a trace."""
    deletions, unlearned = _deletions()
    read = read_unlearned(deletions)
    wanted = _unlearned_state(read, unlearned)
    export = originals.content_of(lambda path: _export(deletions, path))
    with _file(export) as path:
        wanted_export = exported_entries(path)
    return {
        "deletions": Target(
            deletions,
            deletion_reader(deletions),
            deletion_check,
            deletion_equal(deletions),
            other_log,
        ),
        "json lines": Target(
            OLD_LOG.read_bytes(),
            json_lines_reader,
            deletion_check,
            json_lines_equal(OLD_LOG.read_bytes()),
            other_chain,
        ),
        "unlearned": Target(
            unlearned,
            read,
            state_check,
            state_equal(wanted),
            safetensors_edit(TORCH_TYPES),
        ),
        "export": Target(
            export,
            exported_entries,
            export_check,
            # nothing in a chain says that it goes on
            lambda found: found == wanted_export[: len(found)],
            export_edit,
        ),
        "trace": Target(
            originals.content_of(originals.trace().save),
            UnlearningTrace.load,
            trace_check,
            lambda run: run == originals.trace(),
            trace_edit,
        ),
    }
