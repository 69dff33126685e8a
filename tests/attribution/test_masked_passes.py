"""Passes of one loss over random maskings of a batch, in which some samples stay."""

import pytest
import torch

from opacus_pi.attribution import Tracker
from opacus_pi.attribution.causes import (
    ANOTHER_INPUT,
    COMPUTED,
    MISMATCH,
    NOT_DELIVERED,
    PASSES_DISAGREE,
)

SIZE, LENGTH, MASK = 8, 16, 1
ALL = range(SIZE)


class Loop:
    """A tracker, batches of token ids, and the causes that were noted."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.batches = torch.randint(2, 200, (2, SIZE, LENGTH), generator=generator)
        self.tracker, self.causes = Tracker(), set()
        self.tracker._note = lambda cause, num: self.causes.add(cause)
        for number, batch in enumerate(self.batches):
            first = SIZE * number
            self.tracker.delivered(list(range(first, first + SIZE)), (batch,))

    def masked(self, kept, batch=1, shift=0):
        """Return a masking of a batch that leaves the samples in some places."""
        x = self.batches[batch].roll(shift, 0)
        masked = x.where(torch.arange(LENGTH) % 3 > 0, MASK)
        is_kept = torch.tensor([i in kept for i in ALL])
        return torch.where(is_kept[:, None], x, masked)

    def take(self, *inputs):
        """Return the pass that enters an update on a loss of some passes."""
        passes = [self.tracker.bind((x,)) for x in inputs]
        for forward in reversed(passes):
            self.tracker.mark_backward(forward)
        (forward,) = self.tracker.take_attributed([SIZE])
        return forward


JOINED = [
    # kept in either pass, samples that are recognised, and those that are assumed
    ((range(4), range(4, 8)), ALL, ()),
    ((range(4), range(2, 8)), ALL, ()),
    ((ALL, [0]), ALL, ()),
    (([0], ALL), ALL, ()),
    (([0], [0]), [0], range(1, 8)),
    (([0, 1], [6, 7]), [0, 1, 6, 7], range(2, 6)),
    (([0], [1]), [0, 1], range(2, 8)),
    ((range(3), range(2, 5), range(4, 8)), ALL, ()),
]


@pytest.mark.parametrize(("kept", "known", "assumed"), JOINED)
def test_samples_that_either_pass_shows_are_known(kept, known, assumed):
    loop = Loop()
    forward = loop.take(*[loop.masked(one) for one in kept])
    assert forward.indices.tolist() == [SIZE + i for i in ALL]
    were_assumed = forward.is_assumed
    found = [] if were_assumed is None else were_assumed.nonzero()[0].tolist()
    assert found == list(assumed)
    assert (ANOTHER_INPUT in loop.causes) == (len(set(map(tuple, kept))) > 1)
    assert (COMPUTED in loop.causes) == bool(assumed)
    assert not loop.causes & {NOT_DELIVERED, PASSES_DISAGREE, MISMATCH}
    assert loop.tracker.counts["by_content"] == len(known)
    assert loop.tracker.counts["unattributed"] == 0


DIFFERENT = [
    ({"kept": [0, 1], "batch": 0}, PASSES_DISAGREE),
    ({"kept": [0, 1, 5], "shift": 1}, PASSES_DISAGREE),
    ({"kept": ALL, "shift": 3}, PASSES_DISAGREE),
    ({"kept": [6, 7], "batch": 0}, MISMATCH),  # no place is known in both passes
]


@pytest.mark.parametrize(("options", "cause"), DIFFERENT)
def test_other_samples_in_the_places_of_known_ones_are_not_joined(options, cause):
    loop = Loop()
    forward = loop.take(loop.masked([0, 1]), loop.masked(**options))
    assert (forward.indices == -1).all() and loop.causes == {cause}
