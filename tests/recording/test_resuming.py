"""Recorders that are saved, resumed and begun again."""

import io

import pytest
import torch

from opacus_pi.recording import AccountingError, Recorder
from tests.recording.reporting import begun, equal, random_run, report, sweep_of

pytestmark = pytest.mark.filterwarnings("ignore:This run has no ledger")


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
    with pytest.raises(
        ValueError, match=f"saved run's {name} must equal that of the run that"
    ):
        begun(early, **change)
    late = begun(Recorder(), **change)
    with pytest.raises(
        ValueError, match=f"saved run's {name} must equal that of the run that"
    ):
        late.load_state_dict(state)
    report(late)  # nothing was changed
    assert late.num_steps == 1


def test_another_version_or_mode_is_not_resumed():
    state = begun().state_dict()
    with pytest.raises(
        ValueError, match=r"run's version must be 1, got 7\. Resume with"
    ):
        Recorder().load_state_dict({**state, "version": 7})
    with pytest.raises(
        ValueError, match="mode of the saved run must equal this .*, got 'observed'"
    ):
        Recorder("swept").load_state_dict(state)


def test_a_refusal_survives_resuming():
    recorder = begun()
    recorder.refuse("the loader was rebuilt")
    other = Recorder()
    other.load_state_dict(recorder.state_dict())
    with pytest.raises(AccountingError, match="the loader was rebuilt"):
        _ = other.ledger


def state_with_counts():
    """The state after one update under fixed sampling, with examples 0 and 1."""
    recorder = Recorder()
    recorder.begin(num_examples=4, sample_rate=0.5, sampling="fixed", data_set="toy")
    recorder.observe(torch.tensor([0, 1]), torch.ones(2))
    recorder.step(noise_std=1.0, max_grad_norm=1.0)
    return recorder.state_dict()


def test_counts_of_participations_are_saved_whole():
    state = state_with_counts()
    again = Recorder()
    again.load_state_dict(state)
    assert again.ledger.participations.tolist() == [[1, 1, 0, 0]]
    for name in ("participations", "unmerged_participations", "unknown_updates"):
        part = {key: value for key, value in state.items() if key != name}
        with pytest.raises(ValueError, match="participations"):
            Recorder().load_state_dict(part)
    negative = {**state, "open_participations": torch.full((4,), -1, dtype=torch.int32)}
    with pytest.raises(ValueError, match="open_participations"):
        Recorder().load_state_dict(negative)


def test_states_of_earlier_releases_have_no_counts():
    state = state_with_counts()
    old = {k: v for k, v in state.items() if "participations" not in k}
    old.pop("unknown_updates")
    again = Recorder()
    again.load_state_dict(old)
    assert again.ledger.participations is None
    assert again.ledger.mechanism.max_participations is None
