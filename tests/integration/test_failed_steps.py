"""Steps of the inner optimizer that raise an error, after which the loop goes on."""

from itertools import chain, islice

import numpy as np
import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine, Recorder

FAILS = 3  # the step that raises


class FullDisk(Exception):
    """An error within a step."""


class Failing(torch.optim.SGD):
    num_steps = 0

    def step(self, closure=None):
        self.num_steps += 1
        if self.num_steps == FAILS:
            raise FullDisk
        return super().step(closure)


class Loop:
    """A loop that goes on after a failed step, and notes the examples of each batch."""

    def __init__(self, num_examples=60, batch_size=6):
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(num_examples, 4, generator=generator)
        data = TensorDataset(self.x, torch.arange(num_examples) % 3)
        self.given = {
            "module": self.net,
            "optimizer": Failing(self.net.parameters(), lr=0.1),
            "data_loader": DataLoader(data, batch_size=batch_size, shuffle=True),
        }
        self.batches = []

    def prepared(self, **options):
        self.engine = PrivacyEngine(recorder=Recorder(every=tuple(range(1, 20))))
        prepared = self.engine.make_private(
            **self.given, noise_multiplier=1.0, max_grad_norm=1.0, **options
        )
        self.model, self.optimizer, *middle, self.loader = prepared
        self.criterion = middle[0] if middle else nn.CrossEntropyLoss()
        return self

    def train(self, num_batches=6):
        epochs = chain.from_iterable(self.loader for _ in range(num_batches))
        for x, y in islice(epochs, num_batches):
            found = [int((self.x == row).all(1).nonzero()) for row in x]
            self.batches.append(sorted(found))
            try:
                self.optimizer.zero_grad()
                self.criterion(self.model(x), y).backward()
                self.optimizer.step()
            except FullDisk:
                continue
        return self

    def rows(self):
        norms = self.engine.ledger.grad_norms
        return [np.flatnonzero(~np.isnan(row)).tolist() for row in norms]


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_a_failed_update_has_a_row_of_its_own(mode, poisson_sampling):
    options = {"grad_sample_mode": mode, "poisson_sampling": poisson_sampling}
    if mode == "ghost":
        options["criterion"] = nn.CrossEntropyLoss()
    loop = Loop().prepared(**options).train()
    assert loop.rows() == loop.batches
    counted = sum(steps for *_, steps in loop.engine.accountant.history)
    assert loop.engine.ledger.mechanism.num_steps == counted == 6


def test_batches_that_share_an_example_are_two_updates():
    loop = Loop(num_examples=12).prepared().train()
    shared = set(loop.batches[FAILS - 1]) & set(loop.batches[FAILS])
    assert shared
    links = {link.name: link.state for link in loop.engine.ledger.custody.links}
    assert links["rows"] == links["draw"] == "checked"


def test_the_weights_are_those_of_opacus():
    ours = Loop().prepared().train()
    theirs = Loop()
    theirs.engine = opacus.PrivacyEngine()
    theirs.model, theirs.optimizer, theirs.loader = theirs.engine.make_private(
        **theirs.given, noise_multiplier=1.0, max_grad_norm=1.0
    )
    theirs.criterion = nn.CrossEntropyLoss()
    theirs.train()
    assert torch.equal(ours.net.weight, theirs.net.weight)
    assert ours.batches == theirs.batches
