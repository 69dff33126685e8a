"""The position of a training loop in its pass over a loader, saved and restored.

The random states at the start of a pass determine its batches. These states are kept,
with the number of batches that the loop has received. After resuming, the first pass
begins with these states, skips the batches that were used before the checkpoint, and
goes on with the random states of the moment when the checkpoint was taken.

*Guarantee.* The rest of the epoch consists of the same batches, to the bit, and so does
everything that is drawn from the random generators afterwards.

*What breaks it.* Batches that are parts of others (``BatchMemoryManager``); workers
that draw ahead from a generator that the loop also draws from; iterators that are not
torch's. Then ``obstacle`` says why, and nothing can be resumed. Persistent workers with
random data sets cannot be detected in time: ``check`` warns of them.
"""

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import DataLoader

from opacus_pi._validate import expect
from opacus_pi.attribution.delivery import LoaderPass
from opacus_pi.attribution.observer import observe, observer_of
from opacus_pi.recording.random_states import RandomStates

__all__ = ["EpochPosition"]

_START = "start."  # of the names of the random states with which the pass began
_IN_PARTS = (
    "It was saved during an epoch of BatchMemoryManager's loader, whose batches cannot "
    "be skipped. Save between epochs."
)
_AHEAD = (
    "It was saved during an epoch, when workers had already drawn later batches from "
    "torch's global generator. Save between epochs, or use DataLoader(generator=...) "
    "with a generator of its own."
)
_PERSISTENT = (
    "Persistent workers keep random states of their own, which no checkpoint contains. "
    "If the data set draws random numbers, the resumed run differs from one that was "
    "not interrupted. Use persistent_workers=False."
)
_UNKNOWN = (
    "It was saved during an epoch whose order cannot be repeated. Save between epochs."
)


class EpochPosition:
    """The position in the newest pass over a loader, for exact resuming.

    It is a number of batches together with the random states with which the pass began:
    a pass drawn again from these states delivers the same batches in the same order.

    Args:
        random_states: The generators of the run.
        loader: The loader of the training loop; observed from now on, and held by a
            weak reference.
        is_repeatable: Whether the same random states give the same batches again.
        is_poisson: Whether batches are drawn one by one while the pass goes on, so that
            workers draw them ahead of the loop.
    """

    def __init__(
        self,
        random_states: RandomStates,
        loader: DataLoader[Any],
        *,
        is_repeatable: bool = True,
        is_poisson: bool = False,
    ) -> None:
        self._random_states = random_states
        self._loader = weakref.ref(loader)
        self._is_repeatable, self._is_poisson = is_repeatable, is_poisson
        self._pass: LoaderPass | None = None
        self._start: dict[str, Any] = {}
        self._pending: tuple[int, dict[str, Any], dict[str, Any]] | None = None
        self._observer = observer_of(loader) or observe(loader)
        self._observer.position = self

    @property
    def under_way(self) -> bool:
        """Return whether a loop has begun a pass, and has neither ended nor left it."""
        return self._pass is not None and self._pass.is_under_way

    def obstacle(self) -> str:
        """Return why a run cannot be resumed from this moment; empty if it can."""
        if self._observer.num_unobserved_passes:
            return _UNKNOWN  # such a pass may be under way, or not: it is not observed
        if self._pass is None or not self.under_way:
            return ""
        if self._pass.in_parts:
            return _IN_PARTS
        loader = self._loader()
        if loader is None:
            return _UNKNOWN
        return self._obstacle_of_workers(loader) if loader.num_workers else ""

    def _obstacle_of_workers(self, loader: DataLoader[Any]) -> str:
        """Return why batches that workers drew ahead cannot be drawn again."""
        if not self._is_repeatable:
            return _UNKNOWN
        return _AHEAD if self._draws_ahead(loader) else ""

    def _draws_ahead(self, loader: DataLoader[Any]) -> bool:
        """Return whether workers draw batches from a generator that the loop uses."""
        own = getattr(loader.batch_sampler, "generator", None)
        is_shared = own is None or own is self._random_states.generators.get("noise")
        return self._is_poisson and is_shared

    def state(self) -> dict[str, Any]:
        """Return what ``resume`` needs besides the random states of this moment.

        Returns:
            ``"num_delivered"``: batches that the loop has received in this pass, -1
            between passes; and the random states with which the pass began, each under
            its name with a prefix.
        """
        if self._pass is None or not self.under_way:
            return {"num_delivered": -1}
        start = {f"{_START}{name}": value for name, value in self._start.items()}
        return {"num_delivered": self._pass.num_delivered, **start}

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that ``state`` cannot have returned.

        Warns if persistent workers have random states that were not saved.

        Args:
            state: The saved state.

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
        if getattr(self._loader(), "persistent_workers", False):
            warnings.warn(_PERSISTENT, stacklevel=2)

    def resume(self, state: Mapping[str, Any], now: dict[str, Any]) -> None:
        """Make the next pass continue the saved one, if a pass was saved.

        Args:
            state: What ``state`` returned.
            now: The random states of the moment when it was saved.
        """
        start, num_delivered = _start_of(state), state["num_delivered"]
        self._pass = None
        self._pending = (num_delivered, start, now) if num_delivered >= 0 else None

    def begin_pass(self, loader_pass: LoaderPass, make: Callable[[], Any]) -> Any:
        """Begin a pass, or the rest of the one that was saved.

        Args:
            loader_pass: The pass.
            make: Makes its iterator, or restarts a persistent one.

        Returns:
            The iterator.

        Raises:
            ValueError: If a pass must be continued, but the batches of this loader are
                given in parts or cannot be skipped.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            self._start = self._random_states.collect()
            iterator = make()
            self._pass = loader_pass
            return iterator
        expect(
            not loader_pass.in_parts,
            "BatchMemoryManager's loader",
            "a checkpoint that was saved during an epoch",
            "must start at the beginning of an epoch",
            "Resume from a checkpoint that was saved between epochs.",
        )
        num_delivered, self._start, now = pending
        self._random_states.restore(self._start)
        iterator, self._pass = make(), loader_pass
        skip: Any = getattr(iterator, "_pi_skip", None)
        expect(
            skip is not None,
            "the loader's iterator",
            type(iterator).__name__,
            "must be an iterator of torch's DataLoader, because batches used before "
            "must be skipped",
            "Resume from a checkpoint that was saved between epochs.",
        )
        skip(num_delivered)
        loader_pass.num_delivered = num_delivered
        self._random_states.restore(now)
        return iterator


def _start_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the random states with which a saved pass began."""
    names = [name for name in state if name.startswith(_START)]
    return {name.removeprefix(_START): state[name] for name in names}
