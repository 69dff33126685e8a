import copy
import gc
import inspect
import pickle

import pytest
import torch
from opacus.data_loader import DPDataLoader
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.utils.data import DataLoader, TensorDataset, dataloader

from opacus_pi.attribution import (
    NOBODY,
    Tracker,
    tracker_of,
    watch,
    watch_memory_manager,
)


class Log(Tracker):
    """A tracker that keeps what it was told."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def delivered(self, indices, batch, stream=None):
        delivery = super().delivered(indices, batch, stream)
        self.seen.append((delivery.rows, batch))
        return delivery


def numbers(size=12):
    return TensorDataset(torch.arange(float(size)))


def matches(log):
    return log.seen and all(
        torch.equal(batch[0], torch.tensor(rows).float()) for rows, batch in log.seen
    )


def test_the_private_names_of_torch_that_it_stands_on():
    assert isinstance(DataLoader._index_sampler, property)
    assert callable(DataLoader._get_iterator)
    base = dataloader._BaseDataLoaderIter
    assert "self._index_sampler = loader._index_sampler" in inspect.getsource(base)
    workers = inspect.getsource(dataloader._MultiProcessingDataLoaderIter)
    assert "self._rcvd_idx = 0" in workers
    assert "self._in_order" in workers
    assert "idx, data = self._get_data()" in workers
    single = inspect.getsource(dataloader._SingleProcessDataLoaderIter)
    assert "_rcvd_idx" not in single
    iterator = iter(DataLoader(numbers(), num_workers=1))
    assert iterator._rcvd_idx == 0 and iterator._in_order is True


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_reported_when_they_are_handed_out(workers):
    log, loader = Log(), DataLoader(numbers(), 4, shuffle=True, num_workers=workers)
    assert watch(loader, log) is loader
    assert isinstance(loader, DataLoader) and type(loader).__name__ == "DataLoader"
    batches = iter(loader)
    assert not log.seen  # although workers have fetched already
    next(batches)
    assert len(log.seen) == 1 and matches(log)
    assert len(list(batches)) == 2 and len(log.seen) == 3 and matches(log)
    assert len(list(loader)) == len(loader) == 3


def test_it_draws_the_same_numbers():
    def order(watched):
        torch.manual_seed(0)
        loader = DataLoader(numbers(), 4, shuffle=True)
        log = Log()
        loader = watch(loader, log) if watched else loader
        return [b[0].tolist() for b in loader], torch.get_rng_state()

    (plain, before), (watched, after) = order(False), order(True)
    assert plain == watched and torch.equal(before, after)


def test_sampler_attributes_stay_reachable():
    loader = watch(DataLoader(numbers(), 4), Log())
    assert loader._index_sampler.batch_size == 4
    assert loader.batch_sampler.batch_size == 4


def test_the_latest_tracker_is_told_and_a_dead_one_is_not():
    first, second, loader = Log(), Log(), DataLoader(numbers(), 4)
    watch(watch(loader, first), second)
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
        other = duplicate(watch(loader, log))
        assert type(other) in (DataLoader, DPDataLoader)
        assert len(list(other)) == len(loader) and not log.seen


def test_memory_managers_loader_is_watched_like_its_source():
    watch_memory_manager()
    watch_memory_manager()  # once is enough
    optimizer = type("Optimizer", (), {"signal_skip_step": lambda self, do_skip: None})
    log = Log()
    for loader in (watch(DataLoader(numbers(), 4), log), DataLoader(numbers(), 4)):
        manager = BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=3, optimizer=optimizer()
        )
        with manager as managed:
            assert len(list(managed)) == 6
    assert len(log.seen) == 6 and matches(log)


def test_padding_for_an_empty_batch_is_nobody():
    assert Tracker().delivered([], torch.zeros(1, 2)).rows.tolist() == [NOBODY]
    assert Tracker().delivered([], torch.zeros(0, 2)).rows.tolist() == []


@pytest.mark.parametrize("keys", [["a", "b"], [None, None], [True, False], [0.5, 1.0]])
def test_keys_that_are_no_positions(keys):
    assert Tracker().delivered(keys, torch.zeros(2, 2)).rows is None
