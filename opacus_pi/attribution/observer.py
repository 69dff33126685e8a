"""Observe which batches a data loader returns, and in which pass over it.

The loader stays the user's object, but its class is replaced by a subclass. Its
iterators keep the sampler's output, in the main process and before any worker gets it.
They report a batch together with its indices when the training loop receives it. The
same subclass counts passes, lets an ``EpochPosition`` start them where a saved run
stopped, and can have items matched through ``collate_fn``.

*Guarantee.* Training is the same to the bit: data set, sampler, ``collate_fn``, worker
processes and random numbers are the loader's own, and the loop receives the objects
that ``collate_fn`` returned. Indices and batch belong together with any number of
workers, with persistent ones, out of order, after an exception in a worker, and with
several iterators at once. Copies and pickles of an observed loader are plain loaders,
and a loader that is iterated inside another loader's worker process is not observed.

*What breaks it.* A subclass of ``DataLoader`` with iterators that are not torch's is
not observed: its batches have no indices, and its passes cannot be resumed
(``LoaderObserver.num_unobserved_passes``). A loader that another library (Accelerate,
Lightning) builds from this one is not observed, unless ``observe_like`` is called for
it.

The private methods of torch that are overridden here are listed in ``_torch_compat``.
"""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

from torch.utils.data import DataLoader, get_worker_info

from opacus_pi._class_swap import swap_class
from opacus_pi._torch_compat import (
    LoaderIterator,
    has_workers,
    index_sampler,
    makes_own_iterators,
    next_index,
    received_position,
)
from opacus_pi.attribution.collate_identity import (
    BY_CONSTRUCTION,
    NOT_FOLLOWED,
    UNCHECKED,
    FollowedBatch,
    FollowingCollate,
    keeps_order,
)
from opacus_pi.attribution.delivery import LoaderPass
from opacus_pi.attribution.plain_indexing import indexes_plainly, loads_batches
from opacus_pi.attribution.tracker import Tracker

__all__ = ["LoaderObserver", "observe", "observe_like", "observer_of", "tracker_of"]


class Position(Protocol):
    """The part of ``EpochPosition`` that an observer calls.

    A protocol, because ``epoch_position`` imports this file.
    """

    def begin_pass(self, loader_pass: LoaderPass, make: Callable[[], Any]) -> Any:
        """Begin a pass at its start, or at the batch where a saved run stopped.

        Args:
            loader_pass: The pass.
            make: Returns its iterator.
        """


class LoaderObserver:
    """Counts the passes and deliveries of a loader, and reports deliveries.

    Loaders that are built from the observed one (``observe_like``) share its observer.

    Args:
        tracker: Receives every delivery; held by a weak reference. None: deliveries are
            only counted.
        follow_items: Whether to follow each item through ``collate_fn``, which may
            change their order (``collate_identity``); holds for passes that begin
            later.
        is_in_order: Whether ``collate_fn`` is known to keep the order of the items;
            matters only if they are not followed.

    Attributes:
        batch_dim: The dimension that should run over the samples of a batch.
        known_collate: The ``collate_fn`` of the loader when it was observed; None: not
            known.
        position: The ``EpochPosition`` whose ``begin_pass`` is called when a pass
            begins, so that the pass can be resumed; may be None.
        num_passes: How many passes have begun.
        num_passes_ended: How many of them were iterated to their end.
        num_unobserved_passes: How many passes had iterators that are not torch's. Of
            such a pass nothing else is known: neither its batches nor its end.
        num_deliveries: How many batches the loop received, of all passes. Batches that
            a resumed pass skips are not among them.
    """

    def __init__(
        self,
        tracker: Tracker | None = None,
        *,
        follow_items: bool = False,
        is_in_order: bool = True,
    ) -> None:
        self._tracker = None if tracker is None else weakref.ref(tracker)
        self.follow_items = follow_items
        self.known_collate: Any = None
        self._unfollowed = BY_CONSTRUCTION if is_in_order else NOT_FOLLOWED
        self.batch_dim = 0 if tracker is None else tracker.batch_dim
        self.position: Position | None = None
        self.num_passes = self.num_passes_ended = self.num_unobserved_passes = 0
        self.num_deliveries = 0
        self._num_left = 0
        self._open: list[LoaderPass] = []

    @property
    def _is_collated_by_torch(self) -> bool:
        """Whether batches are made by torch's own collation."""
        return not self.follow_items and self._unfollowed is BY_CONSTRUCTION

    @property
    def tracker(self) -> Tracker | None:
        """The tracker that deliveries are reported to, while it exists."""
        return None if self._tracker is None else self._tracker()

    @property
    def open_passes(self) -> list[LoaderPass]:
        """The passes that were begun, and have neither ended nor been left."""
        self._settle()
        return list(self._open)

    @property
    def num_passes_left(self) -> int:
        """Number of passes that the loop left early, for example by ``break``.

        A pass counts from the moment when its iterator is deleted or restarted.
        """
        self._settle()
        return self._num_left

    def _settle(self) -> None:
        """Count the passes that were left, and keep those that are under way."""
        self._num_left += sum(p.is_over and not p.has_ended for p in self._open)
        self._open = [p for p in self._open if p.is_under_way]

    def follow_new_collate(self, collate_fn: Any) -> None:
        """Follow the items from now on if another ``collate_fn`` makes the batches.

        Args:
            collate_fn: That of the loader of which a pass is about to begin.
        """
        is_known = self.known_collate in (None, collate_fn)
        if not is_known and not keeps_order(collate_fn):
            self.follow_items = True

    def begin_pass(self, loader: DataLoader[Any], make: Callable[[], Any]) -> Any:
        """Begin a pass over a loader.

        Args:
            loader: The loader, observed by this observer.
            make: Makes the loader's iterator, or restarts the persistent one.

        Returns:
            The iterator that ``make`` returned, changed in place.
        """
        self._settle()
        self.num_passes += 1
        loader_pass = LoaderPass(
            number=self.num_passes,
            in_parts=vars(loader).get("_pi_in_parts", False),
            # by torch's collation, if there is one
            is_stacked=self._is_collated_by_torch and loader.batch_sampler is not None,
        )
        begin = partial(self._follow, loader_pass, make)
        if self.position is None:
            return begin()
        return self.position.begin_pass(loader_pass, begin)

    def _follow(self, loader_pass: LoaderPass, make: Callable[[], Any]) -> Any:
        """Make the iterator of a pass, and observe it if it is one of torch's."""
        iterator = make()
        if not isinstance(iterator, LoaderIterator):
            self.num_unobserved_passes += 1
            return iterator
        swap_class(iterator, _observed_iterator)
        vars(iterator)["_pi_observer"] = self
        index_sampler(iterator).begin_pass(loader_pass)
        self._open.append(loader_pass)
        return iterator

    def deliver(
        self, batch: Any, indices: Any, loader_pass: LoaderPass, *, draw: int
    ) -> Any:
        """Report a batch that the loop is about to receive.

        Args:
            batch: What the iterator returned, with an identity or without.
            indices: What the sampler returned for it.
            loader_pass: The pass that it belongs to.
            draw: Which draw of this pass it belongs to.

        Returns:
            The batch as ``collate_fn`` returned it.
        """
        identity = UNCHECKED if self.follow_items else self._unfollowed
        if type(batch) is FollowedBatch:
            batch, identity = batch
        loader_pass.num_delivered += 1
        self.num_deliveries += 1
        tracker = self.tracker
        if tracker is not None:
            delivery = tracker.delivered(indices, batch, loader_pass, identity=identity)
            delivery.draw = loader_pass, draw
        return batch

    def end_pass(self, loader_pass: LoaderPass) -> None:
        """Record that an iterator raised ``StopIteration``.

        An iterator that is asked again raises again; the pass is counted once.

        Args:
            loader_pass: The pass that the iterator went through.
        """
        if not loader_pass.has_ended:
            loader_pass.has_ended = True
            self.num_passes_ended += 1


def observe(
    loader: DataLoader[Any],
    tracker: Tracker | None = None,
    *,
    follow_items: bool = False,
    is_in_order: bool = True,
) -> LoaderObserver:
    """Observe a loader from its next pass on.

    Args:
        loader: The loader, changed in place. Copies and pickles of it are not observed.
        tracker: Receives every delivery; held by a weak reference.
        follow_items: Whether to follow each item through ``collate_fn``.
        is_in_order: Whether ``collate_fn`` is known to keep the order of the items;
            matters only if they are not followed.

    Returns:
        The new observer. It replaces an earlier one, which goes on observing only the
        iterators that it knows already.
    """
    observer = LoaderObserver(
        tracker, follow_items=follow_items, is_in_order=is_in_order
    )
    observer.known_collate = loader.collate_fn
    _attach(loader, observer, in_parts=False)
    if tracker is not None:
        tracker.indexes_plainly = indexes_plainly(loader.dataset)
        tracker.loads_batches = loads_batches(loader.dataset)
    return observer


def observe_like(
    source: DataLoader[Any],
    built: DataLoader[Any],
    *,
    in_parts: bool = True,
    ends_draw: Callable[[Any], bool] | None = None,
) -> None:
    """Observe a loader that was built from another one, if that one is observed.

    Args:
        source: Any loader; nothing happens if it is not observed.
        built: A loader over the same data set that draws from the same sampler;
            changed in place.
        in_parts: Whether its batches are parts of the batches of ``source``.
        ends_draw: Called with its sampler, which has just returned a part: returns
            whether that was the last part of a batch of ``source``. None: all parts of
            a pass are taken to be of one batch.
    """
    observer = observer_of(source)
    if observer is not None:
        _attach(built, observer, in_parts=in_parts)
        vars(built)["_pi_ends_draw"] = ends_draw or _never


def observer_of(loader: DataLoader[Any]) -> LoaderObserver | None:
    """Return the observer of a loader, which reports every batch that it delivers.

    Args:
        loader: Any loader.

    Returns:
        The observer of its next pass; None if the loader is not observed.
    """
    observer: LoaderObserver | None = getattr(loader, "_pi_observer", None)
    return observer


def tracker_of(loader: DataLoader[Any]) -> Tracker | None:
    """Return the tracker that a loader reports its deliveries to.

    Args:
        loader: Any loader.

    Returns:
        The tracker; None if the loader is not observed, its observer only counts, or
        the tracker was deleted.
    """
    observer = observer_of(loader)
    return None if observer is None else observer.tracker


def _attach(
    loader: DataLoader[Any], observer: LoaderObserver, *, in_parts: bool
) -> None:
    """Let an observer observe a loader's next passes."""
    swap_class(loader, _observed_loader)
    vars(loader).update(_pi_observer=observer, _pi_in_parts=in_parts)


def _always(sampler: Any) -> bool:
    """Return that each batch of a sampler is a draw of its own."""
    return True


def _never(sampler: Any) -> bool:
    """Return that the next batch of a sampler belongs to the same draw."""
    return False


class RecordedIndices:
    """The index sampler of one iterator, which keeps what it returned by position.

    An iterator with workers draws indices ahead of the batches that it returns, so they
    are kept until their batch is delivered.

    Args:
        sampler: The loader's ``batch_sampler``, or its ``sampler``.
        ends_draw: Called with the sampler after each batch: returns whether the next
            one belongs to another draw.

    Attributes:
        draw: The draw of the batch that was taken last, counted from 0.
    """

    def __init__(
        self, sampler: Any, ends_draw: Callable[[Any], bool] = _always
    ) -> None:
        self.sampler, self._ends_draw = sampler, ends_draw
        self.current_pass: LoaderPass | None = None
        self._restart()

    def _restart(self) -> None:
        """Forget the indices of an earlier pass."""
        self.kept: dict[int, tuple[Any, int]] = {}
        self.num_drawn = self.num_draws = self.draw = 0

    def __iter__(self) -> Iterator[Any]:
        """Begin a pass, at the moment when torch asks for it.

        A sampler may draw random numbers in its ``__iter__``, before torch draws those
        of the pass. So it is not called later, as it were in a generator function.
        """
        self._restart()
        return self._recorded(iter(self.sampler))

    def _recorded(self, drawn: Iterator[Any]) -> Iterator[Any]:
        """Yield what a sampler returns, and keep it."""
        for indices in drawn:
            self.kept[self.num_drawn] = indices, self.num_draws
            self.num_draws += self._ends_draw(self.sampler)
            self.num_drawn += 1
            yield indices

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["sampler"], name)

    def begin_pass(self, loader_pass: LoaderPass) -> None:
        """Set the pass to which deliveries belong; an earlier pass is over."""
        loader_pass.belongs_to(self)
        self.current_pass = loader_pass

    def take(self, position: int, *, in_order: bool) -> Any:
        """Return the indices at a position, and forget them.

        Args:
            position: Which batch of the pass, from 0.
            in_order: Whether batches are delivered in order. Then indices that were
                drawn earlier are forgotten, too: a worker failed to load their batch.
        """
        indices, self.draw = self.kept.pop(position, (None, self.draw))
        if in_order and self.kept:
            self.kept = {k: v for k, v in self.kept.items() if k > position}
        return indices


def _observed_loader(base: type) -> type:
    """Make the subclass of a loader's class whose passes are observed."""

    class Observed(base):
        @property
        def _index_sampler(self) -> Any:
            """The sampler of an iterator; torch reads this once for each iterator.

            So every iterator has a recording of its own, and several iterators, or one
            that is left and another that follows, cannot be confused.
            """
            sampler = super()._index_sampler
            if get_worker_info():
                return sampler
            ends_draw = vars(self).get("_pi_ends_draw", _always)
            return RecordedIndices(sampler, ends_draw)

        def _get_iterator(self) -> Any:
            """Begin a pass with a new iterator."""
            observer, make = self._pi_observer, super()._get_iterator
            if get_worker_info():  # a copy inside another loader's worker process
                return make()
            observer.follow_new_collate(self.collate_fn)
            if observer.follow_items and not makes_own_iterators(base):
                make = partial(_following_iterator, self, base, observer.batch_dim)
            return observer.begin_pass(self, make)

    return Observed


def _observed_iterator(base: type) -> type:
    """Make the subclass of an iterator's class that reports what it returns."""

    class Observed(base):
        # torch calls _reset in the constructor, too, but then the object still has its
        # own class: this method is only called for the later passes of an iterator
        # with persistent workers.
        def _reset(self, loader: Any, *first_iter: Any) -> None:
            """Begin another pass with the same worker processes."""
            observer = observer_of(loader) or self._pi_observer
            restart = partial(super()._reset, loader, *first_iter)
            observer.begin_pass(loader, lambda: restart() or self)

        def _get_data(self) -> Any:
            """Note which batch a worker has finished, for ``in_order=False``."""
            received = super()._get_data()
            self._pi_received = received[0]
            return received

        def __next__(self) -> Any:
            """Return the next batch, and report it with its indices."""
            indices = index_sampler(self)
            try:
                batch = super().__next__()
            except StopIteration:
                self._pi_observer.end_pass(indices.current_pass)
                raise
            taken = self._pi_take(indices)
            return self._pi_observer.deliver(
                batch, taken, indices.current_pass, draw=indices.draw
            )

        def _pi_take(self, indices: RecordedIndices) -> Any:
            """Return the indices of the batch that was returned last.

            Without workers these are the newest. With workers later batches have been
            drawn already, and torch's counter says which one was returned; out of
            order it is the one that a worker has finished last.
            """
            if not has_workers(self):
                return indices.take(indices.num_drawn - 1, in_order=True)
            position = received_position(self)
            if position is None:
                return indices.take(self._pi_received, in_order=False)
            return indices.take(position, in_order=True)

        def _pi_skip(self, num_batches: int) -> None:
            """Skip batches without reporting them.

            Without workers only their indices are drawn, and nothing is loaded. With
            workers torch has handed out the first batches already, so they are loaded
            and dropped.
            """
            indices = index_sampler(self)
            try:
                for _ in range(num_batches):
                    if has_workers(self):
                        super().__next__()
                    else:
                        next_index(self)
                    self._pi_take(indices)
            except StopIteration:
                pass  # the pass that is resumed was at its end

    return Observed


def _following_iterator(loader: Any, base: Any, batch_dim: int) -> Any:
    """Make an iterator whose ``collate_fn`` also finds out which item is which sample.

    Torch reads the loader's attributes while it makes an iterator. It is given a
    shallow copy, so that the user's loader keeps its own ``collate_fn`` at all times:
    another thread or a forked worker process may look at it.
    """
    copy = _without_state(type(loader))
    vars(copy).update(vars(loader))
    vars(copy)["collate_fn"] = FollowingCollate(
        loader.collate_fn,
        is_single=loader.batch_sampler is None,
        batch_dim=batch_dim,
    )
    return base._get_iterator(copy)


def _without_state(cls: Any) -> Any:
    """Make an object of a class without initialising it."""
    return cls.__new__(cls)
