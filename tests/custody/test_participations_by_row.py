"""Participations belong to the row that ends their updates, in every kind of run.

The oracle is the loop itself: it keeps which examples each update used, by a number
that every example carries, and sums them between the rows.
"""

import io
import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine, Recorder
from opacus_pi.accounting import privacy_losses
from opacus_pi.recording import Checkpoints

NUM, BATCH = 24, 6
CRITERION = nn.CrossEntropyLoss()
KINDS = ["monitored", "monitored with noise", "private, swept", "private, observed"]


class CountedRun:
    """A run under fixed sampling, and the numbers of the examples of each update.

    Args:
        kind: One of ``KINDS``.
        every: The rows of the ledger.
        options: Of the recorder.
    """

    def __init__(self, kind, every, **options):
        torch.manual_seed(0)
        numbers, x = torch.arange(NUM), torch.randn(NUM, 4)
        data = TensorDataset(torch.cat([x, numbers[:, None]], 1), numbers % 3)
        self.net = nn.Linear(5, 3)
        if kind != "private, observed":
            options |= {"mode": "swept", "criterion": CRITERION}
        recorder = Recorder(every=every, **options)
        self.engine = PrivacyEngine(accountant="rdp", recorder=recorder)
        prepare, changes = self.engine.make_monitored, {"criterion": CRITERION}
        changes["noise_std"] = 0.0 if kind == "monitored" else 0.1
        if kind.startswith("private"):
            prepare = self.engine.make_private
            changes = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
        self.model, self.optimizer, self.loader = prepare(
            module=self.net,
            optimizer=torch.optim.SGD(self.net.parameters(), lr=1e-3),
            data_loader=DataLoader(data, batch_size=BATCH, shuffle=True),
            poisson_sampling=False,
            **changes,
        )
        self.updates = []

    def train(self, num_updates, num_batches=1):
        """Make updates on the gradients of so many batches each."""
        batches = itertools.chain.from_iterable(iter(self.loader) for _ in range(100))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(num_updates):
                self.optimizer.zero_grad()
                used = [next(batches) for _ in range(num_batches)]
                for x, y in used:
                    (CRITERION(self.model(x), y) / num_batches).backward()
                self.optimizer.step()
                self.updates.append(np.concatenate([x[:, -1] for x, _ in used]))
        return self

    def counts(self, steps):
        """How often each example was used between the rows; the last has the rest."""
        each = [np.bincount(u.astype(int), minlength=NUM) for u in self.updates]
        ends = [*steps[:-1], len(each)]
        spans = itertools.pairwise([0, *ends])
        return [sum(each[a:b], np.zeros(NUM, int)) for a, b in spans]

    def assert_counted(self):
        ledger = self.engine.ledger
        wanted = self.counts(ledger.steps.tolist())
        np.testing.assert_array_equal(ledger.participations, wanted)


@pytest.mark.parametrize("every", [range(1, 30), [1, 2, 10], 0.5, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_the_participations_of_its_own_updates(kind, every):
    run = CountedRun(kind, every).train(11)
    run.assert_counted()
    run.train(2).assert_counted()  # after the ledger was read


def test_a_row_before_the_first_update_has_none():
    run = CountedRun("monitored", range(30)).train(6)
    assert run.engine.ledger.steps[0] == 0
    assert not run.engine.ledger.participations[0].any()
    run.assert_counted()


@pytest.mark.parametrize("kind", ["monitored", "private, swept", "private, observed"])
def test_updates_on_accumulated_gradients_are_those_of_their_row(kind):
    CountedRun(kind, [1, 3, 4]).train(6, num_batches=2).assert_counted()


@pytest.mark.parametrize("num_before", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_counts_in_the_same_rows(kind, num_before):
    first = CountedRun(kind, [1, 3, 4, 7]).train(num_before)
    file = io.BytesIO()
    parts = {"module": first.model, "optimizer": first.optimizer}
    first.engine.save_checkpoint(path=file, **parts)
    file.seek(0)
    second = CountedRun(kind, [1, 3, 4, 7])
    parts = {"module": second.model, "optimizer": second.optimizer}
    second.engine.load_checkpoint(path=file, restore_rng=True, **parts)
    second.updates = list(first.updates)
    second.train(5).assert_counted()


def test_the_loss_of_a_monitored_run_is_that_of_its_own_rows():
    run = CountedRun("monitored with noise", range(1, 30)).train(9)
    ledger = run.engine.ledger
    ratios = ledger.grad_norms.astype(float) / ledger.mechanism.noise_std
    wanted = (np.array(run.counts(ledger.steps.tolist())) * 4 * ratios**2).sum(axis=0)
    losses = privacy_losses(ledger, 8, hoelder_p=np.inf)
    np.testing.assert_allclose(losses, wanted, rtol=1e-6)


def test_a_saved_state_comes_with_the_participations_of_its_last_update(tmp_path):
    states = Checkpoints(tmp_path / "states", every=2)
    run = CountedRun("monitored", 1, checkpoints=states).train(4)
    record = Checkpoints(tmp_path / "states").record  # as after a kill: no flush
    assert record.num_steps == 4
    for number, used in enumerate(run.updates, start=1):
        assert sorted(record.batch(number)) == sorted(used.astype(int))
    assert not record.num_unattributed.any()


def test_a_state_of_the_last_update_comes_with_the_name_of_the_weights(tmp_path):
    states = Checkpoints(tmp_path / "states", every=2)
    run = CountedRun("monitored", 1, checkpoints=states).train(4)
    wanted = run.engine.ledger.weights
    assert wanted.startswith("sha256:") and states.record.weights == wanted


def test_updates_of_unknown_batches_are_those_of_their_row(tmp_path):
    states = Checkpoints(tmp_path / "states", every=2)
    run = CountedRun("monitored", [1, 2, 4], checkpoints=states).train(1)
    x, y = torch.randn(4, 5), torch.arange(4) % 3  # not of the loader
    run.optimizer.zero_grad()
    CRITERION(run.model(x), y).backward()
    run.optimizer.step()
    record = Checkpoints(tmp_path / "states").record
    assert np.flatnonzero(record.num_unattributed).tolist() == [1]
