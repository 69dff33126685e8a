"""Records that earlier releases saved are resumed; norms that only rank are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from opacus_pi.recording import Recorder
from tests.recording.reporting import N, begun, report

FILE = Path(__file__).parent / "files" / "recorder_version_1.pt"
NAN = np.nan


def saved():
    return torch.load(FILE, weights_only=True)


@pytest.mark.parametrize("without", [(), ("norms",), ("norms", "weights")])
def test_a_saved_record_is_read(without):
    state = {name: value for name, value in saved().items() if name not in without}
    recorder = Recorder()
    recorder.load_state_dict(state)
    ledger = recorder.ledger
    np.testing.assert_array_equal(
        ledger.grad_norms, [[0.5, 2.0, 0.5, 2.0], [NAN, 0.5, 2.0, NAN]]
    )
    assert ledger.steps.tolist() == [2, 3] and ledger.mechanism.num_steps == 3


@pytest.mark.parametrize("mark", ["for ranking", "exact", True])
def test_norms_that_only_rank_are_refused(mark):
    with pytest.raises(ValueError, match="norms must be exact.*bfloat16.*run again"):
        Recorder().load_state_dict({**saved(), "norms": mark})


def test_a_new_state_has_no_mark():
    recorder = begun(
        Recorder("swept", every=[1], criterion=torch.nn.MSELoss()), sweep=swept
    )
    report(recorder)
    assert "norms" not in recorder.state_dict()


def swept():
    return type("Sweep", (), {"grad_norms": torch.ones(N)})
