"""What an audit repeats of a run that was prepared: how it trains, and on what."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from opacus_pi.custody.function_copies import copied_if_possible
from opacus_pi.integration.schedules import user_collate_fn
from opacus_pi.models.batches import size_of
from opacus_pi.models.no_trace import isolated
from opacus_pi.models.own_generators import OwnGenerators
from opacus_pi.recording import Recorder

__all__ = ["AuditedRun", "Examples", "audited_run"]

_SWEPT = "swept"  # in place of a grad_sample_mode: norms of a sweep
_MAX_EXAMPLES = 32  # of one batch: each is differentiated alone


@dataclass(frozen=True)
class Examples:
    """Source of the batches of an audit.

    Attributes:
        data_set: The training set.
        collate_fn: Makes a batch of a list of examples; None: torch's own.
        batch_size: The expected number of examples of a batch.
        is_batched: Whether ``collate_fn`` is given a batch, which the data set makes of
            a list of indices, as with ``DataLoader(data_set, batch_size=None,
            sampler=BatchSampler(...))``.
    """

    data_set: Dataset[Any]
    collate_fn: Callable[[Any], Any] | None
    batch_size: int
    is_batched: bool = False

    def batches(self, num_batches: int) -> Iterator[Any]:
        """Yield batches of different examples, as training would collate them.

        Args:
            num_batches: As for ``places``.
        """
        for places in self.places(num_batches):
            yield self.collated(self.items(places))

    def collated(self, items: list[Any]) -> Any:
        """Return a batch of items, collated by a copy of ``collate_fn`` if possible.

        Args:
            items: Of the data set; ``collate_fn`` may change them.
        """
        collate = copied_if_possible(self.collate_fn or default_collate)
        with isolated(), OwnGenerators():
            return collate(default_collate(items) if self.is_batched else items)

    def places(self, num_batches: int) -> Iterator[list[int]]:
        """Yield positions of different examples, in a random order with a fixed seed.

        The order comes from a new generator, so no global random state changes.

        Args:
            num_batches: The number of lists; fewer are made if the data set has too
                few examples.
        """
        num_examples = size_of(self.data_set)
        size = min(_MAX_EXAMPLES, max(2, self.batch_size), num_examples)
        order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(0))
        for start in range(0, min(num_batches * size, num_examples - 1), size):
            yield order[start : start + size].tolist()

    def items(self, places: list[int]) -> list[Any]:
        """Read examples.

        Args:
            places: Their positions in the data set.
        """
        with isolated(), OwnGenerators():
            return [self.data_set[place] for place in places]


@dataclass(frozen=True)
class AuditedRun:
    """The parts of a prepared run that an audit repeats.

    Attributes:
        mode: The ``grad_sample_mode``, or ``"swept"``.
        loss_reduction: The ``loss_reduction`` that ``make_private`` was given.
        batch_first: Whether examples are along the first dimension.
        examples: Where batches come from; None if they are given.
        registered: The doubt about per-example gradients by functions of the user's,
            which right norms settle; empty: there is none.
    """

    mode: str = "hooks"
    loss_reduction: str = "mean"
    batch_first: bool = True
    examples: Examples | None = None
    registered: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """Reduce to what a copy of the engine has: it has no run to be audited.

        Nor can every data set and ``collate_fn`` be pickled.
        """
        return AuditedRun, (self.mode, self.loss_reduction, self.batch_first)

    @property
    def is_swept(self) -> bool:
        """Whether norms are measured by sweeps, and not where training clips."""
        return self.mode == _SWEPT

    @property
    def batch_dim(self) -> int:
        """The dimension of the inputs along which the examples are."""
        return 0 if self.batch_first else 1


def audited_run(
    loader: DataLoader[Any],
    *,
    recorder: Recorder,
    grad_sample_mode: str = "hooks",
    loss_reduction: str = "mean",
    batch_first: bool = True,
    **_: Any,
) -> AuditedRun:
    """Return what an audit repeats of a run that was prepared.

    Args:
        loader: The loader that training will iterate over.
        recorder: The engine's recorder.
        grad_sample_mode: As it was passed to ``make_private``.
        loss_reduction: As it was passed to ``make_private``.
        batch_first: As it was passed to ``make_private``.
        **_: Its other options.
    """
    batch_size = math.ceil(size_of(loader.dataset) / len(loader))
    is_batched = loader.batch_sampler is None
    return AuditedRun(
        _SWEPT if recorder.mode == _SWEPT else grad_sample_mode,
        loss_reduction,
        batch_first,
        Examples(loader.dataset, user_collate_fn(loader), batch_size, is_batched),
    )
