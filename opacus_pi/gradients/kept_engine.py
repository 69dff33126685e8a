"""Keep the engine of the last call, for norms that are measured in a loop.

An engine copies the model, and checks the norms of its first batch against plain
autograd (:mod:`~opacus_pi.gradients.norm_engine`). Both would be repeated at every call
of :func:`~opacus_pi.gradients.per_example_grad_norms`. The engine of the last call is
therefore used again if the model is the same object and of the same structure
(:mod:`~opacus_pi.models.structure`), and criterion and inputs are of the same kind. New
values of weights, buffers and other tensors do not matter.

The guarantee: norms are those that a new engine would give. What breaks it is what
breaks an engine within a sweep: a model that behaves otherwise on a later batch. An
engine whose first batch has changed the structure of its copy, as a counter of calls
would, is not kept. If the change was that the forward pass wrote attributes, the next
engine's first batch shows whether it reads them before it writes them. If not, as where
a model stores its last loss, their values do not matter. One engine is kept in a
process, as long as its model exists; it has no copy of the weights.
"""

import weakref
from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from opacus_pi._torch_compat import pytree
from opacus_pi.gradients.norm_engine import NormEngine
from opacus_pi.models.copies import unwrap
from opacus_pi.models.own_losses import Criterion
from opacus_pi.models.structure import Place, structure_of


@dataclass(frozen=True)
class _Kept:
    """An engine that may be used again.

    Attributes:
        model: The unwrapped model that it was made for.
        made_for: A description of model, criterion and inputs.
        engine: The engine.
    """

    model: weakref.ref[nn.Module]
    made_for: Hashable
    engine: NormEngine


_kept: list[_Kept] = []  # at most one, and none while it is used
# What forward passes write: attributes that they may not read first. None: they do.
_written: WeakKeyDictionary[nn.Module, frozenset[Place] | None] = WeakKeyDictionary()


@contextmanager
def kept_engine(
    model: nn.Module, criterion: Criterion, x: Any, y: Any
) -> Iterator[NormEngine]:
    """Yield the engine of the last call if it fits, otherwise a new one.

    Args:
        model: As for :class:`~opacus_pi.gradients.norm_engine.NormEngine`.
        criterion: The same.
        x: Inputs of the batch to be measured.
        y: Their targets.

    Raises:
        ValueError: As the engine does.
    """
    plain = unwrap(model)
    written = _written.get(plain) or frozenset()
    made_for = _described(plain, criterion, x, y, written)
    kept = _taken()
    if kept and made_for and kept.model() is plain and kept.made_for == made_for:
        kept.engine.take_values(plain, written)
        yield kept.engine
        _kept[:] = [kept]
        return
    engine = NormEngine(model, criterion)
    structure = engine.structure(written)
    observed = engine.observed_attributes(written)
    yield engine
    observed.end()
    if observed.read or _written.get(plain, written) is None:
        _written[plain] = None
    elif observed.written:
        _written[plain] = written | observed.written
    elif made_for and structure is not None and engine.structure(written) == structure:
        _kept[:] = [_Kept(weakref.ref(plain, _drop), made_for, engine)]


def _taken() -> _Kept | None:
    """Return the engine that was kept, which no other call can take then."""
    try:
        return _kept.pop()
    except IndexError:
        return None


def _drop(model: weakref.ref[nn.Module]) -> None:
    """Drop the engine of a model that no longer exists."""
    _kept[:] = [one for one in _kept if one.model is not model]


def _described(
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any,
    ignored: Collection[Place],
) -> Hashable | None:
    """Return what an engine depends on; ``None`` if it cannot be described.

    A loss module is described by its attributes, so that an equal one fits. One with
    class weights cannot be: its values may change.

    Args:
        model: An unwrapped module.
        criterion: The criterion.
        x: Inputs.
        y: Targets.
        ignored: Attributes of the model whose values do not matter.
    """
    structure, loss = structure_of(model, ignored), _loss(criterion)
    if structure is None or loss is None:
        return None
    leaves, shape = pytree.tree_flatten((x, y))
    kinds = [
        (v.dim(), v.dtype, v.device) if isinstance(v, Tensor) else type(v)
        for v in leaves
    ]
    return structure, loss, str(shape), tuple(kinds)


def _loss(criterion: Criterion) -> Hashable | None:
    """Return the description of a criterion; ``None`` if there is none."""
    if not isinstance(criterion, nn.Module):
        return criterion if isinstance(criterion, Hashable) else None
    has_values = [*criterion.parameters(), *criterion.buffers()]
    return None if has_values else structure_of(criterion)
