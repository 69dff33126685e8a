"""Draw data that may have to be deleted as late as possible.

An exact rewind goes back to a state from before an example was first drawn. If the
sources of data that may be deleted come last, little has to be trained again.

*Guarantee.* No example of a source is drawn before all passes over the sources before
it are complete, and no batch mixes two sources, or two passes. The order of the batches
does not depend on the data.

>>> batches = DeletableLast([range(4), [4, 5]], batch_size=2, num_passes=2)
>>> batches.boundaries()
(4,)
>>> [sorted(batch) for epoch in range(2) for batch in batches][4:]
[[4, 5], [4, 5]]
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from opacus_pi._validate import distinct_indices, expect, positive, require

__all__ = ["DeletableLast"]


class DeletableLast(Sampler[list[int]]):
    """A batch sampler that finishes one source of data before the next one begins.

    Pass it as ``DataLoader(data_set, batch_sampler=...)``, train with
    ``poisson_sampling=False``, and iterate over the loader ``num_passes`` times.
    Together these iterations are ``num_passes`` shuffled passes over the first source,
    then as many over the second one, and so on; each of them yields the same number of
    batches.

    Args:
        sources: Positions of the examples of each source, the ones to be kept first.
            Together they are all examples of the data set, each once.
        batch_size: Examples of a batch; the last one of a pass over a source may have
            fewer.
        num_passes: How often each example is drawn.
        generator: Source of the order; None: a new one, seeded from torch's global one.

    Raises:
        ValueError: If a source is empty, or the sources are not all positions once.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[int]],
        batch_size: int,
        num_passes: int = 1,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        positive(
            batch_size=batch_size,
            num_passes=num_passes,
            remedy="Pass a whole number of at least 1.",
        )
        self.sources = [list(map(int, source)) for source in sources]
        everything = [i for source in self.sources for i in source]
        distinct_indices("sources", everything, len(everything))
        expect(
            all(self.sources),
            "sources",
            "an empty source",
            "must each contain an example",
            "Leave out sources without examples.",
        )
        self.batch_size, self.num_passes = batch_size, num_passes
        self.generator = generator
        self._num_begun = 0
        self._seed: int | None = None

    def __len__(self) -> int:
        """Return the number of batches of one pass over the loader."""
        return sum(-(-len(source) // self.batch_size) for source in self.sources)

    def __iter__(self) -> Iterator[list[int]]:
        """Return the batches of the next pass over the loader.

        Raises:
            ValueError: If all passes were made.
        """
        require(
            self._num_begun < self.num_passes,
            f"The loader began pass {self._num_begun + 1}, but num_passes of "
            f"DeletableLast is {self.num_passes}.",
            "Set num_passes to the number of epochs of the training.",
        )
        first = self._num_begun * len(self)
        self._num_begun += 1
        return iter(self._all_batches()[first : first + len(self)])

    def boundaries(self) -> tuple[int, ...]:
        """Return after how many updates of the training each later source begins."""
        ends: list[int] = []
        for source in self.sources[:-1]:
            before = ends[-1] if ends else 0
            ends.append(before + self.num_passes * -(-len(source) // self.batch_size))
        return tuple(ends)

    def _all_batches(self) -> list[list[int]]:
        """Return all batches of the training, the same at every call."""
        if self._seed is None:
            generator, bound = self.generator, 2**62
            self._seed = int(torch.randint(bound, (), generator=generator))
        order = torch.Generator().manual_seed(self._seed)
        found = []
        for source in self.sources:
            for _ in range(self.num_passes):
                shuffled = torch.randperm(len(source), generator=order).tolist()
                drawn = [source[i] for i in shuffled]
                starts = range(0, len(drawn), self.batch_size)
                found += [drawn[s : s + self.batch_size] for s in starts]
        return found
