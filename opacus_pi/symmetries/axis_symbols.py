"""From the atoms of a traced run to named symbols and the axes of each tensor."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from opacus_pi.symmetries.axes import Atom, Dims, resolved
from opacus_pi.symmetries.axis_tracing import AxisTracer


class Symbol(NamedTuple):
    """An independent permutation.

    Attributes:
        size: Number of indices.
        outer: The symbol of which this one is the inner part, if any: then there is one
            permutation for each index of the outer symbol.
    """

    size: int
    outer: str | None


class Factor(NamedTuple):
    """A factor of a dimension: a symbol's name, or ``None`` if it stays in place."""

    symbol: str | None
    size: int


Axes = tuple[tuple[Factor, ...], ...]


def name_symbols(
    state: Mapping[str, Tensor], tracer: AxisTracer
) -> tuple[dict[str, Symbol], dict[str, Axes], tuple[tuple[int, Axes], ...]]:
    """Name the free atoms after the tensor and dimension where they first appear.

    Args:
        state: The traced model's parameters and buffers by name.
        tracer: The traced run.

    Returns:
        Symbols by name, axes of each tensor that the run used, and the numbered
        activations in which symbols appear.
    """
    seen = {
        key: [resolved(dim) for dim in dims] for key, (_, dims) in tracer.seen.items()
    }
    numbers = {key: number for number, key in enumerate(seen)}
    in_order = sorted(
        (name for name in state if id(state[name]) in numbers),
        key=lambda name: numbers[id(state[name])],
    )
    used = {name: seen[id(state[name])] for name in in_order}
    names = _names(used)
    links = _links(used.values(), seen.values())
    symbols = {
        name: Symbol(atom.size, names[links[atom]] if atom in links else None)
        for atom, name in names.items()
    }
    sites = tuple(
        (number, _axes([resolved(dim) for dim in dims], names))
        for number, dims in enumerate(tracer.outputs)
        if dims is not None
    )
    sites = tuple(s for s in sites if any(f.symbol for dim in s[1] for f in dim))
    return symbols, {name: _axes(dims, names) for name, dims in used.items()}, sites


def _names(used: Mapping[str, Dims]) -> dict[Atom, str]:
    """A name for each free atom of a tensor of the state."""
    names: dict[Atom, str] = {}
    for tensor, dims in used.items():
        for d, dim in enumerate(dims):
            for k, atom in enumerate(dim):
                if not atom.fixed and atom not in names:
                    place = f"[{d}]" if len(dim) == 1 else f"[{d}.{k}]"
                    names[atom] = tensor + place
    return names


def _axes(dims: Dims, names: Mapping[Atom, str]) -> Axes:
    """A tensor's dimensions as factors."""
    return tuple(tuple(Factor(names.get(a), a.size) for a in dim) for dim in dims)


def _links(used: Iterable[Dims], seen: Iterable[Dims]) -> dict[Atom, Atom]:
    """Inner atoms that may have one permutation for each index of their outer atom.

    This needs the outer atom beside the inner one wherever the latter appears: in every
    tensor of the run, and directly before it in every parameter. Else (a weight shared
    by all heads, say) the inner atom has one permutation for all.
    """
    links: dict[Atom, Atom] = {}
    broken: set[Atom] = set()
    for dims in seen:
        present = {atom for dim in dims for atom in dim}
        for atom in present:
            outer = _outer(atom)
            if outer is None or outer.fixed or atom.fixed or outer not in present:
                broken.add(atom)
            else:
                links[atom] = outer
    for dims in used:
        for dim in dims:
            for before, atom in zip([None, *dim], dim, strict=False):
                if links.get(atom) is not before:
                    broken.add(atom)
        _one_inner_part_each(dims, links, broken)
    links = {atom: outer for atom, outer in links.items() if atom not in broken}
    return {atom: outer for atom, outer in links.items() if outer not in links}


def _one_inner_part_each(
    dims: Dims, links: Mapping[Atom, Atom], broken: set[Atom]
) -> None:
    """Within one tensor an outer atom keeps one of its inner parts."""
    taken: dict[Atom, Atom] = {}
    for dim in dims:
        for atom in dim:
            if atom in links and atom not in broken:
                if taken.setdefault(links[atom], atom) is not atom:
                    broken.add(atom)


def _outer(atom: Atom) -> Atom | None:
    """The leaf of which this one is the inner part."""
    return atom.outer.leaves()[-1] if atom.outer is not None else None
