"""The sampler that finishes one source of data before the next one begins."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from opacus_pi import PrivacyEngine, Recorder
from opacus_pi.recording import Checkpoints, DeletableLast
from tests.integration.rewinding import CRITERION, SIZE, data, net

SOURCES = [range(0, 25), range(25, 37), range(37, SIZE)]


def batches_of(sampler):
    return [list(sampler) for _ in range(sampler.num_passes)]


def test_each_source_is_complete_before_the_next_begins():
    sampler = DeletableLast(SOURCES, 8, 3)
    passes = batches_of(sampler)
    assert [len(p) for p in passes] == [len(sampler)] * 3
    drawn = [batch for p in passes for batch in p]
    starts = [0, *sampler.boundaries(), len(drawn)]
    for source, first, last in zip(SOURCES, starts, starts[1:], strict=False):
        part = [i for batch in drawn[first:last] for i in batch]
        assert sorted(part) == sorted(list(source) * 3)
    assert all(len(set(batch)) == len(batch) <= 8 for batch in drawn)
    with pytest.raises(ValueError, match="number of epochs"):
        iter(sampler)


def test_the_generator_decides_the_order():
    orders = [
        batches_of(DeletableLast(SOURCES, 8, 2, generator=torch.Generator()))
        for _ in range(2)
    ]
    assert orders[0] == orders[1] != batches_of(DeletableLast(SOURCES, 8, 2))


@pytest.mark.parametrize(
    ("sources", "size", "message"),
    [
        ([[0, 1], [1, 2]], 2, "duplicates"),
        ([[0, 1], [3]], 2, "must be in"),
        ([[0, 1], []], 2, "contain an example"),
        ([[0, 1]], 0, "batch_size"),
    ],
)
def test_sources_that_are_not_the_data_set_are_refused(sources, size, message):
    with pytest.raises(ValueError, match=message):
        DeletableLast(sources, size)


def test_a_training_has_a_ledger_and_a_state_at_every_boundary(tmp_path):
    data_set, model = data(), net()
    sampler = DeletableLast(SOURCES, 8, 3)
    states = Checkpoints(tmp_path / "s", every=sampler.boundaries())
    engine = PrivacyEngine(accountant="rdp", recorder=Recorder(checkpoints=states))
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data_set, batch_sampler=sampler),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            CRITERION(model(x), y).backward()
            optimizer.step()
    assert engine.ledger.mechanism.max_participations == 3
    first = states.record.first_updates()
    assert states.steps == (0, *sampler.boundaries())
    for source, boundary in zip(SOURCES, states.steps, strict=True):
        assert first[list(source)].min() == boundary + 1
    assert np.bincount(states.record.indices).tolist() == [3] * SIZE
