"""Name the permutation symmetries of a network from the dimensions of its tensors.

The idea: a dimension is a product of *atoms*, outermost first. The columns of a layer
after a flattened image are (channels, pixels); the rows of an attention projection are
(heads, width of a head). Operations unify atoms that they pair, split atoms that a
reshape cuts, and fix atoms whose order they depend on. After a traced run, every atom
that is still free is a *symbol*: an independent permutation of hidden units.

The guarantee: where the rules cannot follow an operation, its atoms are fixed, so fewer
symmetries are found but never a wrong one. What breaks it is a wrong rule in
``operation_rules.py``; ``permutation_spec`` therefore checks each result numerically.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from torch import Tensor

Dims = list[list["Atom"]]  # the dimensions of a tensor, each a product of atoms


class Atom:
    """A dimension, or a factor of one: a node of a union-find forest.

    An atom begins as a whole dimension. During the run it can be merged with an atom of
    another tensor (both need the same permutation), split into an outer and an inner
    part, or fixed. References to it stay valid: ``leaves`` returns what it has become.

    >>> pixels = Atom(12)
    >>> pixels.split(3)
    >>> [leaf.size for leaf in pixels.leaves()]
    [3, 4]

    Args:
        size: Number of indices.
        fixed: Whether the order of the indices matters, so that they may not be
            permuted. An atom that is fixed stays fixed.
        outer: The outer part, if this atom is the inner part of a split atom.
    """

    def __init__(
        self, size: int, fixed: bool = False, outer: "Atom | None" = None
    ) -> None:
        self.size = size
        self.fixed = fixed
        self.outer = outer
        self._same: Atom | None = None
        self._parts: tuple[Atom, Atom] | None = None

    def leaves(self) -> list["Atom"]:
        """Return the atoms that this one was split into, outermost first."""
        atom = self._representative()
        if atom._parts is None:
            return [atom]
        return [leaf for part in atom._parts for leaf in part.leaves()]

    def split(self, outer_size: int) -> None:
        """Split a leaf into an outer atom of the given size and an inner atom.

        The parts of a fixed atom are fixed. The inner part remembers the outer one,
        because it may get one permutation for each index of it: see ``_inner_parts``.

        Args:
            outer_size: Size of the outer atom; it must divide the size of this one.
        """
        outer = Atom(outer_size, self.fixed, self.outer)
        self._parts = outer, Atom(self.size // outer_size, self.fixed, outer)

    def merge(self, other: "Atom") -> None:
        """Identify this leaf with another leaf of the same size.

        If one of them is fixed, both are from now on.

        Args:
            other: The other leaf. Both must come from ``leaves``: merging an atom that
                was split or merged before would lose what is known about it.
        """
        if other is not self:
            other._same = self
            self.fixed |= other.fixed
            self.outer = self.outer or other.outer

    def _representative(self) -> "Atom":
        """Return the atom that represents all atoms merged with this one."""
        atom = self
        while atom._same is not None:
            atom = atom._same
        return atom


def fresh(shape: Iterable[int], fixed: bool = False) -> Dims:
    """Return dimensions with new atoms; a dimension of size 1 has no atom.

    There is nothing to permute in a dimension of size 1. Without an atom it can be
    broadcast, inserted and removed without a special case.

    Args:
        shape: The shape of the tensor.
        fixed: Whether the order of its indices matters.
    """
    return [[Atom(size, fixed)] if size != 1 else [] for size in shape]


def resolved(dim: Sequence[Atom]) -> list[Atom]:
    """Return the current leaves of a dimension, outermost first.

    Atoms that were stored before a merge or a split are out of date, so every function
    here resolves a dimension before it looks at sizes or at ``fixed``.
    """
    return [leaf for atom in dim for leaf in atom.leaves()]


def fix(dims: Iterable[Sequence[Atom]]) -> None:
    """Fix the order of these dimensions, and of all dimensions merged with them.

    This cannot be undone. It is the safe answer wherever a rule does not know better: a
    permutation is lost, but no wrong one is found.
    """
    for dim in dims:
        for atom in resolved(dim):
            atom.fixed = True


def unify(first: Sequence[Atom], second: Sequence[Atom]) -> None:
    """Require the same permutation of two dimensions of equal size.

    The factors are compared from the outside in. Where one side has a larger factor
    that the other side's factor divides, it is split. If the factors cannot be matched,
    both dimensions are fixed.

    >>> whole, height, width = Atom(6), Atom(2), Atom(3)
    >>> unify([whole], [height, width])
    >>> [leaf.size for leaf in whole.leaves()]
    [2, 3]

    Args:
        first: Atoms of one dimension.
        second: Atoms of the other dimension, of the same total size.
    """
    left, right = resolved(first), resolved(second)
    while left and right:
        a, b = left[0], right[0]
        if a.size == b.size:
            a.merge(b)
            left, right = left[1:], right[1:]
        elif max(a.size, b.size) % min(a.size, b.size) == 0:
            max(a, b, key=lambda atom: atom.size).split(min(a.size, b.size))
        else:
            fix([left, right])
            return
        left, right = resolved(left), resolved(right)


def regroup(atoms: Sequence[Atom], shape: Sequence[int]) -> Dims:
    """Distribute row-major atoms over dimensions of the given sizes, as a reshape does.

    An atom that a boundary cuts evenly is split there. If a boundary would cut an atom
    unevenly, all atoms are fixed.

    >>> image = [Atom(3), Atom(4), Atom(4)]
    >>> [[atom.size for atom in dim] for dim in regroup(image, (3, 16))]
    [[3], [4, 4]]

    Args:
        atoms: The atoms of all dimensions before the reshape, outermost first.
        shape: The sizes afterwards; their product is that of the atoms.

    Returns:
        One dimension for each size.
    """
    queue, dims = resolved(atoms), []
    for size in shape:
        dim: list[Atom] = []
        while (missing := size // max(prod(a.size for a in dim), 1)) > 1:
            atom = queue.pop(0)
            if atom.size > missing or missing % atom.size:
                if atom.size % missing:
                    fix([atoms])
                    return fresh(shape, fixed=True)
                atom.split(missing)
                atom, inner = atom.leaves()
                queue.insert(0, inner)
            dim.append(atom)
        dims.append(dim)
    return dims


class Symbol(NamedTuple):
    """An independent permutation of hidden units.

    Attributes:
        size: Number of indices.
        outer: Name of the outer symbol, if this symbol is the inner part of a split.
            There is then one permutation for each index of the outer symbol.
    """

    size: int
    outer: str | None


class Factor(NamedTuple):
    """A factor of a dimension: the name of its symbol, or ``None`` if it is fixed."""

    symbol: str | None
    size: int


Axes = tuple[tuple[Factor, ...], ...]


def name_symbols(
    state: Mapping[str, Tensor],
    seen: Mapping[int, Dims],
    outputs: Sequence[Dims | None],
) -> tuple[dict[str, Symbol], dict[str, Axes], tuple[tuple[int, Axes], ...]]:
    """Name each free atom after the tensor and dimension where it first appears.

    Args:
        state: Parameters and buffers of the traced model, by name.
        seen: Dimensions of every tensor of the run by its ``id``, in order of use.
        outputs: Dimensions of the first output of each operation; ``None`` if it is not
            an activation.

    Returns:
        Symbols by name; the axes of each tensor of ``state`` that the run used; and the
        axes of the activations in which symbols appear, each with its number in
        ``outputs``.
    """
    # Merges and splits went on until the run's end: look up what each atom became.
    current = {key: [resolved(dim) for dim in dims] for key, dims in seen.items()}
    used = _used_tensors(state, current)
    names = _names(used)
    outer_of = _inner_parts(used.values(), current.values())
    symbols = {
        name: Symbol(atom.size, names[outer_of[atom]] if atom in outer_of else None)
        for atom, name in names.items()
    }
    axes = {name: _axes(dims, names) for name, dims in used.items()}
    return symbols, axes, _sites(outputs, names)


def _used_tensors(
    state: Mapping[str, Tensor], current: Mapping[int, Dims]
) -> dict[str, Dims]:
    """Return the dimensions of the parameters and buffers of the run, in order of use.

    The order decides which tensor a symbol is named after. A tensor that the run did
    not use, such as the counter of batches in BatchNorm, is left out and never
    permuted.

    Args:
        state: Parameters and buffers by name.
        current: Dimensions of every tensor of the run by its ``id``, resolved.
    """
    order = {key: number for number, key in enumerate(current)}
    used = [name for name in state if id(state[name]) in order]
    used.sort(key=lambda name: order[id(state[name])])
    return {name: current[id(state[name])] for name in used}


def _sites(
    outputs: Sequence[Dims | None], names: Mapping[Atom, str]
) -> tuple[tuple[int, Axes], ...]:
    """Return the axes of the activations in which a symbol appears, by number.

    ``activation_matching`` compares two networks at these places; activations whose
    units all have a fixed order would contribute nothing.

    Args:
        outputs: As in ``name_symbols``.
        names: Names of the free atoms.
    """
    activations = [
        (number, _axes([resolved(dim) for dim in dims], names))
        for number, dims in enumerate(outputs)
        if dims is not None
    ]
    return tuple((number, axes) for number, axes in activations if _has_symbol(axes))


def _has_symbol(axes: Axes) -> bool:
    """Return whether some factor of the axes may be permuted."""
    return any(factor.symbol for dim in axes for factor in dim)


def _names(used: Mapping[str, Dims]) -> dict[Atom, str]:
    """Return a name for each free atom of the parameters and buffers.

    The name is that of the first tensor that has the atom, with the number of the
    dimension, as in ``0.weight[0]``. If the dimension has several factors, the number
    of the factor follows, as in ``attention.in_proj_weight[0.1]``. An atom that appears
    in activations only has no name: permuting it would change no weight.
    """
    names: dict[Atom, str] = {}
    for tensor, dims in used.items():
        for d, dim in enumerate(dims):
            for k, atom in enumerate(dim):
                if not atom.fixed and atom not in names:
                    place = f"[{d}]" if len(dim) == 1 else f"[{d}.{k}]"
                    names[atom] = tensor + place
    return names


def _axes(dims: Dims, names: Mapping[Atom, str]) -> Axes:
    """Return the dimensions of a tensor as factors."""
    return tuple(tuple(Factor(names.get(a), a.size) for a in dim) for dim in dims)


def _inner_parts(used: Iterable[Dims], seen: Iterable[Dims]) -> dict[Atom, Atom]:
    """Return the inner atoms that may have one permutation per index of an outer atom.

    An inner atom qualifies if its outer atom is free, occurs in every tensor of the run
    that has the inner atom, and stands directly before it in every parameter. Otherwise
    (a weight that all heads share, say) the inner atom has one permutation for all.

    Args:
        used: Dimensions of the parameters and buffers.
        seen: Dimensions of all tensors of the run.

    Returns:
        The outer atom of each inner atom that qualifies.
    """
    candidates, broken = _beside_their_outer_atoms(seen)
    for dims in used:
        for dim in dims:
            for before, atom in zip([None, *dim], dim, strict=False):
                if candidates.get(atom) is not before:
                    broken.add(atom)
        _keep_one_inner_part_each(dims, candidates, broken)
    kept = {atom: outer for atom, outer in candidates.items() if atom not in broken}
    return {atom: outer for atom, outer in kept.items() if outer not in kept}


def _beside_their_outer_atoms(
    seen: Iterable[Dims],
) -> tuple[dict[Atom, Atom], set[Atom]]:
    """Return inner atoms with their outer atoms, and the atoms that ever lack one.

    A tensor that has an inner atom without its outer atom (a weight shared by all
    heads) cannot be permuted differently for each outer index.

    Args:
        seen: Dimensions of all tensors of the run.
    """
    candidates: dict[Atom, Atom] = {}
    broken: set[Atom] = set()
    for dims in seen:
        present = {atom for dim in dims for atom in dim}
        for atom in present:
            outer = _free_outer(atom)
            if outer in present:
                candidates[atom] = outer
            else:
                broken.add(atom)
    return candidates, broken


def _free_outer(atom: Atom) -> Atom | None:
    """Return an inner atom's outer atom; None without one, or if one is fixed."""
    if atom.outer is None or atom.fixed:
        return None
    outer = atom.outer.leaves()[-1]
    return None if outer.fixed else outer


def _keep_one_inner_part_each(
    dims: Dims, candidates: Mapping[Atom, Atom], broken: set[Atom]
) -> None:
    """Within one tensor, let each outer atom keep only one of its inner atoms.

    The rows that ``matching`` compares are pairs (outer index, inner index) of one
    inner part. A second inner part in the same tensor would make their gains depend on
    each other. Its atom is added to ``broken`` and gets one permutation for all outer
    indices.

    Args:
        dims: Dimensions of the tensor.
        candidates: The outer atom of each inner atom that may qualify.
        broken: Atoms that do not qualify; changed in place.
    """
    taken: dict[Atom, Atom] = {}
    for dim in dims:
        for atom in dim:
            if atom in candidates and atom not in broken:
                if taken.setdefault(candidates[atom], atom) is not atom:
                    broken.add(atom)
