"""States of a random generator that come again."""

import pytest
import torch

from opacus_pi.custody.seen_states import MAX_KEPT, SeenStates
from opacus_pi.recording import Recorder
from opacus_pi.recording.saved_state import GENERATOR_STATES, require_whole


def _draw(seen, count, generator):
    new = []
    for _ in range(count):
        new.append(seen.add(generator.get_state().numpy().tobytes()))
        torch.rand(3, generator=generator)
    return new


def test_states_of_one_stream_are_new():
    generator = torch.Generator().manual_seed(0)
    assert all(_draw(SeenStates(), 2 * MAX_KEPT, generator))


def test_a_state_that_comes_again_is_found():
    seen, generator = SeenStates(), torch.Generator().manual_seed(0)
    assert all(_draw(seen, 100, generator))
    assert not any(_draw(seen, 100, generator.manual_seed(0)))
    assert all(_draw(seen, 100, generator))


def test_in_a_long_run_a_repeated_stretch_is_found():
    seen, generator = SeenStates(), torch.Generator().manual_seed(0)
    _draw(seen, 3000, generator)
    start = generator.get_state()
    _draw(seen, 40_000, generator)
    assert len(seen.state()) <= MAX_KEPT + 1
    new = _draw(seen, 40_000 // 256, generator.set_state(start))
    assert not all(new)


def test_saved_states_go_on():
    seen, generator = SeenStates(), torch.Generator().manual_seed(0)
    _draw(seen, 2 * MAX_KEPT, generator)
    loaded = SeenStates.from_state(seen.state())
    assert torch.equal(loaded.state(), seen.state())
    again = _draw(loaded, 64, generator.manual_seed(0))
    assert again == _draw(seen, 64, generator.manual_seed(0))
    assert not all(again)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(3),
        torch.tensor([63, 1]),
        torch.tensor([0, -1]),
        torch.zeros(MAX_KEPT + 2, dtype=torch.int64),
        [0, 1],
    ],
)
def test_what_no_run_can_have_saved_is_told_apart(value):
    assert not SeenStates.is_state(value)
    assert SeenStates.is_state(SeenStates().state())


def test_a_damaged_entry_is_refused():
    recorder = Recorder(every=1)
    recorder.begin(num_examples=3, sample_rate=1.0, sampling="fixed", data_set="a")
    recorder.is_new_state(bytes(range(4)))
    state = recorder.state_dict()
    require_whole(state)
    state[GENERATOR_STATES] = torch.tensor([0, -1])
    with pytest.raises(ValueError, match="generator_states"):
        require_whole(state)
    del state[GENERATOR_STATES]  # as an earlier release saved it
    require_whole(state)
