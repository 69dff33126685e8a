"""A pass over a loader goes on where it was saved; skipped batches are not reported."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.attribution import EpochPosition, Tracker, observe
from opacus_pi.recording.random_states import RandomStates


def prepared(cls=DataLoader, *, follow_items=False, **options):
    """A loader with a generator of its own, its observer, tracker and position."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.arange(12.0))
    loader = cls(data, 3, shuffle=True, generator=generator, **options)
    tracker = Tracker()
    observer = observe(loader, tracker, follow_items=follow_items)
    states = RandomStates({"loader": generator})
    return loader, observer, tracker, states, EpochPosition(states, loader)


class Doubled(DataLoader):
    """A loader whose passes are a generator around torch's iterator."""

    def __iter__(self):
        for (x,) in super().__iter__():
            yield (2 * x,)


WORKERS = {"num_workers": 1}


@pytest.mark.parametrize("follow_items", [False, True])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (DataLoader, {}),
        (DataLoader, WORKERS),
        (Doubled, {}),
        (Doubled, WORKERS),
    ],
)
def test_the_rest_of_a_pass(cls, options, follow_items):
    options = {"follow_items": follow_items, **options}
    loader, _, _, states, position = prepared(cls, **options)
    whole = []
    for (x,) in loader:
        whole.append(x.tolist())
        if len(whole) == 2:
            assert position.under_way and position.obstacle() == ""
            saved, now = position.state(), states.collect()
    assert not position.under_way and position.state() == {"num_delivered": -1}
    following = [x.tolist() for (x,) in loader]

    loader, observer, tracker, states, position = prepared(cls, **options)
    position.check(saved)
    states.restore(now)
    position.resume(saved, now)
    assert [x.tolist() for (x,) in loader] == whole[2:]
    assert observer.num_deliveries == 2
    assert tracker.latest.number == 4  # of its pass, the skipped ones included
    assert tracker.latest.loader_pass.num_unused == 2
    assert [x.tolist() for (x,) in loader] == following


class Other(DataLoader):
    """A loader with iterators that are not torch's."""

    def _get_iterator(self):
        return iter([self.collate_fn([item]) for item in self.dataset])


def test_passes_that_cannot_be_followed_are_an_obstacle():
    loader, observer, _, states, position = prepared(Other)
    assert position.obstacle() == ""
    assert len(list(loader)) == 12 and observer.num_unobserved_passes == 1
    assert "cannot be repeated" in position.obstacle()
    start = {f"start.{name}": value for name, value in states.collect().items()}
    position.resume({"num_delivered": 2, **start}, states.collect())
    with pytest.raises(ValueError, match="must be an iterator of torch's DataLoader"):
        iter(loader)


def test_a_pass_that_was_left_is_over():
    loader, _, _, _, position = prepared()
    for _ in loader:
        assert position.state()["num_delivered"] == 1
        break
    assert position.state() == {"num_delivered": -1}
