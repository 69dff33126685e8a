"""The ledger: checks, gaps, units, choice of examples, files."""

import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from opacus_pi.accounting import GradNormLedger, NoisySGD, fill_unobserved
from opacus_pi.files.arrays_file import write_arrays
from opacus_pi.files.kinds import FileKind
from opacus_pi.ledger.grad_norm_ledger import runs_of

NAN = math.nan
NORMS = [[NAN, 2.0, 0.5, NAN], [1.0, NAN, 0.25, NAN], [0.25, NAN, NAN, NAN]]


def mechanism(**changes):
    facts = {
        "num_steps": 100,
        "sample_rate": 0.1,
        "noise_std": 2.0,
        "max_grad_norm": 1.0,
    }
    return NoisySGD(**{**facts, **changes})


def ledger(norms=NORMS, steps=(0, 50, 100), **changes):
    return GradNormLedger(mechanism(), steps, norms, **changes)


def full():
    """A ledger with every field."""
    rng = np.random.default_rng(0)
    scheduled = mechanism(noise_std=[1.0, 2.0, 3.0], max_grad_norm=math.inf)
    extra = {name: rng.random((3, 4)) for name in ("confidences", "errors", "correct")}
    return GradNormLedger(
        scheduled,
        [0, 50, 100],
        NORMS,
        source="observed",
        example_ids=[7, 3, 11, 2],
        data_set="digits",
        **extra,
    )


def test_fields_have_their_types_and_cannot_change():
    run = full()
    assert run.steps.dtype == np.int64
    assert run.example_ids.dtype == np.int64
    for name in ("grad_norms", "confidences", "errors", "correct"):
        assert getattr(run, name).dtype == np.float32
        with pytest.raises(ValueError, match="read-only"):
            getattr(run, name)[0, 0] = 1
    assert run.mechanism.noise_std.dtype == np.float64
    with pytest.raises(AttributeError):
        run.source = "swept"
    assert (run.num_rows, run.num_examples) == (3, 4)


def test_the_caller_s_array_is_not_kept():
    norms = np.ones((3, 2), np.float32)
    run = ledger(norms)
    norms[:] = 9
    assert (run.grad_norms == 1).all()


def test_defaults():
    run = ledger()
    assert run.source == "swept"
    for name in ("example_ids", "data_set", "confidences", "errors", "correct"):
        assert getattr(run, name) is None
    assert mechanism().sampling == "poisson"
    assert NoisySGD(1, 0.1, 1.0).max_grad_norm == math.inf
    with pytest.raises(TypeError):
        GradNormLedger(mechanism(), [0], [[1.0]], "swept")


def test_repr_hides_the_norms_and_warns():
    text = repr(ledger([[0.123456789] * 2] * 3))
    assert "0.1234" not in text
    assert "sensitive" in text
    assert "num_rows=3, num_examples=2" in text


def test_gaps_take_the_next_then_the_last_observation():
    expected = [
        [1, 2, 0.5, math.inf],
        [1, 2, 0.25, math.inf],
        [0.25, 2, 0.25, math.inf],
    ]
    np.testing.assert_array_equal(fill_unobserved(NORMS), expected)
    gap = fill_unobserved([[1], [NAN], [3], [NAN]])
    np.testing.assert_array_equal(gap, [[1], [3], [3], [3]])
    complete = np.ones((2, 2))
    filled = fill_unobserved(complete)
    assert filled is not complete
    np.testing.assert_array_equal(filled, complete)
    assert np.isnan(np.array(NORMS)).sum() == 7


def test_ratios_are_clipped_norms_over_noise():
    expected = [[0.5, 0.5, 0.25, 0.5], [0.5, 0.5, 0.125, 0.5], [0.125, 0.5, 0.125, 0.5]]
    np.testing.assert_array_equal(ledger().ratios(), expected)
    assert ledger().ratios().dtype == np.float64
    scheduled = GradNormLedger(
        mechanism(noise_std=[1.0, 2.0, 4.0], max_grad_norm=[1.0, 2.0, 3.0]),
        [0, 50, 100],
        [[5.0], [5.0], [1.0]],
    )
    np.testing.assert_array_equal(scheduled.ratios(), [[1.0], [1.0], [0.25]])
    unclipped = GradNormLedger(NoisySGD(9, 0.1, 2.0), [9], [[NAN, 7.0]])
    np.testing.assert_array_equal(unclipped.ratios(), [[math.inf, 3.5]])


def test_without_noise_ratios_are_refused_until_one_is_assumed():
    run = ledger().with_noise_std(0.0)
    with pytest.raises(ValueError, match=r"^noise_std must .*got 0.*with_noise_std"):
        run.ratios()
    np.testing.assert_array_equal(run.with_noise_std(2.0).ratios(), ledger().ratios())
    scheduled = ledger().with_noise_std([1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"^noise_std must .*got 0.*with_noise_std"):
        scheduled.ratios()


def test_an_assumed_noise_is_remembered(tmp_path):
    assert not ledger().mechanism.assumed_noise
    run = ledger().with_noise_std(2.0)
    assert run.mechanism.noise_std == ledger().mechanism.noise_std
    assert run.mechanism.assumed_noise and run.mechanism != ledger().mechanism
    run.subset([1]).save(tmp_path / "run")
    assert GradNormLedger.load(tmp_path / "run").mechanism == run.mechanism
    assert run.mechanism.at_row(0).assumed_noise
    with pytest.raises(ValueError, match="must have the same mechanism"):
        runs_of([ledger(), run])


def test_subset_keeps_order_and_remembers_who():
    run = full().subset([2, 0])
    assert run.example_ids.tolist() == [11, 7]
    np.testing.assert_array_equal(run.grad_norms, full().grad_norms[:, [2, 0]])
    np.testing.assert_array_equal(run.errors, full().errors[:, [2, 0]])
    assert run.data_set == "digits"
    assert ledger().subset([3, 1]).subset([1]).example_ids.tolist() == [1]
    for wrong, message in [
        ([], "contain an example"),
        ([0, 0], "must not have duplicates"),
    ]:
        with pytest.raises(ValueError, match=message):
            ledger().subset(wrong)
    with pytest.raises(ValueError, match=r"^indices must be in \[0, 4\), got 4"):
        ledger().subset([0, 4])


def test_a_ledger_of_another_data_set_is_refused():
    full().require_data_set("digits")
    ledger().require_data_set("anything")
    with pytest.raises(ValueError, match="^data_set must be.*digits, got cifar"):
        full().require_data_set("cifar")


ARRAYS = ("steps", "grad_norms", "example_ids", "confidences", "errors", "correct")


def check_same(found, wanted):
    """Two ledgers hold the same facts and arrays, to the type."""
    assert found.mechanism == wanted.mechanism
    assert (found.source, found.data_set) == (wanted.source, wanted.data_set)
    for name in ARRAYS:
        after, before = getattr(found, name), getattr(wanted, name)
        assert (before is None) == (after is None)
        if before is not None:
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("make", [ledger, full])
def test_a_file_brings_everything_back(tmp_path, make):
    run = make()
    run.save(tmp_path / "run.safetensors")
    again = GradNormLedger.load(tmp_path / "run.safetensors")
    check_same(again, run)


@pytest.mark.parametrize("make", [full, ledger])
@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_a_file_in_parts_is_the_same_ledger(tmp_path, make, size):
    run = make()
    run.save(tmp_path / "run")
    parts = list(GradNormLedger.load_chunks(tmp_path / "run", size))
    assert [part.num_examples for part in parts] == [
        min(size, 4 - start) for start in range(0, 4, size)
    ]
    for start, part in zip(range(0, 4, size), parts, strict=True):
        columns = np.arange(start, min(start + size, 4))
        wanted = run.subset(columns)
        check_same(part, wanted)


def test_an_empty_file_has_no_parts_or_empty_ones(tmp_path):
    ledger(np.empty((3, 0))).save(tmp_path / "empty")
    assert list(GradNormLedger.load_chunks(tmp_path / "empty")) == []
    GradNormLedger(mechanism(), [], np.empty((0, 4))).save(tmp_path / "never")
    (part,) = GradNormLedger.load_chunks(tmp_path / "never")
    assert part.grad_norms.shape == (0, 4)


def test_a_file_in_parts_is_checked_first(saved, tmp_path):
    content = bytearray(saved.read_bytes())
    content[-3] ^= 1
    (tmp_path / "edited").write_bytes(content)
    with pytest.raises(ValueError, match="does not match its checksum"):
        next(GradNormLedger.load_chunks(tmp_path / "edited"))
    (tmp_path / "short").write_bytes(content[:-9])
    with pytest.raises(ValueError, match="truncated"):
        next(GradNormLedger.load_chunks(tmp_path / "short"))
    with pytest.raises(FileNotFoundError):
        next(GradNormLedger.load_chunks(tmp_path / "absent"))
    with pytest.raises(ValueError, match="num_examples must be above 0, got 0.0"):
        next(GradNormLedger.load_chunks(saved, 0))


def test_pickle_and_equality_of_mechanisms():
    run = full()
    assert pickle.loads(pickle.dumps(run)).mechanism == run.mechanism
    assert mechanism() == mechanism()
    assert hash(mechanism()) == hash(mechanism())
    assert mechanism() != mechanism(noise_std=3.0)
    assert mechanism(noise_std=[1.0, 2.0]) != mechanism(noise_std=[1.0, 3.0])
    assert mechanism() != "mechanism"


@pytest.fixture
def saved(tmp_path):
    full().save(tmp_path / "run.safetensors")
    return tmp_path / "run.safetensors"


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"be a whole .*run.safetensors.*truncated"):
        GradNormLedger.load(saved)


def test_an_edited_file_is_refused(saved):
    content = saved.read_bytes()
    for place in (len(content) - 1, len(content) - 200):
        edited = bytearray(content)
        edited[place] ^= 1
        saved.write_bytes(bytes(edited))
        with pytest.raises(ValueError, match="does not match its checksum"):
            GradNormLedger.load(saved)
    for before, after in [(b'"observed"', b'"swept"   '), (b'"digits"', b'"digitz"')]:
        assert before in content
        saved.write_bytes(content.replace(before, after))
        with pytest.raises(ValueError, match="does not match its checksum"):
            GradNormLedger.load(saved)


def test_another_version_is_refused(saved):
    content = saved.read_bytes()
    assert b'"version":"3"' in content
    saved.write_bytes(content.replace(b'"version":"3"', b'"version":"4"'))
    with pytest.raises(ValueError, match="version 1 or 2 or 3, got version 4"):
        GradNormLedger.load(saved)


def test_a_foreign_file_is_refused(saved):
    saved.write_bytes(b"hello, this is no ledger at all")
    with pytest.raises(ValueError, match="truncated, or another kind of file"):
        GradNormLedger.load(saved)
    saved.unlink()  # a text is not replaced by arrays
    write_arrays(saved, FileKind("another.Kind", "another kind"), {"x": np.ones(3)}, {})
    with pytest.raises(
        ValueError, match=r"must contain a ledger of gradient norms, got another.Kind"
    ):
        GradNormLedger.load(saved)


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        GradNormLedger.load(tmp_path / "none.safetensors")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        ledger().save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize(
    ("bad", "remedy"),
    [
        (math.inf, "training diverged"),
        (1e39, "training diverged"),
        (-1.0, "Pass NaN for"),
        (-math.inf, "Pass NaN for"),
    ],
)
def test_norms_without_a_finite_loss_are_refused(bad, remedy):
    with pytest.raises(
        ValueError, match=rf"grad_norms must .*row 1, example 0.*{remedy}"
    ):
        ledger([[1.0, NAN], [bad, 1.0], [1.0, 1.0]])


@pytest.mark.parametrize(
    "steps", [[0, 0, 1], [2, 1, 3], [-1, 0, 1], [1, 2, 101], [0.5, 1, 2]]
)
def test_steps_must_increase_within_the_run(steps):
    with pytest.raises(ValueError, match=r"^steps must .*in \[0, 100\]"):
        ledger(steps=steps)


def test_shapes_must_agree():
    with pytest.raises(
        ValueError, match=r"grad_norms must .*got an array of shape \(3,\)"
    ):
        ledger([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="grad_norms must .*N = 2"):
        ledger(steps=[1, 2])
    with pytest.raises(ValueError, match=r"confidences must have shape \(3, 4\)"):
        ledger(confidences=np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"example_ids must have shape \(4,\)"):
        ledger(example_ids=[1, 2])
    with pytest.raises(ValueError, match=r"noise_std must have shape \(3,\)"):
        ledger().with_noise_std([1.0, 2.0])


def test_other_bad_facts_are_refused():
    with pytest.raises(ValueError, match="^source must .*got 'seen'"):
        ledger(source="seen")
    with pytest.raises(ValueError, match="^example_ids must .*duplicates"):
        ledger(example_ids=[1, 1, 2, 3])
    for name, value in [
        ("noise_std", -1.0),
        ("noise_std", NAN),
        ("noise_std", math.inf),
        ("sample_rate", 1.2),
        ("sample_rate", -0.1),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", NAN),
        ("num_steps", -1),
        ("num_steps", 2.5),
        ("sampling", "shuffled"),
        ("noise_std", [[1.0]]),
    ]:
        with pytest.raises(ValueError, match=f"{name} must"):
            mechanism(**{name: value})


@pytest.mark.parametrize("kind", ["directory", "pipe", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "it"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path = Path(os.devnull)
    with pytest.raises(ValueError, match="path must name a regular file, not a"):
        GradNormLedger.load(path)
