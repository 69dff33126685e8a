"""When rows are due, and what observed and swept rows hold."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opacus_pi.recording import Recorder
from tests.recording.reporting import INF, N, begun, equal, report, sweep_of

pytestmark = pytest.mark.filterwarnings("ignore:This run has no ledger")


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
    for _ in range(2):  # reading the ledger does not change the run
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
