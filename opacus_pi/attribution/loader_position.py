"""Where a training loop is in its pass over a loader, and how to get there again.

The loader stays the user's object: its class is replaced by a subclass that counts the
batches handed out and remembers the random states with which the pass began. After
resuming, the first pass begins with those states, skips the batches already used, and
goes on with the random states of the moment that was saved.

Relies on these private names of ``torch.utils.data.dataloader``, which a test pins: of
its iterators, ``_num_workers`` and ``_next_index``.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any, SupportsIndex

from opacus.utils import batch_memory_manager
from torch.utils.data import DataLoader

from opacus_pi._class_swap import swap_class
from opacus_pi._validate import expect
from opacus_pi.integration import schedules
from opacus_pi.recording.random_states import RandomStates

_START = "start."
_IN_PARTS = (
    "It was taken within an epoch of BatchMemoryManager's loader, whose batches cannot "
    "be skipped. Save between epochs."
)
_AHEAD = (
    "It was taken within an epoch, and workers had drawn later batches from torch's "
    "global generator. Save between epochs, or use DataLoader(generator=...) with a "
    "generator of its own."
)
_PERSISTENT = (
    "Persistent workers go on with random states of their own, which no checkpoint "
    "holds. If the data set draws random numbers, the resumed run is not the one that "
    "was not interrupted, to the bit. Use persistent_workers=False."
)
_UNKNOWN = "It was taken within an epoch, which cannot be repeated. Save between them."


class Position:
    """How far the pass over a loader has come that is under way.

    Args:
        random_states: The generators of the run.
        loader: The loader that is trained from; changed in place and referred to
            weakly.
    """

    def __init__(self, random_states: RandomStates, loader: DataLoader[Any]) -> None:
        self._random_states = random_states
        self._loader = weakref.ref(loader)
        self._iterator: Callable[[], Any] = _nothing
        self._num_delivered = 0
        self._in_parts = False
        self._start: dict[str, Any] = {}
        self._pending: tuple[int, dict[str, Any], dict[str, Any]] | None = None
        _follow(loader, self)

    @property
    def under_way(self) -> bool:
        """Whether a loop has begun a pass, and neither ended nor left it."""
        return self._iterator() is not None

    def obstacle(self) -> str:
        """Why a run cannot be resumed from this moment; empty if it can."""
        if not self.under_way:
            return ""
        if self._in_parts:
            return _IN_PARTS
        loader = self._loader()
        if loader is None:
            return _UNKNOWN
        if loader.num_workers == 0:
            return ""
        if schedules.unknown_schedule(loader):
            return _UNKNOWN
        return _AHEAD if _draws_globally(loader, self._random_states) else ""

    def state(self) -> dict[str, Any]:
        """What ``resume`` needs besides the random states of now."""
        if not self.under_way:
            return {"num_delivered": -1}
        start = {f"{_START}{name}": value for name, value in self._start.items()}
        return {"num_delivered": self._num_delivered, **start}

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse what ``state`` cannot have returned.

        Raises:
            ValueError: If it is damaged, or of a run with other generators.
        """
        num_delivered: Any = state.get("num_delivered")
        expect(
            type(num_delivered) is int and num_delivered >= -1,
            "the saved position",
            num_delivered,
            "must be a number of batches",
            "Resume from another checkpoint.",
        )
        if num_delivered >= 0:
            self._random_states.check(_start_of(state))

    def resume(self, state: Mapping[str, Any], now: dict[str, Any]) -> None:
        """Have the next pass be the rest of the one that was saved, if there was one.

        Args:
            state: What ``state`` returned.
            now: The random states of that moment.
        """
        start, num_delivered = _start_of(state), state["num_delivered"]
        self._iterator = _nothing
        self._pending = (num_delivered, start, now) if num_delivered >= 0 else None
        if getattr(self._loader(), "persistent_workers", False):
            warnings.warn(_PERSISTENT, stacklevel=2)

    def begin(
        self, make: Callable[[], Iterator[Any]], *, in_parts: bool
    ) -> Iterator[Any]:
        """Begin a pass.

        Args:
            make: Makes the loader's iterator.
            in_parts: Whether its batches are parts of the batches of an update.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            self._start = self._random_states.collect()
            return self._began(make(), in_parts)
        expect(
            not in_parts,
            "BatchMemoryManager",
            "the rest of an epoch",
            "must be given whole epochs",
            "Resume from a checkpoint that was taken between epochs.",
        )
        num_delivered, self._start, now = pending
        self._random_states.restore(self._start)
        iterator = self._began(make(), in_parts)
        _skip(iterator, num_delivered)
        self._num_delivered = num_delivered
        self._random_states.restore(now)
        return iterator

    def _began(self, iterator: Iterator[Any], in_parts: bool) -> Iterator[Any]:
        """Follow an iterator that has handed out nothing yet."""
        swap_class(iterator, _counted_iterator)
        vars(iterator)["_pi_position"] = self
        self._iterator, self._in_parts = weakref.ref(iterator), in_parts
        self._num_delivered = 0
        return iterator

    def delivered(self, iterator: Iterator[Any]) -> None:
        """An iterator hands out a batch."""
        if iterator is self._iterator():
            self._num_delivered += 1

    def ended(self, iterator: Iterator[Any]) -> None:
        """An iterator has no more batches."""
        if iterator is self._iterator():
            self._iterator = _nothing


def follow_memory_manager() -> None:
    """Have passes over ``BatchMemoryManager``'s loaders noticed."""
    build = batch_memory_manager.wrap_data_loader
    if hasattr(build, "_pi_followed"):
        return

    @wraps(build)
    def wrap_data_loader(
        *, data_loader: DataLoader[Any], **options: Any
    ) -> DataLoader[Any]:
        loader: DataLoader[Any] = build(data_loader=data_loader, **options)
        position = getattr(data_loader, "_pi_position", None)
        if position is not None:
            _follow(loader, position)
            loader._pi_in_parts = True
        return loader

    vars(wrap_data_loader)["_pi_followed"] = True
    batch_memory_manager.wrap_data_loader = wrap_data_loader


def _follow(loader: DataLoader[Any], position: Position) -> None:
    """Have a loader begin its passes by way of a position."""
    swap_class(loader, _followed_loader)
    loader._pi_position = position


def _start_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The random states with which a saved pass began."""
    names = [name for name in state if name.startswith(_START)]
    return {name.removeprefix(_START): state[name] for name in names}


def _skip(iterator: Any, num_batches: int) -> None:
    """Go past batches; without workers they are not even loaded."""
    go_on = iterator.__next__ if iterator._num_workers else iterator._next_index
    try:
        for _ in range(num_batches):
            go_on()
    except StopIteration:
        pass  # the pass was at its end


def _draws_globally(loader: DataLoader[Any], random_states: RandomStates) -> bool:
    """Whether batches are drawn one by one from a generator that others draw from."""
    own = getattr(loader.batch_sampler, "generator", None)
    shared = own is None or own is random_states.generators.get("noise")
    return schedules.is_poisson(loader) and shared


def _followed_loader(base: type) -> type:
    """A loader that begins its passes by way of a position."""

    class Followed(base):
        _pi_in_parts = False

        def __iter__(self) -> Any:
            return self._pi_position.begin(super().__iter__, in_parts=self._pi_in_parts)

        def __reduce_ex__(
            self, protocol: SupportsIndex
        ) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
            plain = next(c for c in type(self).__mro__ if "_pi_swaps" not in vars(c))
            state = {k: v for k, v in vars(self).items() if not k.startswith("_pi_")}
            return _empty, (plain,), state

    return Followed


def _counted_iterator(base: type) -> type:
    """A loader's iterator that tells how far it has come."""

    class Counted(base):
        def __next__(self) -> Any:
            try:
                batch = super().__next__()
            except StopIteration:
                self._pi_position.ended(self)
                raise
            self._pi_position.delivered(self)
            return batch

    return Counted


def _empty(cls: Any) -> Any:
    """An object of a class without its state."""
    return cls.__new__(cls)


def _nothing() -> None:
    """A reference to nothing."""
