"""A directory of weights belongs to one run: no run writes into that of another."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from opacus_pi import Recorder
from opacus_pi.recording import gram_ledger
from opacus_pi.recording.weights import save_weights, saved_weights
from tests.private_training import Net, Training, data


def trained(directory, seed=0, num_epochs=2, **options):
    """A training with rows after every 4 updates, in a directory."""
    recorder = Recorder(**{"every": 1, "weights_dir": directory, **options})
    training = Training(recorder=recorder, batch_size=6, seed=seed)
    training.train(num_epochs)
    return training


def grams_of(directory, ledger):
    return gram_ledger(directory, Net(), nn.CrossEntropyLoss(), data(), [1, 2], ledger)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "swept", "criterion": nn.CrossEntropyLoss(), "every": [0, 4]}],
)
def test_a_second_run_is_refused_before_its_first_update(tmp_path, options):
    first = trained(tmp_path, **options)
    before = contents(tmp_path)
    assert before
    recorder = Recorder(**{"every": 1, "weights_dir": tmp_path, **options})
    second = Training(recorder=recorder, batch_size=6, seed=1)
    weights = {k: v.clone() for k, v in second.net.state_dict().items()}
    with pytest.raises(ValueError, match="weights_dir.*of another run"):
        second.train(1)
    assert contents(tmp_path) == before
    assert recorder.num_steps == 0
    for name, value in second.net.state_dict().items():
        assert torch.equal(value, weights[name])
    assert first.engine.ledger.num_rows


def test_a_recorder_that_is_used_without_an_optimizer_refuses_too(tmp_path):
    trained(tmp_path)
    before = contents(tmp_path)
    recorder = Recorder(every=1, weights_dir=tmp_path)
    recorder.begin(
        num_examples=2,
        sample_rate=1.0,
        sampling="fixed",
        data_set="toy",
        weights=lambda: {"a": torch.zeros(1)},
    )
    recorder.observe(torch.tensor([0]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="weights_dir.*another run"):
        recorder.step(noise_std=1.0, max_grad_norm=1.0)
    assert contents(tmp_path) == before


def test_a_ledger_refuses_weights_of_another_run_of_equal_length(tmp_path):
    ours = trained(tmp_path / "ours").engine.ledger
    theirs = trained(tmp_path / "theirs", seed=1).engine.ledger
    assert ours.steps.tolist() == theirs.steps.tolist() == [4, 8]
    assert grams_of(tmp_path / "theirs", theirs).steps.tolist() == [4, 8]
    with pytest.raises(ValueError, match="weights-00000004.* another run"):
        grams_of(tmp_path / "theirs", ours)
    one = "weights-00000008.safetensors"
    shutil.copy(tmp_path / "theirs" / one, tmp_path / "ours" / one)
    with pytest.raises(ValueError, match="weights-00000008.* another run"):
        grams_of(tmp_path / "ours", ours)


def test_missing_weights_are_refused_or_said(tmp_path):
    training = trained(tmp_path, num_epochs=3)
    ledger = training.engine.ledger
    files = saved_weights(tmp_path)
    last = files[12].read_bytes()
    files[12].unlink()
    with pytest.warns(UserWarning, match="no weights after 12 updates, the last row"):
        grams_of(tmp_path, ledger)
    files[12].write_bytes(last)
    files[4].unlink()
    with pytest.raises(ValueError, match=r"weights of every row.*after \[4\] updates"):
        grams_of(tmp_path, ledger)


def test_what_cannot_be_compared_is_said(tmp_path):
    ledger = trained(tmp_path / "w").engine.ledger
    with pytest.warns(UserWarning, match="not compared.*only some of the examples"):
        grams_of(tmp_path / "w", ledger.subset([1, 2]))
    for step in (4, 8):  # as earlier releases saved them
        save_weights(tmp_path / "old", step, Net().state_dict(), ledger.data_set)
    with pytest.warns(UserWarning, match="not compared.*an earlier release"):
        grams_of(tmp_path / "old", ledger)


def test_rows_with_unattributed_samples_are_compared_as_the_ledger_has_them(tmp_path):
    recorder = Recorder(every=1, weights_dir=tmp_path, unattributed="worst_case")
    training = Training(recorder=recorder, batch_size=6)
    for _ in range(2):
        recorder.note_unattributed()
        training.train(1)
    ledger = training.engine.ledger
    assert np.isfinite(ledger.grad_norms).all()
    assert grams_of(tmp_path, ledger).steps.tolist() == [4, 8]


def resumed(directory, state):
    """A training that goes on after a saved one, in a directory."""
    recorder = Recorder(every=1, weights_dir=directory)
    training = Training(recorder=recorder, batch_size=6, seed=9)
    recorder.load_state_dict(state)
    return training


def test_a_resumed_run_goes_on_with_its_directory(tmp_path):
    training = trained(tmp_path, num_epochs=2)
    state = training.recorder.state_dict()
    training.train(2)  # lost: the process was killed
    assert sorted(saved_weights(tmp_path)) == [4, 8, 12, 16]
    again = resumed(tmp_path, state)
    assert sorted(saved_weights(tmp_path)) == [4, 8, 12, 16]
    again.train(1)
    assert sorted(saved_weights(tmp_path)) == [4, 8, 12]
    assert grams_of(tmp_path, again.recorder.ledger).steps.tolist() == [4, 8, 12]


def test_a_resumed_run_refuses_another_directory(tmp_path):
    state = trained(tmp_path / "own").recorder.state_dict()
    trained(tmp_path / "other", seed=1, num_epochs=3)
    before = contents(tmp_path / "other")
    with pytest.raises(ValueError, match="weights-00000004.* another run"):
        resumed(tmp_path / "other", state).train(1)
    assert contents(tmp_path / "other") == before
    with pytest.raises(ValueError, match=r"no weights after \[4, 8\] updates"):
        resumed(tmp_path / "new", state).train(1)


def test_a_resumed_run_with_a_row_before_the_first_update(tmp_path):
    options = {"mode": "swept", "criterion": nn.CrossEntropyLoss(), "every": [0, 2, 6]}
    training = trained(tmp_path, num_epochs=1, **options)
    state = training.recorder.state_dict()
    first = saved_weights(tmp_path)[0].read_bytes()
    recorder = Recorder(weights_dir=tmp_path, **options)
    again = Training(recorder=recorder, batch_size=6, seed=7)  # other first weights
    recorder.load_state_dict(state)
    again.train(1)
    assert saved_weights(tmp_path)[0].read_bytes() == first
    assert sorted(saved_weights(tmp_path)) == [0, 2, 6]
