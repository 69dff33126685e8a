"""The recorder: rows at the promised steps, units, resuming, refusals."""

import io
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opacus_pi.recorder import AccountingError, Recorder

N = 6
INF = float("inf")
pytestmark = pytest.mark.filterwarnings("ignore:This run has no ledger")


def begun(recorder=None, **changes):
    recorder = recorder or Recorder()
    facts = {"num_examples": N, "sample_rate": 0.5, "sampling": "poisson"}
    recorder.begin(**{**facts, "data_set": "toy", **changes})
    return recorder


def report(recorder, observed=(), **settings):
    if observed:
        indices, norms = zip(*observed, strict=True)
        recorder.observe(torch.tensor(indices), torch.tensor(norms))
    recorder.step(**{"noise_std": 2.0, "max_grad_norm": 1.0, **settings})


def random_run(recorder, num_steps, seed=0, start=0):
    """Reports that depend on the update alone, so that a part can be replayed."""
    for step in range(start, num_steps):
        rng = np.random.default_rng([seed, step])
        chosen = rng.permutation(N)[: rng.integers(0, N)]
        norms = rng.exponential(size=len(chosen))
        report(
            recorder,
            list(zip(chosen.tolist(), norms.tolist(), strict=True)),
            noise_std=2.0 + 0.1 * (step % 3),
        )


def sweep_of(counter):
    """A sweep whose numbers say how often it was called."""

    def sweep():
        counter.append(None)
        values = torch.arange(N, dtype=torch.float64) + len(counter)
        return SimpleNamespace(
            grad_norms=values,
            confidences=values / 100,
            errors=values / 10,
            correct=values > 3,
        )

    return sweep


def equal(a, b):
    assert a.mechanism == b.mechanism
    for name in ("steps", "grad_norms", "confidences", "errors", "correct"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None and y is None) or np.array_equal(x, y, equal_nan=True), name
    assert (a.source, a.data_set) == (b.source, b.data_set)


# ------------------------------------------------------------------ when rows are due


@pytest.mark.parametrize("every", [1.0, 0.3, 2.5, 0.01, 7])
@pytest.mark.parametrize("updates", [1, 3, 49, 98, 103])  # of an epoch
def test_rows_where_the_count_crosses_a_multiple(every, updates):
    recorder = begun(
        Recorder("swept", every), sample_rate=1 / updates, sweep=sweep_of([])
    )
    num_steps = 3 * updates + 5
    for _ in range(num_steps):
        report(recorder)
    period = Fraction(str(every)) * updates
    crossing = [t for t in range(1, num_steps + 1) if t // period > (t - 1) // period]
    got = recorder.ledger.steps.tolist() if crossing else []
    assert got == crossing


@pytest.mark.parametrize(
    ("rows", "steps"), [(35, 150), (35, 35), (1, 7), (4, 10), (3, 8)]
)
def test_evenly_spaced_rows(rows, steps):
    recorder = Recorder.evenly_spaced(rows, num_steps=steps, mode="swept")
    begun(recorder, sweep=sweep_of([]))
    for _ in range(steps):
        report(recorder)
    wanted = [round(steps * (i + 1) / rows) for i in range(rows)]
    assert recorder.ledger.steps.tolist() == wanted
    assert wanted[-1] == steps and len(set(wanted)) == rows


def test_rows_after_named_updates():
    recorder = begun(Recorder(every=[1, 4]))
    for _ in range(4):
        report(recorder)
    assert recorder.ledger.steps.tolist() == [1, 4]


def test_a_row_lost_to_an_interrupt_is_written_at_the_next_update():
    answers = iter([KeyboardInterrupt, *[sweep_of([])] * 5])

    def sweep():
        answer = next(answers)
        if answer is KeyboardInterrupt:
            raise KeyboardInterrupt
        return answer()

    recorder = begun(Recorder("swept", every=[2, 5]), sweep=sweep)
    report(recorder)
    with pytest.raises(KeyboardInterrupt):
        report(recorder, noise_std=1.0)
    report(recorder)
    report(recorder)
    report(recorder)
    assert recorder.ledger.steps.tolist() == [3, 5]
    assert recorder.ledger.mechanism.noise_std.tolist() == [1.0, 2.0]


# ------------------------------------------------------------------------- observed


def test_latest_observation_since_the_row_before():
    recorder = begun(Recorder(every=[2, 4]))
    report(recorder, [(0, 1.0), (1, 2.0)])
    report(recorder, [(1, 3.0)])
    report(recorder, [(2, 4.0)])
    report(recorder)
    wanted = [[1, 3, np.nan, *[np.nan] * 3], [np.nan, np.nan, 4, *[np.nan] * 3]]
    assert np.array_equal(recorder.ledger.grad_norms, wanted, equal_nan=True)
    assert recorder.ledger.source == "observed"


def test_of_one_example_named_twice_the_later_stays():
    recorder = begun()
    report(recorder, [(3, 1.0), (3, 2.0), (0, 5.0), (3, 0.5)])
    assert recorder.ledger.grad_norms[0, 3] == 0.5


def test_nothing_observed_after_the_last_row_is_lost():
    recorder = begun(Recorder(every=[2]))
    report(recorder, [(0, 1.0)])
    report(recorder)
    report(recorder, [(5, 9.0)], noise_std=1.0)
    for _ in range(2):  # asking does not change the record
        ledger = recorder.ledger
        assert ledger.steps.tolist() == [2, 3]
        assert ledger.grad_norms[1, 5] == 9.0
        assert ledger.mechanism.num_steps == 3
        assert ledger.mechanism.noise_std.tolist() == [2.0, 1.0]
    report(recorder, [(4, 8.0)])
    assert recorder.ledger.steps.tolist() == [2, 4]
    assert recorder.ledger.grad_norms[1, 4:].tolist() == [8.0, 9.0]


def test_a_ledger_is_a_snapshot():
    recorder = begun()
    report(recorder, [(0, 1.0)])
    before = recorder.ledger
    report(recorder, [(0, 7.0)])
    assert before.grad_norms[0, 0] == 1.0 and before.mechanism.num_steps == 1


def test_any_float_type_and_norms_with_history():
    recorder = begun()
    norms = torch.tensor([0.5, 0.25], dtype=torch.float16, requires_grad=True)
    recorder.observe(torch.tensor([1, 0]), norms)
    report(recorder)
    assert recorder.ledger.grad_norms[0, :2].tolist() == [0.25, 0.5]


def test_reports_of_an_accelerator_are_fetched_late_and_in_order(monkeypatch):
    """A tensor subclass stands in for an accelerator's tensors."""

    class Far(torch.Tensor):
        @property
        def device(self):
            return torch.device("meta") if type(self) is Far else super().device

    here, there = begun(Recorder(every=[3])), begun(Recorder(every=[3]))
    fetched = []
    run = there._begun()
    keep = run.observe
    monkeypatch.setattr(
        run, "observe", lambda *a, **k: (fetched.append(len(a[0])), keep(*a, **k))
    )
    for step in range(4):
        indices = torch.tensor([step % 3, 3])
        norms = torch.tensor([1.0 + step, 10.0 + step])
        here.observe(indices, norms)
        there.observe(indices, norms.as_subclass(Far))
        report(here)
        report(there)
    assert fetched == [6]
    equal(here.ledger, there.ledger)
    assert fetched == [6, 2]


# ---------------------------------------------------------------------------- swept


def test_swept_rows_hold_all_measurements():
    calls = []
    recorder = begun(Recorder("swept", every=[2, 3]), sweep=sweep_of(calls))
    for _ in range(3):
        recorder.observe(torch.tensor([0]), torch.tensor([99.0]))  # measured for itself
        report(recorder, max_grad_norm=INF)
    ledger = recorder.ledger
    assert len(calls) == 2 and ledger.source == "swept"
    wanted = np.arange(N, dtype=np.float32) + np.array([[1], [2]], dtype=np.float32)
    assert np.array_equal(ledger.grad_norms, wanted)
    assert np.array_equal(ledger.confidences, wanted / np.float32(100))
    assert np.array_equal(ledger.errors, wanted / np.float32(10))
    assert np.array_equal(ledger.correct, wanted > 3)


def test_updates_after_the_last_swept_row_use_that_row():
    recorder = begun(Recorder("swept", every=[1, 2]), sweep=sweep_of([]))
    report(recorder)
    report(recorder)
    report(recorder, noise_std=1.0, max_grad_norm=0.5)
    ledger = recorder.ledger
    assert ledger.steps.tolist() == [1, 2] and ledger.mechanism.num_steps == 3
    assert ledger.mechanism.noise_std.tolist() == [2.0, 1.0]  # the least of both
    assert ledger.mechanism.max_grad_norm == 1.0  # the largest of both


# ------------------------------------------------------------------------ schedules


def test_constant_settings_are_numbers():
    recorder = begun(Recorder(every=[1, 2]), sampling="fixed")
    report(recorder)
    report(recorder)
    mechanism = recorder.ledger.mechanism
    assert (mechanism.noise_std, mechanism.max_grad_norm) == (2.0, 1.0)
    assert (mechanism.sample_rate, mechanism.sampling) == (0.5, "fixed")


def test_scheduled_settings_are_the_intervals_and_err_on_the_safe_side():
    recorder = begun(Recorder(every=[2, 4]))
    report(recorder, noise_std=3.0, max_grad_norm=1.0)
    report(recorder, noise_std=2.5, max_grad_norm=0.5, sample_rate=0.75)
    report(recorder, noise_std=1.0, max_grad_norm=0.25, sample_rate=0.125)
    report(recorder, noise_std=1.5, max_grad_norm=0.25, sample_rate=0.25)
    mechanism = recorder.ledger.mechanism
    assert mechanism.noise_std.tolist() == [2.5, 1.0]
    assert mechanism.max_grad_norm.tolist() == [1.0, 0.25]
    assert mechanism.sample_rate.tolist() == [0.75, 0.25]


# ---------------------------------------------------------------- resuming and runs


@pytest.mark.parametrize("stop", range(0, 13))
@pytest.mark.parametrize("begin_first", [True, False])
def test_a_resumed_run_leaves_the_same_ledger(stop, begin_first):
    whole = begun(Recorder(every=2))
    random_run(whole, 13)
    first = begun(Recorder(every=2))
    random_run(first, stop)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second = Recorder(every=2)
    if begin_first:
        begun(second)
        second.load_state_dict(state)
    else:
        second.load_state_dict(state)
        begun(second)
    assert second.num_steps == stop
    random_run(second, 13, start=stop)
    equal(whole.ledger, second.ledger)


def test_a_resumed_swept_run_leaves_the_same_ledger():
    calls = []
    recorder = begun(Recorder("swept", every=[2, 3, 5]), sweep=sweep_of(calls))
    for _ in range(4):
        report(recorder)
    state = recorder.state_dict()
    for value in state.values():
        assert isinstance(value, torch.Tensor | int | float | str)
    report(recorder)
    calls.pop()
    resumed = Recorder("swept", every=[2, 3, 5])
    resumed.load_state_dict(state)
    begun(resumed, sweep=sweep_of(calls))
    report(resumed)
    equal(recorder.ledger, resumed.ledger)


def test_a_state_is_not_changed_by_going_on():
    recorder = begun()
    report(recorder, [(0, 1.0)])
    state = recorder.state_dict()
    report(recorder, [(0, 5.0)])
    assert state["num_steps"] == 1 and state["observed"][0] == 1.0


def test_a_second_begin_starts_afresh():
    recorder = begun()
    report(recorder, [(0, 1.0)])
    recorder.refuse("for a reason")
    begun(recorder, num_examples=3)
    report(recorder)
    assert recorder.num_steps == 1 and recorder.ledger.num_examples == 3


def test_a_resumed_run_that_has_gone_on_is_no_longer_just_loaded():
    recorder = begun()
    report(recorder)
    state = recorder.state_dict()
    recorder.load_state_dict(state)
    report(recorder)
    begun(recorder, num_examples=3)
    assert recorder.num_steps == 0


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"num_examples": 7}, "num_examples"),
        ({"data_set": "another"}, "data_set"),
        ({"sampling": "fixed"}, "sampling"),
        ({"sample_rate": 0.25}, "sample_rate"),
    ],
)
def test_another_run_is_not_resumed(change, name):
    state = begun().state_dict()
    early = Recorder()
    early.load_state_dict(state)
    with pytest.raises(ValueError, match=f"resumed record's {name}=.*this run's"):
        begun(early, **change)
    late = begun(Recorder(), **change)
    with pytest.raises(ValueError, match=f"resumed record's {name}=.*this run's"):
        late.load_state_dict(state)
    report(late)  # nothing was changed
    assert late.num_steps == 1


def test_another_version_or_mode_is_not_resumed():
    state = begun().state_dict()
    with pytest.raises(ValueError, match=r"record's version=7 to be 1\. Resume with"):
        Recorder().load_state_dict({**state, "version": 7})
    with pytest.raises(ValueError, match="record's mode='observed' to be this"):
        Recorder("swept").load_state_dict(state)


def test_a_refusal_survives_resuming():
    recorder = begun()
    recorder.refuse("the loader was rebuilt")
    other = Recorder()
    other.load_state_dict(recorder.state_dict())
    with pytest.raises(AccountingError, match="the loader was rebuilt"):
        _ = other.ledger


# ---------------------------------------------------------------------------- weights


def test_weights_are_kept_at_every_row(tmp_path):
    layer = torch.nn.Linear(2, 2)
    tied = {"a": layer.weight, "b": layer.weight, "extra": {"no": "tensor"}}
    directory = tmp_path / "weights"
    recorder = begun(
        Recorder(every=[1, 3], weights_dir=directory), weights=lambda: tied
    )
    seen = []
    for _ in range(3):
        with torch.no_grad():
            layer.weight += 1
        seen.append(layer.weight.detach().clone())
        report(recorder)
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["weights-00000001.safetensors", "weights-00000003.safetensors"]
    for name, wanted in zip(names, (seen[0], seen[2]), strict=True):
        kept = load_file(directory / name)
        assert set(kept) == {"a", "b"}
        assert torch.equal(kept["a"], wanted) and torch.equal(kept["b"], wanted)


# --------------------------------------------------------------------------- refusals


def test_a_refusal_keeps_its_first_reason_and_stops_sweeping():
    calls = []
    recorder = begun(Recorder("swept", every=[1, 2]), sweep=sweep_of(calls))
    report(recorder)
    with pytest.warns(UserWarning, match="no ledger any more. first") as warned:
        recorder.refuse("first")
        recorder.refuse("second")
    assert len(warned) == 1
    report(recorder)
    assert recorder.num_steps == 2 and len(calls) == 1
    with pytest.raises(AccountingError, match="^first$"):
        _ = recorder.ledger


def test_a_strict_recorder_raises_at_once():
    recorder = begun(Recorder(strict=True))
    with pytest.raises(AccountingError, match="^why$"):
        recorder.refuse("why")


@pytest.mark.parametrize("norm", [math.nan, INF, 1e300])
def test_a_diverged_run_trains_on_without_a_ledger(norm):
    recorder = begun()
    recorder.observe(torch.tensor([0]), torch.tensor([norm], dtype=torch.float64))
    report(recorder)
    report(recorder, [(0, 1.0)])
    with pytest.raises(AccountingError, match="not finite by update 1: .*diverged"):
        _ = recorder.ledger


def test_a_diverged_sweep_is_refused():
    bad = SimpleNamespace(grad_norms=torch.full((N,), math.nan))
    recorder = begun(Recorder("swept", every=[1]), sweep=lambda: bad)
    report(recorder)
    with pytest.raises(AccountingError, match="not finite by update 1"):
        _ = recorder.ledger


def test_nothing_recorded_yet():
    with pytest.raises(AccountingError, match="Call make_private, make_monitored or"):
        _ = Recorder().ledger
    with pytest.raises(AccountingError, match="No row has been recorded after 0"):
        _ = begun().ledger
    recorder = begun(Recorder("swept"), sweep=sweep_of([]))
    report(recorder)
    with pytest.raises(AccountingError, match="after 1 updates. Train on, or record"):
        _ = recorder.ledger


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Recorder("sweeping"), "mode='sweeping'"),
        (lambda: Recorder(every=0), "every=0.0 above 0"),
        (lambda: Recorder(every=INF), "every=inf in"),
        (lambda: Recorder(every=[]), "every=.* increasing"),
        (lambda: Recorder(every=[0, 1]), "every=.* above 0 where norms are observed"),
        (lambda: Recorder("swept", every=[-1, 1]), "every=.* increasing"),
        (lambda: Recorder(every=[2, 2]), "every=.* increasing"),
        (lambda: Recorder(every=[1.5]), "every=.* whole numbers"),
        (lambda: Recorder(batch_size=0), "batch_size=0.0 above 0"),
        (lambda: Recorder.evenly_spaced(0, num_steps=9), "num_checkpoints=0.0 in"),
        (lambda: Recorder.evenly_spaced(10, num_steps=9), "num_checkpoints=10.0 in"),
        (lambda: begun(sample_rate=1.5), "sample_rate=1.5 in"),
        (lambda: begun(sample_rate=0.0), "sample_rate=0.0 above 0"),
        (lambda: begun(num_examples=0), "num_examples=0.0 above 0"),
        (lambda: begun(sampling="shuffled"), "sampling='shuffled'"),
        (lambda: begun(Recorder("swept")), "sweep=None.*criterion"),
        (lambda: begun(Recorder(weights_dir="w")), "weights=None.*state dict"),
    ],
)
def test_bad_options(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_bad_reports():
    recorder = begun()
    for index in (-1, N):
        with pytest.raises(ValueError, match=rf"indices=\[{index}\] in \[0, {N}\)"):
            recorder.observe(torch.tensor([index]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"grad_norms=.*shape \(2,\).*shape \(1,\)"):
        recorder.observe(torch.tensor([0]), torch.tensor([1.0, 2.0]))
    short = SimpleNamespace(grad_norms=torch.zeros(N - 1))
    recorder = begun(Recorder("swept", every=[1]), sweep=lambda: short)
    with pytest.raises(ValueError, match=r"sweep\(\).grad_norms=.*shape \(6,\)"):
        report(recorder)
