"""Streams of a random generator that come again at another place."""

import pytest
import torch

from opacus_pi.custody.seen_blocks import SeenBlocks
from tests.private_training import Training

PASSED = "went back to a part of its stream"


def noise(training):
    links = training.engine.ledger.custody.links
    return next(link for link in links if link.name == "noise")


def test_one_stream_never_goes_back():
    generator, seen = torch.Generator().manual_seed(0), SeenBlocks()
    for size in (0, 1, 5, 622, 623, 624, 625, 3, 5000, 17) * 30:
        torch.rand(size, generator=generator)
        assert not seen.goes_back(generator.get_state().numpy().tobytes())


@pytest.mark.parametrize("shift", [1, 16, 300])
@pytest.mark.parametrize("size", [50, 5000])
def test_a_shifted_stream_is_found(shift, size):
    generator, seen = torch.Generator(), SeenBlocks()
    found = []
    for epoch in range(2):
        generator.manual_seed(0)
        torch.rand(1 + epoch * shift, generator=generator)
        for _ in range(10):
            found.append(seen.goes_back(generator.get_state().numpy().tobytes()))
            torch.rand(size, generator=generator)
    assert not any(found[:10])
    assert found[10]


def test_other_states_are_left_out():
    assert not SeenBlocks().goes_back(bytes(16))


def test_a_seeded_validation_that_draws_more_each_time():
    training = Training(poisson_sampling=False, shuffle=False)
    with pytest.warns(UserWarning, match=PASSED):
        for epoch in range(3):
            training.train(1)
            torch.manual_seed(0)
            torch.randn(1 + epoch, 16)
    assert noise(training).state == "unchecked"


def test_a_seeded_validation_that_puts_the_state_back():
    training = Training()
    for epoch in range(3):
        training.train(1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            torch.randn(1 + epoch, 16)
    assert noise(training).state == "checked"
