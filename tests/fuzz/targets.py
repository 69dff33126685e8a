"""What reads each format, and what it may answer.

A target's ``read`` takes a path and returns what the file says; ``check`` holds an
answer against the invariants of its class; ``equal`` against the original.
"""

import copy
import hashlib
import io
import json
import random
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opacus_pi.accounting import GradNormLedger, GramLedger
from opacus_pi.engine.filter_setup import resume_charges
from opacus_pi.evaluation import UnlearningTrace
from opacus_pi.recorder.recorded_run import RecordedRun
from opacus_pi.recorder.saved_run import require_version
from opacus_pi.recorder.weights import load_weights_
from opacus_pi.sealed_state import sealed, unsealed
from opacus_pi.unlearning.deletion_record import DeletionRecord, verify
from opacus_pi.unlearning.request_entries import requests_of
from tests.fuzz import originals
from tests.fuzz.mutations import (
    NUMBERS,
    NUMPY,
    SIZES,
    TEXTS,
    TORCH,
    damaged,
    edited,
    other_chain,
    other_json,
    other_length,
    written,
)

N = originals.NUM_EXAMPLES
NUMPY_TYPES = {name: text for name, (text, _) in NUMPY.items()}
TORCH_TYPES = {name: f"torch.{text}" for name, text in TORCH.items()}


class Refused(Exception):
    """A clear answer that is no exception of the library's own."""


@dataclass(frozen=True)
class Target:
    """One reader.

    Args:
        original: The good file.
        read: From a path.
        check: Asserts the invariants of what was read.
        equal: Whether something read is the original.
        edit: ``(content, chance, seal) -> content``: says something else.
        name: Of the file.
    """

    original: bytes
    read: Callable[[Any], Any]
    check: Callable[[Any], None]
    equal: Callable[[Any], bool]
    edit: Callable[..., bytes]
    name: str = "file"


# ------------------------------------------------------------------ ledgers


def ledger_check(run):
    shape = (len(run.steps), run.num_examples)
    assert run.grad_norms.shape == shape and run.grad_norms.dtype == np.float32
    assert run.steps.dtype == np.int64 and (np.diff(run.steps) > 0).all()
    assert ((run.steps >= 0) & (run.steps <= run.mechanism.num_steps)).all()
    for name in ("grad_norms", "confidences", "errors", "correct"):
        values = getattr(run, name)
        if values is not None:
            assert values.shape == shape and values.dtype == np.float32
            assert not (values < 0).any() and not np.isinf(values).any()
    if run.example_ids is not None:
        assert run.example_ids.shape == shape[1:] and (run.example_ids >= 0).all()
        assert len(set(run.example_ids.tolist())) == shape[1]
    assert run.source in ("swept", "observed")
    assert run.data_set is None or isinstance(run.data_set, str)
    assert re.fullmatch("sha256:[0-9a-f]{64}|changed|None", str(run.weights))
    mechanism_check(run.mechanism, shape[0])
    assert "sensitive" in repr(run)
    if (np.asarray(run.mechanism.noise_std) > 0).all():
        assert run.ratios().shape == shape and (run.ratios() >= 0).all()


def mechanism_check(mechanism, num_rows):
    assert isinstance(mechanism.num_steps, int) and mechanism.num_steps >= 0
    assert mechanism.sampling in ("poisson", "fixed")
    assert isinstance(mechanism.assumed_noise, bool)
    for name in ("sample_rate", "noise_std", "max_grad_norm"):
        value = np.asarray(getattr(mechanism, name))
        assert value.dtype == np.float64 and value.shape in ((), (num_rows,))
        assert (value >= 0).all()
    assert (np.asarray(mechanism.sample_rate) <= 1).all()
    assert np.isfinite(mechanism.noise_std).all()
    assert (np.asarray(mechanism.max_grad_norm) > 0).all()


def same_arrays(one, other, names):
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(
        (a is None) == (b is None)
        and (a is None or np.array_equal(a, b, equal_nan=True))
        for a, b in pairs
    )


def ledger_equal(run):
    wanted = originals.ledger()
    names = ("steps", "grad_norms", "example_ids", "confidences", "errors", "correct")
    facts = (run.mechanism, run.source, run.data_set, run.weights)
    same = facts == (wanted.mechanism, wanted.source, wanted.data_set, wanted.weights)
    return same and same_arrays(run, wanted, names)


def read_parts(path):
    """A ledger read in parts, put together again; at most the first thousand."""
    return list(islice(GradNormLedger.load_chunks(path, 4), 1000))


def parts_check(parts):
    for part in parts:
        ledger_check(part)
    ids = [i for part in parts for i in part.example_ids.tolist()]
    assert len(set(ids)) == len(ids)


def parts_equal(parts):
    wanted = originals.ledger()
    names = ("steps", "grad_norms", "example_ids", "confidences")
    starts = range(0, N, 4)
    return len(parts) == len(starts) and all(
        same_arrays(p, wanted.subset(range(i, min(i + 4, N))), names)
        and (p.mechanism, p.source) == (wanted.mechanism, wanted.source)
        for i, p in zip(starts, parts, strict=True)
    )


def gram_check(run):
    rank = {"forget": 3, "minibatch": 4}[run.kind]
    assert run.grams.ndim == rank and run.grams.dtype == np.float64
    assert np.isfinite(run.grams).all() and len(run.grams) == len(run.steps)
    assert (run.grams == np.swapaxes(run.grams, -1, -2)).all()
    diagonal = np.diagonal(run.grams, axis1=-2, axis2=-1)
    assert (diagonal >= 0).all()
    norms = np.sqrt(diagonal)
    most = norms[..., :, None] * norms[..., None, :] * (1 + 1e-4)
    assert (np.abs(run.grams) <= most).all()
    assert (np.diff(run.steps) > 0).all()
    if run.example_ids is not None and run.kind == "forget":
        assert len(set(run.example_ids.tolist())) == run.grams.shape[-1]
    mechanism_check(run.mechanism, len(run.steps))
    assert "sensitive" in repr(run)


def gram_equal(kind):
    wanted = originals.gram(kind)

    def equal(run):
        facts = (run.mechanism, run.kind, run.data_set)
        same = facts == (wanted.mechanism, wanted.kind, wanted.data_set)
        return same and same_arrays(run, wanted, ("steps", "grams", "example_ids"))

    return equal


# ------------------------------------------------------------------ records


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
        try:
            verify(path, head)
            complete = True
        except ValueError:
            complete = False
        return requests_of(found, N), found, complete

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


# ------------------------------------------------------------------ weights


def read_oracle(path):
    def recipe(retain, seed):
        raise Refused("Expected to be trained again")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return originals.oracle_of(recipe, path.parent)[0].state_dict()


def read_weights_of(path):
    model = originals.net()
    load_weights_(model, path, "digits")
    return model.state_dict()


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


def state_check(state):
    wanted = originals.net().state_dict()
    assert {n: (v.shape, v.dtype) for n, v in state.items()} == {
        n: (v.shape, v.dtype) for n, v in wanted.items()
    }


def state_equal(wanted):
    return lambda state: all(
        torch.equal(wanted[name], value) for name, value in state.items()
    )


# ------------------------------------------------------------------ checkpoints


def load_tensors(path):
    """A file of ``torch.save``; what torch itself cannot read is torch's affair."""
    try:
        return torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
    except Exception as error:
        raise Refused(f"Expected to be refused by torch: {error}") from error


def read_key(mode):
    def read(path):
        saved = load_tensors(path)
        require_version(saved)
        state = unsealed(saved)
        mine = originals.recorder(mode)
        mine.load_state_dict(state)
        run, *held = originals.run_state()
        names = [n for n in state if str(n).startswith("run_state.")]
        run.load_state_dict({n.removeprefix("run_state."): state[n] for n in names})
        del held
        drawn = torch.rand(2), np.random.rand(), random.random()
        return state, mine, drawn

    return read


def key_check(answer):
    state, mine, drawn = answer
    assert {type(v) for v in state.values()} <= {torch.Tensor, int, float, str}
    run = RecordedRun.from_state_dict(mine.state_dict())
    assert run.num_examples == N and run.data_set == "digits"
    assert len(run.rows) == len(run.steps) == len(run.intervals)
    assert all(0 <= value < 1 for value in (*drawn[0].tolist(), *drawn[1:]))
    try:
        ledger_check(mine.ledger)
    except (RuntimeError, ValueError):  # AccountingError: a refused run, or no rows
        pass


def same_states(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name])
        or (
            value.is_floating_point()
            and torch.equal(value.nan_to_num(-1), other[name].nan_to_num(-1))
        )
        if isinstance(value, torch.Tensor)
        else value == other[name] or value != value and other[name] != other[name]
        for name, value in one.items()
    )


def key_equal(mode):
    wanted = unsealed(originals.checkpoint_key(mode))
    return lambda answer: same_states(answer[0], wanted)


def read_filter(path):
    charges = load_tensors(path)
    mine = originals.renyi_filter()
    mine._spent = None
    if charges is None:
        raise Refused("Expected charges")
    resume_charges(mine, charges, 5)
    return mine


def filter_check(mine):
    assert mine.spent.dtype == np.float64 and mine.spent.ndim == 1
    assert (mine.spent >= 0).all() and np.isfinite(mine.spent).all()
    mine.admit([0], [0.1])


def filter_equal(mine):
    return np.array_equal(mine.spent, originals.renyi_filter().spent)


def state_edit(content, chance, *, seal):
    """A state dict that says something else."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    seal_of_before = state.pop("checksum")
    for _ in range(chance.choice([1, 1, 2])):
        _edit_entry(state, chance)
    state = sealed(state) if seal else {**state, "checksum": seal_of_before}
    return originals.as_file(state)


def _edit_entry(state, chance):
    name = chance.choice([*state])
    kind = chance.random()
    if kind < 0.1:
        del state[name]
    elif kind < 0.2:
        other = chance.choice(
            [*state, "rows.errors", "rows.x", "run_state.setting.step"]
        )
        state[other] = copy.deepcopy(state[name])
    elif kind < 0.7 and isinstance(state[name], torch.Tensor):
        state[name] = _other_tensor(state[name].clone(), chance)
    else:
        others = (*NUMBERS, *SIZES, *TEXTS, True, None, [1.0], {"a": 1}, b"x")
        state[name] = chance.choice([*others, torch.tensor(chance.random())])


def _other_tensor(tensor, chance):
    kind = chance.choice(
        ("entry", "entry", "entry", "type", "shape", "shorter", "none")
    )
    if kind == "entry" and tensor.numel():
        flat = tensor.reshape(-1)
        numbers = NUMBERS if tensor.is_floating_point() else [0, 1, 2, 255, 2**62, -5]
        value = chance.choice(range(256) if tensor.dtype == torch.uint8 else numbers)
        if tensor.is_floating_point():
            value = torch.tensor(value, dtype=torch.float64).to(tensor.dtype)
        flat[chance.randrange(len(flat))] = value
        return flat.reshape(tensor.shape)
    if kind == "type":
        return tensor.to(chance.choice([torch.float32, torch.int64, torch.float16]))
    if kind == "shape":
        return tensor.reshape(
            chance.choice([(-1,), (1, -1), (-1, 1)]) if tensor.numel() else (0, 0)
        )
    if kind == "shorter" and tensor.dim():
        return tensor[: chance.randrange(len(tensor) + 1)].clone()
    return torch.zeros(chance.choice([(), (0,), (3,), (N,), (2, N), (625,)]))


# ------------------------------------------------------------------ all of them


def safetensors_edit(types):
    def edit(content, chance, *, seal):
        if not seal and chance.random() < 0.1:
            return other_length(content, chance)
        return edited(content, types, chance, seal=seal)

    return edit


def targets():
    """All targets by name; made anew, because they hold the originals."""
    of_numpy, of_torch = safetensors_edit(NUMPY_TYPES), safetensors_edit(TORCH_TYPES)
    ledger = originals.content_of(originals.ledger().save)
    deletions, unlearned = _deletions()
    weights = originals.content_of(originals.weights)
    oracle = originals.oracle_of(None, "").name
    net = originals.net().state_dict()
    found = {
        "ledger": Target(
            ledger, GradNormLedger.load, ledger_check, ledger_equal, of_numpy
        ),
        "ledger in parts": Target(
            ledger, read_parts, parts_check, parts_equal, of_numpy
        ),
        "deletions": Target(
            deletions,
            deletion_reader(deletions),
            deletion_check,
            deletion_equal(deletions),
            deletion_edit,
        ),
        "trace": Target(
            originals.content_of(originals.trace().save),
            UnlearningTrace.load,
            trace_check,
            lambda run: run == originals.trace(),
            trace_edit,
        ),
        "oracle": Target(
            originals.content_of(originals.oracle),
            read_oracle,
            state_check,
            state_equal(net),
            of_numpy,
            oracle,
        ),
        "weights": Target(
            weights,
            read_weights_of,
            state_check,
            state_equal(net),
            of_torch,
            "weights-00000020.safetensors",
        ),
        "filter": Target(
            originals.as_file(originals.filter_key()),
            read_filter,
            filter_check,
            filter_equal,
            state_edit,
        ),
    }
    for kind in ("forget", "minibatch"):
        content = originals.content_of(originals.gram(kind).save)
        found[f"gram {kind}"] = Target(
            content, GramLedger.load, gram_check, gram_equal(kind), of_numpy
        )
    for mode in ("observed", "swept"):
        content = originals.as_file(originals.checkpoint_key(mode))
        found[f"checkpoint {mode}"] = Target(
            content, read_key(mode), key_check, key_equal(mode), state_edit
        )
    read = read_unlearned(deletions)
    wanted = _unlearned_state(read, unlearned)
    found["unlearned"] = Target(
        unlearned, read, state_check, state_equal(wanted), of_torch
    )
    return found


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


def any_damage(target, chance, *, seal):
    """A file that is not the original any more."""
    if seal or chance.random() < 0.4:
        return target.edit(target.original, chance, seal=seal)
    return damaged(target.original, chance)
