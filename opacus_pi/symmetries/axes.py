"""Which dimensions of which tensors must be permuted together: atoms, unions.

A dimension is a product of *atoms*, outermost first: the columns of a layer after
a flattened image are (channels, pixels), the rows of an attention projection (heads,
width of a head). Atoms are unified where an operation pairs them, split where a reshape
cuts them, and pinned where an operation depends on their order.
"""

from collections.abc import Iterable, Sequence
from math import prod

Dims = list[list["Atom"]]  # a tensor's dimensions, each a product of atoms


class Atom:
    """A dimension or a factor of one (a node of a union-find forest).

    Args:
        size: Number of indices.
        fixed: Whether its order matters, so that it may not be permuted.
        outer: The atom of which this one is the inner part after a split.
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
        """The atoms that this one has become, outermost first."""
        atom = self._representative()
        if atom._parts is None:
            return [atom]
        return [leaf for part in atom._parts for leaf in part.leaves()]

    def split(self, outer_size: int) -> None:
        """Cut a leaf into an outer atom of that size and an inner one."""
        outer = Atom(outer_size, self.fixed, self.outer)
        self._parts = outer, Atom(self.size // outer_size, self.fixed, outer)

    def merge(self, other: "Atom") -> None:
        """Make two leaves of one size the same atom."""
        if other is not self:
            other._same = self
            self.fixed |= other.fixed
            self.outer = self.outer or other.outer

    def _representative(self) -> "Atom":
        """The atom that stands for all those merged with this one."""
        atom = self
        while atom._same is not None:
            atom = atom._same
        return atom


def fresh(shape: Iterable[int], fixed: bool = False) -> Dims:
    """Dimensions of a tensor about which nothing is known yet (size 1: no atom)."""
    return [[Atom(size, fixed)] if size != 1 else [] for size in shape]


def resolved(dim: Sequence[Atom]) -> list[Atom]:
    """A dimension's atoms as they are now."""
    return [leaf for atom in dim for leaf in atom.leaves()]


def pin(dims: Iterable[Sequence[Atom]]) -> None:
    """Forbid any permutation of these dimensions."""
    for dim in dims:
        for atom in resolved(dim):
            atom.fixed = True


def unify(first: Sequence[Atom], second: Sequence[Atom]) -> None:
    """Demand one permutation for two dimensions of the same size.

    Where their factors cannot be matched, both are pinned.
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
            pin([left, right])
            return
        left, right = resolved(left), resolved(right)


def regroup(atoms: Sequence[Atom], shape: Sequence[int]) -> Dims:
    """Cut a row-major run of atoms into dimensions of the given sizes.

    Where a cut would go through an atom unevenly, all of them are pinned.
    """
    queue, dims = resolved(atoms), []
    for size in shape:
        dim: list[Atom] = []
        while (missing := size // max(prod(a.size for a in dim), 1)) > 1:
            atom = queue.pop(0)
            if atom.size > missing or missing % atom.size:
                if atom.size % missing:
                    pin([atoms])
                    return fresh(shape, fixed=True)
                atom.split(missing)
                atom, inner = atom.leaves()
                queue.insert(0, inner)
            dim.append(atom)
        dims.append(dim)
    return dims
