"""Readers of ledgers, whole and in parts, and of Gram ledgers."""

import re
import tempfile
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np

from opacus_pi.accounting import GradNormLedger, GramLedger
from opacus_pi.recording.participation_log import record_in
from tests.fuzz import originals
from tests.fuzz.targets.target import NUMPY_TYPES, Target, safetensors_edit

N = originals.NUM_EXAMPLES


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


BLOCK = "participations-00000001.safetensors"


def read_block(path):
    return record_in(path.parent)


def block_check(record):
    size, total = record.num_examples, record.num_steps
    assert record.sampling in ("poisson", "fixed") and 0 <= record.sample_rate <= 1
    assert ((record.indices >= 0) & (record.indices < size)).all()
    assert ((record.steps >= 1) & (record.steps <= total)).all()
    assert not (record.norms < 0).any() and (record.noise_std >= 0).all()
    if size < 1000:
        first = record.first_updates()
        assert first.shape == (size,) and ((first >= 1) & (first <= total + 1)).all()
    assert all(0 <= step <= total for step in record.kept)


def block_equal(record):
    with tempfile.TemporaryDirectory() as folder:
        originals.participations(Path(folder, BLOCK))
        wanted = record_in(Path(folder))
    names = [f.name for f in fields(wanted)]
    arrays = [n for n in names if isinstance(getattr(wanted, n), np.ndarray)]
    facts = [n for n in names if n not in arrays]
    same = all(getattr(record, n) == getattr(wanted, n) for n in facts)
    return same and same_arrays(record, wanted, arrays)


def ledger_targets():
    """Whole, in parts, and the two kinds of Gram ledgers."""
    edit = safetensors_edit(NUMPY_TYPES)
    ledger = originals.content_of(originals.ledger().save)
    found = {
        "ledger": Target(ledger, GradNormLedger.load, ledger_check, ledger_equal, edit),
        "ledger in parts": Target(ledger, read_parts, parts_check, parts_equal, edit),
    }
    for kind in ("forget", "minibatch"):
        content = originals.content_of(originals.gram(kind).save)
        found[f"gram {kind}"] = Target(
            content, GramLedger.load, gram_check, gram_equal(kind), edit
        )
    block = originals.content_of(originals.participations, BLOCK)
    found["participations"] = Target(
        block, read_block, block_check, block_equal, edit, BLOCK
    )
    return found
