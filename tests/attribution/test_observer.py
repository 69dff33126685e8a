"""What an observed loader reports, and that training does not notice it."""

import copy
import gc
import pickle

import pytest
import torch
from opacus.data_loader import DPDataLoader
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)

from opacus_pi.attribution import (
    LEFT_OUT,
    Tracker,
    observe,
    observe_like,
    observer_of,
    tracker_of,
)
from opacus_pi.attribution.causes import COLLATE
from opacus_pi.attribution.collate_identity import FollowingCollate
from opacus_pi.integration.opacus_compat import patch_memory_manager


class Log(Tracker):
    """A tracker that keeps what is reported to it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen, self.deliveries = [], []

    def delivered(self, indices, batch, loader_pass=None, **options):
        delivery = super().delivered(indices, batch, loader_pass, **options)
        self.seen.append((delivery.index_array, batch))
        self.deliveries.append(delivery)
        return delivery


def numbers(size=12):
    return TensorDataset(torch.arange(float(size)))


def matches(log):
    return log.seen and all(
        torch.equal(batch[0], torch.tensor(indices).float())
        for indices, batch in log.seen
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_reported_when_they_are_handed_out(workers):
    log, loader = Log(), DataLoader(numbers(), 4, shuffle=True, num_workers=workers)
    observer = observe(loader, log)
    assert observer_of(loader) is observer
    assert isinstance(loader, DataLoader) and type(loader).__name__ == "DataLoader"
    batches = iter(loader)
    assert not log.seen  # although workers have fetched already
    next(batches)
    assert len(log.seen) == 1 and matches(log)
    assert len(list(batches)) == 2 and len(log.seen) == 3 and matches(log)
    assert len(list(loader)) == len(loader) == 3


@pytest.mark.parametrize("follow_items", [False, True])
def test_it_draws_the_same_numbers(follow_items):
    def order(observed):
        torch.manual_seed(0)
        loader, log = DataLoader(numbers(), 4, shuffle=True), Log()
        if observed:
            observe(loader, log, follow_items=follow_items)
        return [b[0].tolist() for b in loader], torch.get_rng_state()

    (plain, before), (observed, after) = order(False), order(True)
    assert plain == observed and torch.equal(before, after)


def test_sampler_attributes_stay_reachable():
    loader = DataLoader(numbers(), 4)
    observe(loader, Log())
    assert loader._index_sampler.batch_size == 4
    assert loader.batch_sampler.batch_size == 4


def test_the_latest_tracker_gets_reports_and_a_deleted_one_does_not():
    first, second, loader = Log(), Log(), DataLoader(numbers(), 4)
    observe(loader, first)
    observe(loader, second)
    list(loader)
    assert not first.seen and len(second.seen) == 3
    assert tracker_of(loader) is second
    del second
    gc.collect()
    assert tracker_of(loader) is None
    assert len(list(loader)) == 3
    assert tracker_of(DataLoader(numbers())) is None


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))],
)
def test_copies_are_plain_loaders(duplicate):
    log = Log()
    for loader in (DataLoader(numbers(), 4), DPDataLoader(numbers(), sample_rate=0.3)):
        observe(loader, log, follow_items=True)
        other = duplicate(loader)
        assert type(other) in (DataLoader, DPDataLoader)
        assert not [name for name in vars(other) if name.startswith("_pi_")]
        assert len(list(other)) == len(loader) and not log.seen


class HoldsALoader(Dataset):
    """A data set that iterates over another loader."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.cat([x for (x,) in self.loader])[index]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_loader_inside_a_worker_process_is_not_observed(context):
    log, inner = Log(), DataLoader(numbers(), 4)
    observe(inner, log, follow_items=True)
    outer = DataLoader(
        HoldsALoader(inner), 2, num_workers=1, multiprocessing_context=context
    )
    assert torch.cat(list(outer)).tolist() == [0, 1, 2, 3]
    assert not log.seen and observer_of(inner).num_deliveries == 0


def test_memory_managers_loader_is_observed_like_its_source():
    patch_memory_manager(observe_like)
    patch_memory_manager(observe_like)  # once is enough
    optimizer = type("Optimizer", (), {"signal_skip_step": lambda self, do_skip: None})
    log, observed = Log(), DataLoader(numbers(), 4)
    observe(observed, log)
    for loader in (observed, DataLoader(numbers(), 4)):
        manager = BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=3, optimizer=optimizer()
        )
        with manager as managed:
            assert len(list(managed)) == 6
    assert len(log.seen) == 6 and matches(log)
    assert all(delivery.loader_pass.in_parts for delivery in log.deliveries)
    list(observed)
    assert not log.deliveries[-1].loader_pass.in_parts


def test_padding_for_an_empty_batch_is_of_no_example():
    indices = Tracker().delivered([], torch.zeros(1, 2)).index_array
    assert indices.tolist() == [LEFT_OUT]
    assert Tracker().delivered([], torch.zeros(0, 2)).index_array.tolist() == []


@pytest.mark.parametrize("keys", [["a", "b"], [None, None], [True, False], [0.5, 1.0]])
def test_keys_that_are_no_indices(keys):
    assert Tracker().delivered(keys, torch.zeros(2, 2)).index_array is None


# ---------------------------------------------------------------------------- counting
def counts(observer):
    return (
        observer.num_passes,
        observer.num_passes_ended,
        observer.num_passes_left,
        len(observer.open_passes),
        observer.num_deliveries,
    )


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}]
)
def test_passes_are_counted_as_ended_left_or_open(options):
    loader = DataLoader(numbers(), 4, **options)
    observer = observe(loader)
    assert counts(observer) == (0, 0, 0, 0, 0)
    batches = iter(loader)
    assert counts(observer) == (1, 0, 0, 1, 0)
    list(batches)
    with pytest.raises(StopIteration):
        next(batches)  # once more
    assert counts(observer) == (1, 1, 0, 0, 3)
    del batches
    for _ in loader:
        break
    for _ in loader:
        pass
    assert counts(observer) == (3, 2, 1, 0, 7)


def test_each_delivery_knows_its_pass_and_its_number():
    log, loader = Log(), DataLoader(numbers(), 4)
    observe(loader, log)
    next(iter(loader))
    list(loader)
    numbers_seen = [(d.loader_pass.number, d.number) for d in log.deliveries]
    assert numbers_seen == [(1, 1), (2, 1), (2, 2), (2, 3)]
    first, second = (log.deliveries[i].loader_pass for i in (0, 1))
    assert not first.has_ended and first.is_over
    assert second.has_ended and second.num_delivered == 3


def test_passes_that_are_under_way_together():
    loader = DataLoader(numbers(), 4)
    observer = observe(loader)
    one, other = iter(loader), iter(loader)
    next(one), next(other), next(one)
    assert [p.num_delivered for p in observer.open_passes] == [2, 1]
    del one
    assert [p.num_delivered for p in observer.open_passes] == [1]
    assert observer.num_passes_left == 1


class Doubled(DataLoader):
    """A loader that changes batches after torch's iterator has returned them."""

    def __iter__(self):
        for (x,) in super().__iter__():
            yield 2 * x


def test_a_loader_with_a_generator_of_its_own_around_torchs_iterator():
    log, loader = Log(), Doubled(numbers(4), 2)
    observer = observe(loader, log, follow_items=True)
    assert [x.tolist() for x in loader] == [[0, 2], [4, 6]]
    assert matches(log) and counts(observer) == (1, 1, 0, 0, 2)


class Other(DataLoader):
    """A loader with iterators that are not torch's."""

    def _get_iterator(self):
        return (self.collate_fn([item]) for item in self.dataset)


def test_iterators_that_are_not_torchs_are_left_alone_and_counted():
    log, loader = Log(), Other(numbers(3))
    observer = observe(loader, log, follow_items=True)
    assert [x.tolist() for (x,) in loader] == [[0], [1], [2]]
    assert not log.seen and observer.num_unobserved_passes == 1


# ----------------------------------------------------------- how often a batch is used
def test_uses_are_counted_by_update():
    tracker, x, u = Tracker(), torch.randn(3, 4), torch.randn(3, 4)
    first, second = tracker.delivered([0, 1, 2], x), tracker.delivered([3, 4, 5], u)

    def gradients(*batches):
        for batch in batches:
            tracker.mark_backward(tracker.bind([batch]))

    gradients(x, x, u)  # one update, in which one batch is used twice
    tracker.take_attributed([3, 3, 3])
    tracker.end_update()
    assert (first.num_forward_passes, first.num_updates) == (2, 1)
    assert (second.num_forward_passes, second.num_updates) == (1, 1)
    gradients(x)
    tracker.discard()  # the gradients were cleared
    tracker.end_update()
    assert (first.num_forward_passes, first.num_updates) == (3, 1)
    for _ in range(2):  # two physical batches of one update
        gradients(x)
        tracker.take_attributed([3])
    tracker.end_update()
    assert first.num_updates == 2 and second.num_updates == 1


# --------------------------------------------------------- following of collate_fn
class Sequences(Dataset):
    """Items of different lengths."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"x": torch.arange(float(index + 1)) + 10 * index + 1, "y": index % 2}


class Sorting:
    """A collate_fn with a state, which sorts, pads, and changes its items in place."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, items):
        self.num_calls += 1
        items.sort(key=lambda item: -len(item["x"]))
        padded = torch.nn.utils.rnn.pad_sequence([i["x"] for i in items], True)
        for item in items:
            item["x"] += 100
        return Collated(padded, self.num_calls)


class Collated:
    """A batch of a type of the user's own."""

    def __init__(self, sequences, number):
        self.sequences, self.number = sequences, number


WORKERS = [
    {},
    {"num_workers": 2},
    {"num_workers": 1, "persistent_workers": True},
    {"num_workers": 1, "multiprocessing_context": "spawn"},
]


@pytest.mark.parametrize("options", WORKERS, ids=str)
def test_items_are_followed_through_collate(options):
    log, collate = Log(), Sorting()
    loader = DataLoader(Sequences(), 3, collate_fn=collate, **options)
    observe(loader, log, follow_items=True)
    firsts = []
    for _ in range(2):
        for batch in loader:
            assert type(batch) is Collated
            firsts.append(batch.sequences[:, 0].tolist())
    assert loader.collate_fn is collate
    if not options:
        assert batch.number == collate.num_calls == 4
    assert [d.indices for d in log.deliveries] == [[2, 1, 0], [5, 4, 3]] * 2
    for delivery, first in zip(log.deliveries, firsts, strict=True):
        assert first == [10 * i + 1 for i in delivery.indices]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_collate_that_keeps_the_order_is_proven(workers):
    log, generator = Log(), torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(12, 3, 5, generator=generator), torch.arange(12))
    loader = DataLoader(data, 4, shuffle=True, num_workers=workers)
    observe(loader, log, follow_items=True)
    for _, y in loader:
        assert y.tolist() == log.deliveries[-1].indices
    assert all(d.identity.items is None for d in log.deliveries)
    assert not any(d.identity.notes for d in log.deliveries)


def test_single_items_and_empty_batches():
    log, loader = Log(), DataLoader(numbers(3), batch_size=None)
    observe(loader, log, follow_items=True)
    assert [x.item() for (x,) in loader] == [0, 1, 2]
    assert [d.indices for d in log.deliveries] == [[0], [1], [2]]
    log, loader = Log(), DPDataLoader(numbers(), sample_rate=0.05)
    observe(loader, log, follow_items=True)
    for (x,) in loader:
        assert x.tolist() == log.deliveries[-1].indices
    assert 0 in [len(d.indices) for d in log.deliveries]


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(6.0))


@pytest.mark.parametrize("workers", [0, 1])
def test_iterable_data_sets(workers):
    log, loader = Log(), DataLoader(Streamed(), 4, num_workers=workers)
    observer = observe(loader, log, follow_items=True)
    assert [x.tolist() for x in loader] == [[0, 1, 2, 3], [4, 5]]
    assert [d.indices for d in log.deliveries] == [None, None]
    assert counts(observer) == (1, 1, 0, 0, 2)


def test_pinned_memory_leaves_types_and_identities_alone(monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory

    # versions of torch differ in whether they pass the device
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self.clone())
    collate = FollowingCollate(tuple, is_single=False)
    batch = collate([torch.arange(3.0), torch.arange(2.0)])
    pinned = pin_memory(batch, "cuda")
    assert type(pinned) is type(batch) and type(pinned.batch) is tuple
    assert pinned.identity is batch.identity
    assert pinned.batch[0] is not batch.batch[0]


def test_a_loader_with_iterators_of_its_own_is_not_followed():
    class Own(DataLoader):
        def _get_iterator(self):
            return super()._get_iterator()

    for follow_items, notes in ((False, ()), (True, (COLLATE,))):
        log, loader = Log(), Own(numbers(), 4)
        observe(loader, log, follow_items=follow_items)
        list(loader)
        assert [d.identity.notes for d in log.deliveries] == [notes] * 3


class DrawsAtOnce:
    """A batch sampler that draws when it is asked for an iterator."""

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(torch.randperm(12).view(3, 4).tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sampler_draws_at_the_moment_when_torch_asks_it(workers):
    drawn = []
    for is_observed in (False, True):
        loader = DataLoader(numbers(), batch_sampler=DrawsAtOnce(), num_workers=workers)
        if is_observed:
            observe(loader, Log())
        torch.manual_seed(0)
        seen = [batch[0].tolist() for _ in range(2) for batch in loader]
        drawn.append((seen, torch.rand(1).item()))
    assert drawn[0] == drawn[1]


def test_parts_of_a_draw_share_its_key():
    log, loader = Log(), DataLoader(numbers(), batch_size=4)
    observe(loader, log)
    ends = iter([False, True, True] * 2)
    built = DataLoader(numbers(), batch_size=4)
    observe_like(loader, built, ends_draw=lambda sampler: next(ends))
    for _ in range(2):
        list(built)
    list(loader)
    draws = [delivery.draw for delivery in log.deliveries]
    assert draws[0] == draws[1] and draws[3] == draws[4]
    assert len(set(draws)) == 7


@pytest.mark.parametrize("length", [4, 7])
def test_torch_stacks_samples_first_whatever_the_model_wants(length):
    tracker = Log(batch_first=False)
    data_set = TensorDataset(torch.randn(12, length, 3))
    loader = DataLoader(data_set, 4, shuffle=True)
    observe(loader, tracker)
    for (x,) in loader:
        indices = tracker.deliveries[-1].index_array
        tracker.mark_backward(tracker.bind([x.transpose(0, 1)]))
        assert tracker.attribute([4]).tolist() == indices.tolist()
    assert tracker.counts["by_storage"] == 12


def test_an_own_collation_may_stack_samples_second():
    tracker = Log(batch_first=False)
    loader = DataLoader(
        TensorDataset(torch.randn(12, 4, 3)),
        4,
        shuffle=True,
        collate_fn=lambda items: torch.stack([x for (x,) in items], dim=1),
    )
    observe(loader, tracker, follow_items=True)
    for x in loader:
        indices = tracker.deliveries[-1].index_array
        tracker.mark_backward(tracker.bind([x]))
        assert tracker.attribute([4]).tolist() == indices.tolist()


def test_a_data_set_that_returns_whole_batches_may_stack_samples_second():
    x = torch.randn(4, 12, 3)
    tracker = Log(batch_first=False)

    class Whole(Dataset):
        def __getitem__(self, indices):
            return x[:, indices]

        def __len__(self):
            return 12

    batches = BatchSampler(SequentialSampler(range(12)), 4, drop_last=False)
    loader = DataLoader(Whole(), batch_size=None, sampler=batches)
    observe(loader, tracker)
    for batch in loader:
        tracker.mark_backward(tracker.bind([batch]))
        indices = tracker.deliveries[-1].index_array
        assert tracker.attribute([4]).tolist() == indices.tolist()
    assert tracker.counts["by_storage"] == 12
