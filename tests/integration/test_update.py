"""The update under way: when an example counts as drawn twice."""

import numpy as np
import pytest
import torch
from torch import nn

from opacus_pi import GradSampleModule
from opacus_pi.attribution import Tracker
from opacus_pi.custody import Chain
from opacus_pi.custody.draws import DrawLink
from opacus_pi.integration.update import UpdateUnderWay
from opacus_pi.recording import AccountingError, Recorder

BATCHES = {  # the batches of one update, each as delivered or with indices looked up
    "one batch as it was delivered": ([[0, 1, 2]], False),
    "two batches without a common example": ([[0, 1], [2, 3]], False),
    "two batches with a common example": ([[0, 1], [1, 2]], True),
    "indices that repeat": ([np.array([3, 3])], True),
    "unattributed samples do not repeat": ([np.array([-1, 2, -1])], False),
    "a batch, then indices that it contains": ([[0, 1], np.array([1])], True),
    "no sample": ([[], np.array([], np.int64)], False),
}


class Settings:
    """What an update reads from an optimizer."""

    noise_multiplier, max_grad_norm, accumulated_iterations = 2.0, 1.0, 1
    generator, secure_mode = None, False
    original_optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)


def update():
    recorder, tracker = Recorder(), Tracker()
    chain, hooks = Chain(), GradSampleModule(nn.Linear(2, 1))
    draws = DrawLink(chain, is_poisson=False, num_examples=4)
    facts = {"num_examples": 4, "sample_rate": 0.5, "sampling": "fixed"}
    recorder.begin(**facts, data_set="toy", chain=chain)
    return UpdateUnderWay(recorder, tracker, hooks, 0.5, chain, draws)


def add(under_way, indices):
    norms = torch.ones(len(indices))
    if isinstance(indices, np.ndarray):
        under_way.add_samples(indices, norms)
    elif indices:
        x = torch.randn(len(indices), 2)
        under_way.tracker.delivered(indices, x)
        under_way.tracker.mark_backward(under_way.tracker.bind([x]))
        under_way.add_batch(norms, [len(indices)])


@pytest.mark.filterwarnings("ignore:This run has no ledger")
@pytest.mark.parametrize("case", BATCHES)
def test_an_example_enters_an_update_once(case):
    batches, is_refused = BATCHES[case]
    under_way = update()
    for indices in batches:
        add(under_way, indices)
    under_way.noise_was_drawn(Settings())
    under_way.finish()
    if is_refused:
        with pytest.raises(AccountingError, match="entered one update more than once"):
            _ = under_way.recorder.ledger
    else:
        known = {i for batch in batches for i in batch if i >= 0}
        observed = np.flatnonzero(under_way.recorder.ledger.grad_norms[0] == 1)
        assert set(observed) == known


@pytest.mark.filterwarnings("ignore:This run has no ledger")
def test_the_next_update_starts_without_examples():
    under_way = update()
    for _ in range(2):
        add(under_way, [0, 1])
        under_way.noise_was_drawn(Settings())
        under_way.finish()
    ledger = under_way.recorder.ledger
    assert ledger.mechanism.num_steps == 2 and ledger.mechanism.noise_std == 2.0
