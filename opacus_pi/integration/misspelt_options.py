"""Finds misspelt options of ``make_private``, which Opacus ignores without a word.

Opacus hands all options on to several methods and to the optimizer, and each takes what
it knows. So nothing complains of a name that none of them knows, and the default of the
option that was meant applies.

>>> misspelt({"noise_multiplier": 1.0, "poisson_samplng": False}, opacus.PrivacyEngine)
{'poisson_samplng': 'poisson_sampling'}
"""

import difflib
import inspect
from collections.abc import Collection
from functools import lru_cache

import opacus
import opacus.optimizers

__all__ = ["misspelt"]

_METHODS = (
    "make_private",
    "make_private_with_epsilon",
    "_prepare_model",
    "_prepare_optimizer",
    "_prepare_data_loader",
    "_prepare_criterion",
)
_ALIKE = 0.8  # share of equal letters above which another name is meant


def misspelt(options: Collection[str], engine: type) -> dict[str, str]:
    """Return the options that nothing takes, with the name that may have been meant.

    Names that resemble no option are left out: a derived engine may take them in a way
    that its signatures do not show.

    Args:
        options: Names of options.
        engine: The class of the engine.
    """
    found: dict[str, str] = {}
    known = _known(engine)
    for name in sorted(set(options) - known):
        meant = difflib.get_close_matches(name, known, 1, _ALIKE)
        if meant:
            found[name] = meant[0]
    return found


@lru_cache(maxsize=32)
def _known(engine: type) -> frozenset[str]:
    """Return the names that the methods of an engine and the optimizers declare."""
    optimizers = [x for x in vars(opacus.optimizers).values() if inspect.isclass(x)]
    functions = [vars(base).get("__init__") for x in optimizers for base in x.__mro__]
    functions += [vars(base).get(name) for base in engine.__mro__ for name in _METHODS]
    found: set[str] = set()
    for function in filter(inspect.isfunction, functions):
        found |= set(inspect.signature(function).parameters)
    return frozenset(found)
