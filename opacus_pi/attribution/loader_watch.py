"""Learns from a data loader which examples each batch holds, and when it is delivered.

The loader stays the user's object: its class is replaced by a subclass that copies the
sampler's output on its way to the workers, in the main process, and reports a batch to
a ``Tracker`` when the iterator hands it out. Data set, collate_fn, sampler, workers and
random numbers are untouched.

Relies on these private names of ``torch.utils.data.dataloader``, which a test pins:
``DataLoader._index_sampler`` and ``_get_iterator``; of its iterators ``_index_sampler``
and, with workers, ``_rcvd_idx``, ``_in_order`` and ``_get_data``.
"""

import weakref
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, SupportsIndex

from opacus.utils import batch_memory_manager
from torch.utils.data import DataLoader

from opacus_pi._class_swap import swap_class
from opacus_pi.attribution.evidence import Stream
from opacus_pi.attribution.tracker import Tracker


def watch(loader: DataLoader[Any], tracker: Tracker) -> DataLoader[Any]:
    """Have a loader report its batches to a tracker.

    Args:
        loader: The loader, changed in place. Copies and pickles of it are plain.
        tracker: Whom to tell; referred to weakly. A second call replaces it.

    Returns:
        The same object.
    """
    swap_class(loader, _watched_loader)
    loader._pi_tracker = weakref.ref(tracker)
    return loader


def tracker_of(loader: DataLoader[Any]) -> Tracker | None:
    """The tracker that a loader reports to."""
    reference = getattr(loader, "_pi_tracker", None)
    return None if reference is None else reference()


def watch_memory_manager() -> None:
    """Have the loaders that ``BatchMemoryManager`` builds watched like their source."""
    build = batch_memory_manager.wrap_data_loader
    if hasattr(build, "_pi_wrapped"):
        return

    @wraps(build)
    def wrap_data_loader(
        *, data_loader: DataLoader[Any], **options: Any
    ) -> DataLoader[Any]:
        loader = build(data_loader=data_loader, **options)
        tracker = tracker_of(data_loader)
        return loader if tracker is None else watch(loader, tracker)

    vars(wrap_data_loader)["_pi_wrapped"] = True
    batch_memory_manager.wrap_data_loader = wrap_data_loader


class _CopiedIndices:
    """The index sampler of one iterator; remembers what it emitted, by position."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self._restart()

    def _restart(self) -> None:
        """Begin another pass over the loader."""
        self.emitted: dict[int, Any] = {}
        self.num_emitted = 0
        self.stream = Stream(self)

    def __iter__(self) -> Iterator[Any]:
        self._restart()
        for indices in self.sampler:
            self.emitted[self.num_emitted] = indices
            self.num_emitted += 1
            yield indices

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["sampler"], name)

    def take(self, position: int, *, in_order: bool) -> Any:
        """What was emitted at a position; older ones were lost to an exception."""
        indices = self.emitted.pop(position, None)
        if in_order and self.emitted:
            self.emitted = {k: v for k, v in self.emitted.items() if k > position}
        return indices


def _plain(cls: Any) -> Any:
    """An empty object of a class, for a copy's state."""
    return cls.__new__(cls)


def _watched_iterator(base: type) -> type:
    """A loader's iterator that reports what it hands out."""

    class Watched(base):
        def _get_data(self) -> Any:  # with workers only
            received = super()._get_data()
            self._pi_received = received[0]
            return received

        def __next__(self) -> Any:
            batch = super().__next__()
            tracker = self._pi_tracker()
            if tracker is not None:
                copied = self._index_sampler
                in_order = getattr(self, "_in_order", True)
                if not hasattr(self, "_rcvd_idx"):  # no workers: the newest
                    position = copied.num_emitted - 1
                elif in_order:
                    position = self._rcvd_idx - 1
                else:
                    position = self._pi_received
                indices = copied.take(position, in_order=in_order)
                tracker.delivered(indices, batch, copied.stream)
            return batch

    return Watched


def _watched_loader(base: type) -> type:
    """A loader whose iterators are watched."""

    class Watched(base):
        @property
        def _index_sampler(self) -> _CopiedIndices:  # read once per iterator
            return _CopiedIndices(super()._index_sampler)

        def _get_iterator(self) -> Any:
            iterator = super()._get_iterator()
            iterator._pi_tracker = self._pi_tracker
            return swap_class(iterator, _watched_iterator)

        def __reduce_ex__(
            self, protocol: SupportsIndex
        ) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
            state = {k: v for k, v in self.__dict__.items() if k != "_pi_tracker"}
            return _plain, (base,), state

    return Watched
