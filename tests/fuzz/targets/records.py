"""Readers of records: deletions, what they left half done, and traces."""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np

from opacus_pi.evaluation import UnlearningTrace
from opacus_pi.unlearning.deletion_record import DeletionRecord, verify
from opacus_pi.unlearning.request_entries import requests_of
from tests.fuzz import originals
from tests.fuzz.mutations import (
    other_chain,
    other_json,
    written,
)
from tests.fuzz.targets.ledgers import N
from tests.fuzz.targets.target import TORCH_TYPES, Target, safetensors_edit
from tests.fuzz.targets.weights import state_check, state_equal


def deletion_reader(original):
    """Whoever kept the head sees every edit; the reader alone sees a broken chain."""
    head = json.loads(original.splitlines()[-1])["hash"]

    def read(path):
        before = path.read_bytes()
        try:
            found = DeletionRecord(path).entries()
        except ValueError:
            assert path.read_bytes() == before, "a refused record was changed"
            raise
        return requests_of(found, N), found, verify(path) == head

    return read


def deletion_check(answer):
    requests, entries, _ = answer
    for name, request in requests.submitted.items():
        assert name == request.request_id and isinstance(name, str)
        rows = request.indices
        assert rows and all(type(i) is int and 0 <= i < N for i in rows)
        assert list(rows) == sorted(set(rows))
    assert requests.done <= set(requests.submitted)
    assert [e["number"] for e in entries] == list(range(len(entries)))
    assert all(type(e["number"]) is int for e in entries)


def deletion_equal(original):
    wanted = [json.loads(line) for line in original.splitlines()]

    def equal(answer):
        _, entries, complete = answer
        if complete:
            return entries == wanted
        kept = [e for e in entries if e["kind"] != "repaired"]
        return kept == wanted[: len(kept)] and len(entries) - len(kept) <= 1

    return equal


def deletion_edit(content, chance, *, seal):
    return other_chain(content, chance, seal=seal)


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


def read_unlearned(record):
    def read(path):
        lines = record.splitlines(keepends=True)[:2]  # killed before it said "done"
        (path.parent / "deletions").write_bytes(b"".join(lines))
        mine = originals.requests_about(path.parent / "deletions")
        path.rename(mine.weights_path)
        worker = originals.unlearner()
        mine._resume(worker)
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
    return {
        "deletions": Target(
            deletions,
            deletion_reader(deletions),
            deletion_check,
            deletion_equal(deletions),
            deletion_edit,
        ),
        "unlearned": Target(
            unlearned,
            read,
            state_check,
            state_equal(wanted),
            safetensors_edit(TORCH_TYPES),
        ),
        "trace": Target(
            originals.content_of(originals.trace().save),
            UnlearningTrace.load,
            trace_check,
            lambda run: run == originals.trace(),
            trace_edit,
        ),
    }
