"""A worker of the loader that is killed: torch's error, and a record of the rest."""

import os
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.private_training import NUM_EXAMPLES, Training, data

pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG turned off")


class Deadly(Dataset):
    """Kills the process that loads one of its examples, as long as a file is there."""

    def __init__(self, trap):
        self.tensors, self.trap = data().tensors, trap

    def __len__(self):
        return NUM_EXAMPLES

    def __getitem__(self, index):
        if index == 17 and self.trap.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return tuple(t[index] for t in self.tensors)


def test_a_worker_that_is_killed(tmp_path):
    trap = tmp_path / "trap"
    trap.write_text("")
    data_set = Deadly(trap)
    loader = DataLoader(data_set, batch_size=6, num_workers=1, prefetch_factor=1)
    training = Training(data_set=data_set, loader=loader, poisson_sampling=False)
    with pytest.raises(RuntimeError, match="worker.*(killed|exited)"):
        training.train(1)
    before = training.recorder.num_steps
    assert before < 3  # examples 12 to 17 were never delivered
    trap.unlink()
    training.train(1)  # a new pass has new workers
    ledger = training.engine.ledger
    assert ledger.mechanism.num_steps == before + 4
    assert not np.isnan(ledger.grad_norms).all(axis=0).any()
    assert training.engine.attribution == {
        "by_storage": 6 * before + NUM_EXAMPLES,
        "by_content": 0,
        "by_latest": 0,
        "unattributed": 0,
    }
    assert torch.isfinite(torch.from_numpy(training.engine.privacy_losses(2))).all()
