"""Find out whether the layers of a model are given the examples in the batch's order.

Opacus takes row i of a layer's input for example i of the batch. A model may sort the
examples before a layer and restore their order afterwards, as packed sequences do. Its
outputs for an example then depend on no other example, but the gradients of this layer
are added to those that other layers have for other examples.

When half of the examples of a batch is replaced, the rows of the other half must
therefore stay, in the input of every layer with trainable weights. Rows are compared by
one number each: their product with a fixed vector.

The rows of the examples that are replaced should change. If no row of a layer does,
they may be the nodes of a graph or the entries of a table, of which there happen to be
as many as examples (``fixed_layers``). Rows that are all alike, up to rounding, are
those of the examples if there is one less without the last example: a model may give
every example the same vector, such as a learned query, or the same first word. For
other rows the probe looks whether they are rows of a state of the examples that the
loop passes.

A layer may also have one row for each of the examples, and fewer rows if some of them
are replaced by others of the batch: its rows are then computed from the values of the
examples, as ``torch.unique`` does (``uneven_layers``). Such rows are in an order of
their own if they are not reversed when the examples are (``not_reversed``).

**What breaks it.** Layers whose input has another number of rows than the batch has
examples are not compared, except those of Opacus's recurrent layers, whose sequences
end one after another. For the others Opacus raises an error, or
``integration/unequal_calls.py`` says so. Nor are inputs compared if the shape of a row
depends on the content of the batch. Equal rows that a model makes, one for each
example, and then uses for other examples are taken for those of the examples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi.models.batches import tensors_of

__all__ = [
    "LayerRows",
    "fixed_layers",
    "moved_layers",
    "not_reversed",
    "stayed_calls",
    "uneven_layers",
    "watch_rows",
]

_STEPS = "RNNLinear"  # Opacus's layer that is called once for each time step


@dataclass(frozen=True)
class LayerRows:
    """The rows of the input of one call of a layer.

    Attributes:
        name: The layer's name in the model.
        shape: The shape of a row.
        rows: One number for each row, ``(n,)``, in the precision of the model.
        spread: The largest difference of an entry from that of the first row, ``()``:
            relative to the largest entry, and absolute for whole numbers.
        may_end: Whether fewer rows than examples are the first examples.
    """

    name: str
    shape: tuple[int, ...]
    rows: Tensor
    spread: Tensor
    may_end: bool


def watch_rows(
    copied: nn.Module, model: nn.Module, dim: int, found: list[LayerRows]
) -> None:
    """Note the rows of every call of a layer that is trained.

    Args:
        copied: A copy of the model, which is given hooks.
        model: The model; which of its weights are trained is read here.
        dim: The dimension of the examples.
        found: Calls are added to it, in their order.
    """
    layers = zip(model.named_modules(), copied.modules(), strict=True)
    for (name, layer), ours in layers:
        own = layer.parameters(recurse=False)
        if not any(p.requires_grad for p in own) or isinstance(layer, nn.EmbeddingBag):
            continue
        may_end = type(layer).__name__ == _STEPS
        along = 0 if may_end else dim
        see = partial(_see, name, may_end=may_end, dim=along, add=found.append)
        ours.register_forward_pre_hook(see, with_kwargs=True)


def _see(
    name: str,
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    may_end: bool,
    dim: int,
    add: Callable[[LayerRows], None],
) -> None:
    """Note one call of a layer, by its first input."""
    tensors = tensors_of((args, kwargs))
    if not tensors or tensors[0].dim() <= dim:
        return
    rows = tensors[0].detach().movedim(dim, 0)
    flat = rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)
    flat = flat if flat.is_floating_point() else flat.double()
    places = torch.arange(1, flat.shape[1] + 1, device=flat.device)
    projected = flat @ places.float().sin().to(flat.dtype)
    spread = _spread(flat, is_rounded=rows.is_floating_point())
    add(LayerRows(name, tuple(rows.shape[1:]), projected, spread, may_end))


def _spread(flat: Tensor, *, is_rounded: bool) -> Tensor:
    """Return how far the rows are from the first one, as ``LayerRows.spread``.

    Args:
        flat: The rows, ``(n, d)``.
        is_rounded: Whether their entries are not whole numbers.
    """
    if not flat.numel():
        return flat.new_zeros(())
    first = flat[0]
    largest = torch.where(flat == first, 0.0, (flat - first).abs()).amax()
    if not is_rounded:
        return largest
    return largest / flat.abs().amax().clamp(min=torch.finfo(flat.dtype).tiny)


def moved_layers(
    whole: Sequence[LayerRows],
    changed: Sequence[LayerRows],
    kept: Tensor,
    size: int,
    tolerance: float,
) -> Iterator[str]:
    """Yield the names of layers in which rows of examples that stayed have changed.

    Args:
        whole: The calls in a run on a batch.
        changed: Those in a run on the batch in which half of the examples is replaced.
        kept: Positions of the examples that stayed.
        size: The number of examples.
        tolerance: What rounding may change, relative to the largest row.
    """
    for one, other in zip(whole, changed, strict=False):
        if (one.name, one.shape) != (other.name, other.shape):
            continue
        num_rows = min(len(one.rows), len(other.rows))
        if num_rows > size or (num_rows < size and not one.may_end):
            continue
        places = kept[kept < num_rows].to(one.rows.device)
        before, after = one.rows[places], other.rows[places]
        alike = (before == after) | (before.isnan() & after.isnan())
        gap = torch.where(alike, 0.0, (before - after).abs())
        scale = one.rows.nan_to_num(0.0, 0.0, 0.0).abs().max() if num_rows else 1.0
        if bool((gap.nan_to_num(torch.inf) > tolerance * scale).any()):
            yield one.name


def not_reversed(
    whole: Sequence[LayerRows],
    backwards: Sequence[LayerRows],
    size: int,
    tolerance: float,
) -> set[str]:
    """Return the layers whose rows are not reversed although the examples are.

    Args:
        whole: The calls in a run on a batch that draws no random numbers.
        backwards: Those in a run on the examples in reverse order.
        size: The number of examples; layers with another number of rows are left out.
        tolerance: As for ``moved_layers``.
    """
    all_rows = [replace(one, may_end=False) for one in whole]
    turned = [replace(one, rows=one.rows.flip(0)) for one in backwards]
    return set(moved_layers(all_rows, turned, torch.arange(size), size, tolerance))


def uneven_layers(
    whole: Sequence[LayerRows], changed: Sequence[LayerRows], size: int
) -> Iterator[tuple[str, int]]:
    """Yield layers that have one row for each example, but not if some are replaced.

    Layers whose rows stay, as far as there are any, are left out: they may be positions
    up to the longest length (``fixed_layers``).

    Args:
        whole: The calls in a run on a batch.
        changed: Those in a run on the batch in which examples were replaced.
        size: The number of examples.

    Yields:
        The name of a layer, and how many rows it had when examples were replaced.
    """
    for one, other in zip(whole, changed, strict=False):
        is_same_call = (one.name, one.shape) == (other.name, other.shape)
        has_uneven = len(one.rows) == size != len(other.rows) and not one.may_end
        if is_same_call and has_uneven and not _have_stayed(one, other):
            yield one.name, len(other.rows)


def _have_stayed(one: LayerRows, other: LayerRows) -> bool:
    """Return whether the rows of two calls are equal, as far as both have rows."""
    num_rows = min(len(one.rows), len(other.rows))
    return num_rows > 0 and torch.equal(one.rows[:num_rows], other.rows[:num_rows])


def stayed_calls(
    whole: Sequence[LayerRows], changed: Sequence[LayerRows], size: int
) -> set[int]:
    """Return the calls whose rows all stayed although examples were replaced.

    Args:
        whole: The calls in a run on a batch.
        changed: Those in a run on the batch in which examples were replaced.
        size: The number of examples; calls with another number of rows are left out.

    Returns:
        Places in ``whole``.
    """
    return {
        place
        for place, (one, other) in enumerate(zip(whole, changed, strict=False))
        if one.name == other.name and len(one.rows) == size and _have_stayed(one, other)
    }


def fixed_layers(
    whole: Sequence[LayerRows],
    stayed: set[int],
    fewer: Sequence[LayerRows],
    tolerance: float,
) -> set[str]:
    """Return the layers whose rows may be other things than the examples.

    Rows that are alike are those of the examples if the last one is missing without
    the last example. If this is not known, they have to be equal bit for bit.

    Args:
        whole: The calls in a run on a batch that draws no random numbers.
        stayed: Places of the calls whose rows stayed when examples were replaced.
        fewer: The calls in a run without the last example; empty if there is none.
        tolerance: What rounding may change, relative to the largest entry, below 1.
    """
    found = set()
    for place in stayed:
        one, spread = whole[place], float(whole[place].spread)
        other = fewer[place] if place < len(fewer) else None
        if other is not None and other.name == one.name:
            is_alike = spread <= tolerance and len(other.rows) < len(one.rows)
        else:
            is_alike = spread == 0.0
        if not is_alike:
            found.add(one.name)
    return found
