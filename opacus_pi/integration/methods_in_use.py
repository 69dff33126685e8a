"""Find methods of Opacus that are replaced while a run is under way.

``derived`` looks at the methods of an optimizer when ``make_private`` has returned. A
program may replace one later: in a class of Opacus, in a class derived from it, or by a
mixin that it puts in front of the optimizer's class. So the functions that clip and add
noise are noted, and compared in every update by their identity.

*Guarantee.* A function that is another one at the time of an update is found. The
comparison takes about a microsecond.

*What breaks it.* Functions that are replaced in other places, such as ``torch.normal``;
``drawn_noise`` compares the size of the noise.
"""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from opacus.grad_sample import AbstractGradSampleHooks
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

from opacus_pi.integration.opacus_compat import (
    GHOST_LOSS,
    GHOST_METHODS,
    OPTIMIZER_METHODS,
    noise_function,
)

__all__ = ["MethodsInUse"]

_METHODS = (*OPTIMIZER_METHODS, "scale_grad")
_GHOST = tuple(GHOST_METHODS)
_OF_NOISE = ("add_noise", "scale_grad")
_REPLACED = (
    "The function {method} of {owner} was replaced after make_private, so it is not "
    "known what enters an update. Only the clipping and the noise of Opacus's own "
    "optimizers can be accounted for. Keep Opacus's own {method}, or account for the "
    'training by hand with accountant="per_instance" (begin, record).'
)

# Where functions are looked up: an object, and the names.
_Place = tuple[Any, tuple[str, ...]]


class MethodsInUse:
    """The functions that clip and add noise, as they were when a run began.

    Args:
        optimizer: What Opacus made of the optimizer, with our class.
        hooks: What Opacus made of the model; its methods clip in ghost clipping.
    """

    def __init__(self, optimizer: DPOptimizer, hooks: AbstractGradSampleHooks) -> None:
        known = [c for c in type(optimizer).__mro__ if issubclass(c, DPOptimizer)]
        places: list[_Place] = [(cls, _names_in(cls)) for cls in known]
        if isinstance(optimizer, DPOptimizerFastGradientClipping):
            places += [(type(hooks), _GHOST), *GHOST_LOSS.items()]
        self._places = tuple(places)
        self._getters = tuple((place, attrgetter(*names)) for place, names in places)
        self._noted = [get(place) for place, get in self._getters]
        self._first = self._noted[0]
        self._resolved = attrgetter(*places[0][1])
        self._noise = noise_function()

    def are_replaced(self, optimizer: DPOptimizer) -> bool:
        """Return whether one of the functions is another one now.

        Args:
            optimizer: The optimizer, whose class may be another one.
        """
        return not (
            self._resolved(type(optimizer)) == self._first
            and [get(place) for place, get in self._getters] == self._noted
            and noise_function() is self._noise
        )

    def reason(self, optimizer: DPOptimizer) -> tuple[str, str]:
        """Return the link that breaks, and why.

        Args:
            optimizer: One for which ``are_replaced`` is true.
        """
        owner, method = next(self._replaced(optimizer))
        is_noise = method in (*_OF_NOISE, self._noise.__name__)
        link = "noise" if is_noise else "norm"
        return link, _REPLACED.format(owner=owner, method=method)

    def _replaced(self, optimizer: DPOptimizer) -> Iterator[tuple[str, str]]:
        """Yield the owner and the name of each function that is another one.

        The most basic class comes first: classes that derive from it inherit a change.
        """
        noted = [_listed(*pair) for pair in zip(self._places, self._noted, strict=True)]
        derived = (type(optimizer), self._places[0][1]), noted[0][1]
        for (owner, names), functions in [*reversed(noted), derived]:
            for name, function in zip(names, functions, strict=True):
                if getattr(owner, name) is not function:
                    yield owner.__name__, name
        yield self._noise.__module__, self._noise.__name__


def _names_in(cls: type) -> tuple[str, ...]:
    """Return the methods that a class has: only ghost clipping has ``accumulate``."""
    return tuple(name for name in _METHODS if hasattr(cls, name))


def _listed(place: _Place, functions: Any) -> tuple[_Place, tuple[Any, ...]]:
    """Return a place and its functions, of which ``attrgetter`` may return one only."""
    return place, functions if len(place[1]) > 1 else (functions,)
