"""Collect what an engine prepares, also if a derived class prepares it in another way.

Programs extend Opacus's engine by subclasses that override ``make_private`` or one of
the methods that it calls, and return models, optimizers and loaders of their own. So
recording does not depend on which of our methods were called: it begins when a
``make_private`` has returned, with the objects that it returned. If it was called by an
override that returns other objects, it begins again with those.

**What is guaranteed.** A run is recorded if its optimizer clips and adds noise by the
very functions of Opacus whose effect this package knows. Otherwise the reason names the
class and the method. A subclass may override everything else, ``step`` for example.

**What breaks it.** An optimizer that calls Opacus's methods, and changes gradients
before or after by other means than these methods.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

from opacus.grad_sample import AbstractGradSampleHooks
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.optimizers import DPPerLayerOptimizer as PerLayer
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch.utils.data import DataLoader

from opacus_pi._class_swap import plain_class
from opacus_pi.integration.opacus_compat import (
    CRITERIA,
    GHOST_METHODS,
    OPTIMIZER_METHODS,
    STEP_METHODS,
    module_of,
)

__all__ = [
    "Preparation",
    "own_scaling",
    "own_step",
    "record_overrides",
    "records",
    "shadowed_method",
    "shown_as",
]

Method = TypeVar("Method", bound=Callable[..., Any])
_KINDS: dict[str, type] = {
    "hooks": AbstractGradSampleHooks,
    "optimizer": DPOptimizer,
    "criterion": DPLossFastGradientClipping,
    "loader": DataLoader,
}
_NAMES = {
    "hooks": "a model that Opacus has prepared",
    "optimizer": "an optimizer of Opacus",
    "loader": "a data loader",
}
_NOT_PREPARED = (
    "{engine}.make_private was called, but nothing is recorded: it neither returned "
    "nor prepared {missing}. Return what Opacus's make_private returns, or call "
    "super().make_private(...)."
)
_OWN_METHOD = (
    "{owner} has a method {method} of its own, so it is not known what enters an "
    "update. Only the clipping and the noise of Opacus's own optimizers can be "
    "accounted for. Keep Opacus's own {method} (an optimizer may override step), or "
    'account for the training by hand with accountant="per_instance" (begin, record).'
)

_OWN_STEP = (
    "{owner} has a method {method} of its own, and it updated the weights without "
    "Opacus's add_noise. The update is then not private, and neither get_epsilon nor "
    "the ledger covers it. Call the original method in yours, or remove it."
)
_OWN_SCALING = (
    "{owner} has a method {method} of its own, which changed the gradients after noise "
    "was added to them. That is fine if it only scales them. If it adds gradients "
    "without noise, the update is not private, and neither get_epsilon nor the ledger "
    "covers it."
)


@dataclass
class Preparation:
    """The objects that an engine has prepared so far.

    Opacus calls a method of the engine for each object, and none of these methods sees
    what the others returned.

    Args:
        hooks: What Opacus made of the model, a wrapper or hooks.
        optimizer: The private optimizer.
        criterion: In the ghost modes, the criterion.
        loader: The loader that training will iterate over.
        asked: The arguments of our ``make_private``; None if it was not called.
    """

    hooks: AbstractGradSampleHooks | None = None
    optimizer: DPOptimizer | None = None
    criterion: DPLossFastGradientClipping | None = None
    loader: DataLoader[Any] | None = None
    asked: dict[str, Any] | None = None
    _recorded: tuple[Any, ...] = ()

    def take(self, result: Any) -> bool:
        """Replace prepared objects by those that ``make_private`` returned.

        Args:
            result: Usually a tuple; its objects are distinguished by their types.

        Returns:
            Whether there is now a run to be recorded, other than the one at the last
            call: an override may return other objects than the method that it calls.
        """
        returned = result if isinstance(result, tuple | list) else [result]
        for name, kind in _KINDS.items():
            of_kind = [found for found in returned if isinstance(found, kind)]
            if of_kind:
                setattr(self, name, of_kind[0])
        before = self._recorded
        self._recorded = (self.hooks, self.optimizer, self.criterion, self.loader)
        pairs = zip(before, self._recorded, strict=False)
        is_new = not before or any(one is not other for one, other in pairs)
        return is_new and not self.missing()

    def missing(self) -> list[str]:
        """Return what was neither returned nor prepared."""
        return [text for name, text in _NAMES.items() if getattr(self, name) is None]

    def unrecordable(self, engine: object) -> str | None:
        """Return why the run cannot be recorded at all; None if it can.

        Args:
            engine: The engine whose ``make_private`` has returned.
        """
        missing = self.missing()
        if not missing:
            return None
        return _NOT_PREPARED.format(
            engine=type(engine).__name__, missing=" and ".join(missing)
        )

    def own_rule(self) -> str | None:
        """Return why a replaced method rules out accounting.

        Returns:
            A message that names the method. None if clipping and noise are those of
            Opacus's own classes and the criterion is a known one.
        """
        for owner, method in self._own_methods():
            return _OWN_METHOD.format(owner=owner, method=method)
        return None

    def _own_methods(self) -> Iterator[tuple[str, str]]:
        """Yield classes that override what clips or adds noise, and the method."""
        yield from _overriding(self.optimizer, OPTIMIZER_METHODS)
        if isinstance(self.optimizer, DPOptimizerFastGradientClipping):
            yield from _overriding(self.hooks, GHOST_METHODS)
            if self.criterion is None:
                yield "The criterion of ghost clipping", "__call__"
            elif plain_class(self.criterion) not in CRITERIA:
                yield plain_class(self.criterion).__name__, "__call__"

    def options(self) -> dict[str, Any]:
        """Return arguments of ``make_private`` that would prepare the same run."""
        optimizer: Any = self.optimizer
        is_ghost = isinstance(optimizer, DPOptimizerFastGradientClipping)
        flat = optimizer.clip_and_accumulate.__func__ is DPOptimizer.clip_and_accumulate
        is_per_layer = isinstance(optimizer, PerLayer)
        return {
            "module": module_of(self.hooks) if self.hooks is not None else None,
            "data_loader": self.loader,
            "noise_multiplier": float(optimizer.noise_multiplier),
            "clipping": "per_layer" if is_per_layer else "flat" if flat else "own",
            "grad_sample_mode": "ghost" if is_ghost else "hooks",
            "poisson_sampling": False,  # the loader is what training iterates over
        }


def _overriding(
    instance: Any, known: dict[str, frozenset[Any]]
) -> Iterator[tuple[str, str]]:
    """Yield class and name of each method that is none of the known functions.

    Args:
        instance: An object of Opacus, or of a class derived from Opacus's.
        known: By name of a method: the functions whose effect is known.
    """
    cls = plain_class(instance)
    for name, functions in known.items():
        if name in vars(instance):
            yield f"This {cls.__name__} object", name
        elif inspect.getattr_static(cls, name, None) not in {None, *functions}:
            yield cls.__name__, name


def shadowed_method(optimizer: DPOptimizer) -> str | None:
    """Return why an update cannot be accounted for, if the optimizer has own methods.

    Args:
        optimizer: The optimizer, which may have been changed since it was prepared.
    """
    if OPTIMIZER_METHODS.keys().isdisjoint(vars(optimizer).keys()):
        return None
    name = next(n for n in OPTIMIZER_METHODS if n in vars(optimizer))
    owner = f"This {type(optimizer).__name__} object"
    return _OWN_METHOD.format(owner=owner, method=name)


def own_step(optimizer: DPOptimizer) -> str | None:
    """Return a reason that names the method which updated the weights without noise.

    Args:
        optimizer: An optimizer whose ``add_noise`` of ours has not run, although the
            weights are about to be updated.

    Returns:
        None if all its methods are Opacus's: then something else made the update.
    """
    known = {"add_noise": OPTIMIZER_METHODS["add_noise"], **STEP_METHODS}
    # Learning rate schedulers wrap ``step``, and such wrappers call what they wrap.
    own = vars(optimizer)
    known = {n: f for n, f in known.items() if not hasattr(own.get(n), "__wrapped__")}
    for owner, method in _overriding(optimizer, known):
        return _OWN_STEP.format(owner=owner, method=method)
    return None


def own_scaling(optimizer: DPOptimizer) -> str | None:
    """Return a reason if a ``scale_grad`` that is not Opacus's changed the gradients.

    Args:
        optimizer: An optimizer whose gradients have changed since noise was added.

    Returns:
        None if the method is Opacus's: then something else has changed them.
    """
    known = {"scale_grad": STEP_METHODS["scale_grad"]}
    for owner, method in _overriding(optimizer, known):
        return _OWN_SCALING.format(owner=owner, method=method)
    return None


# ------------------------------------------------------------------- derived engines
_PREPARE = ("make_private", "make_private_with_epsilon")
_RECORDS = "_pi_records"  # mark of a method after which recording begins


def records(method: Method) -> Method:
    """Have an engine record what a method of it prepares.

    Args:
        method: ``make_private``, or an override of it; its signature stays.
    """

    @wraps(method)
    def prepare(self: Any, *arguments: Any, **options: Any) -> Any:
        return self._prepare_and_record(lambda: method(self, *arguments, **options))

    vars(prepare)[_RECORDS] = True
    return cast(Method, prepare)


def shown_as(original: Any, **options: Any) -> Callable[[Method], Method]:
    """Give a method the signature of Opacus's for ``inspect`` and ``help``.

    Programs and tests that compare signatures, or fill arguments by them, then see no
    difference. Type checkers see the annotations of the method itself, which
    ``functools.wraps`` would replace by a type that cannot be bound to an instance.

    Args:
        original: Opacus's method.
        **options: Options of ``functools.wraps``; ``assigned=()`` keeps the docstring.
    """

    def decorate(method: Method) -> Method:
        return cast(Method, wraps(original, **options)(method))

    return decorate


def record_overrides(engine: type, original: type) -> None:
    """Have an engine's class record, whichever class its ``make_private`` is from.

    Args:
        engine: A class derived from our mixin; changed where it, or a class that it is
            mixed with, overrides one of the methods.
        original: Opacus's engine, whose methods call ours.
    """
    for name in _PREPARE:
        method = getattr(engine, name, None)
        is_known = method is getattr(original, name) or hasattr(method, _RECORDS)
        if callable(method) and not is_known:
            setattr(engine, name, records(method))
