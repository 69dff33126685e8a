"""Sampling schedules: how often a data loader draws an example, if that is known.

Privacy accounting needs to know the schedule: Poisson sampling (each example is drawn
independently in each update), or a fixed one (without replacement, in an order that
does not depend on the data, and each example at most once in a batch; how often it was
drawn is counted). Each check returns the reason why a loader has neither, with what to
do about it, or None. Training goes on in any case; only the numbers are refused.
"""

import weakref
from collections.abc import Callable
from typing import Any, TypeGuard, cast

from opacus.data_loader import CollateFnWithEmpty
from opacus.utils.uniform_sampler import (
    DistributedUniformWithReplacementSampler,
    UniformWithReplacementSampler,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from opacus_pi.custody import Chain
from opacus_pi.models.batches import size_of
from opacus_pi.recording.deletable_last import DeletableLast

_ALIKE = (
    SequentialSampler,
    RandomSampler,
    DistributedSampler,
    UniformWithReplacementSampler,
    DistributedUniformWithReplacementSampler,
    type(None),
)
_ONCE_PER_EPOCH = (SequentialSampler, SubsetRandomSampler, DistributedSampler)
_SEEDABLE = ("accelerate.data_loader", "SeedableRandomSampler")


def is_poisson(loader: DataLoader[Any]) -> bool:
    """Return whether a loader draws every example independently in each update.

    Subclasses of Opacus's samplers do not count: they may draw in another way.
    """
    return type(loader.batch_sampler) in (
        UniformWithReplacementSampler,
        DistributedUniformWithReplacementSampler,
    )


def unknown_schedule(loader: DataLoader[Any]) -> str | None:
    """Explain why it is not known how often a loader draws an example.

    Args:
        loader: The loader that training iterates over, the user's or Opacus's.

    Returns:
        The reason; None for Poisson sampling at the rate that Opacus accounts for, and
        for a loader that draws without replacement. ``RandomSampler`` may do so several
        times in a pass, if no batch has examples of two of these times.
    """
    if is_poisson(loader):
        rate = cast(Any, loader.batch_sampler).sample_rate
        # Opacus passes 1 / len(loader) to its accountant, whatever the sampler's rate
        if rate * len(loader) <= 1.001:
            return None
        return (
            f"The sampler draws at rate {rate:g}, but Opacus accounts for "
            f"1/{len(loader)}, one over the loader's length. Create the sampler with "
            "steps=int(1 / sample_rate)."
        )
    if isinstance(loader.dataset, IterableDataset):
        return (
            "An iterable data set has no positions, so its samples cannot be matched "
            "to examples. Use a map-style data set."
        )
    batches = loader.batch_sampler
    if type(batches) is DeletableLast:
        return None  # how often it has drawn each example is counted
    sampler = getattr(batches, "sampler", loader.sampler)
    without_replacement = type(sampler) in _ONCE_PER_EPOCH or (
        _is_random(sampler) and not sampler.replacement
    )
    if without_replacement and (batches is None or type(batches) is BatchSampler):
        return _repeated_in_a_batch(sampler, getattr(batches, "batch_size", 1))
    return (
        f"How often {type(_drawing_sampler(loader)).__name__} draws an example is not "
        "known, so no privacy loss can be computed. Use shuffle=True, or "
        "poisson_sampling=True. Both draw all examples equally often: they replace "
        "your sampler, with its weights and its choice of examples."
    )


def replaced_sampler(loader: DataLoader[Any]) -> str | None:
    """Explain that Poisson sampling replaces a sampler that draws otherwise.

    Args:
        loader: The user's, which is about to be replaced. Samplers that draw from all
            examples alike, and Poisson samplers, lose nothing by it.
    """
    sampler = _drawing_sampler(loader)
    if isinstance(loader.dataset, IterableDataset) or isinstance(sampler, _ALIKE):
        return None
    num_examples = size_of(loader.dataset)
    if type(sampler) is SubsetRandomSampler and len(sampler) == num_examples:
        return None  # a permutation of all examples
    return (
        f"poisson_sampling=True replaces {type(sampler).__name__}, as Opacus does: all "
        f"{num_examples} examples of the data set are drawn with the same "
        "probability, and the sampler's weights, order and choice of examples have no "
        "effect. To train on some examples only, pass "
        "torch.utils.data.Subset(data_set, indices) as the data set. "
        "poisson_sampling=False keeps the sampler, but there is a ledger only if it "
        "draws without replacement."
    )


def _is_random(sampler: Any) -> TypeGuard[RandomSampler]:
    """Return whether a sampler is torch's ``RandomSampler``, or Accelerate's.

    Accelerate's ``SeedableRandomSampler``, which a ``Trainer`` has, seeds the generator
    of torch's sampler before each pass, and draws as that does (Accelerate 1.15).

    Args:
        sampler: Any.
    """
    kind = type(sampler)
    return kind is RandomSampler or (
        isinstance(sampler, RandomSampler)
        and (kind.__module__, kind.__name__) == _SEEDABLE
    )


def _repeated_in_a_batch(sampler: Any, batch_size: int) -> str | None:
    """Explain that one batch may have an example twice.

    Args:
        sampler: Draws without replacement. A ``RandomSampler`` with more samples than
            examples begins again when it has drawn all of them.
        batch_size: How many of its samples make a batch.
    """
    num_samples = sampler.num_samples if _is_random(sampler) else 0
    num_examples = len(sampler.data_source) if num_samples else 0
    if num_samples <= num_examples or num_examples % batch_size == 0:
        return None
    return (
        f"{type(sampler).__name__} draws {num_samples} samples in one pass, and begins "
        f"again when it has drawn all {num_examples} examples. A batch of {batch_size} "
        "samples may be drawn from two of these rounds, so an example may be in it "
        "twice, and max_grad_norm does not bound what it contributes. Use a batch size "
        "that divides the number of examples, or shuffle=True and more epochs."
    )


def settings_of_schedule(loader: DataLoader[Any]) -> tuple[Any, ...]:
    """Return length, sample rate, batch size and other settings of a loader.

    They are compared at each update: while they are equal, the loader draws each
    example as often as when it was prepared. Under Poisson sampling the length does not
    matter: it is the number of updates in a pass, and the accountant counts those.
    """
    batches, sampler = loader.batch_sampler, _drawing_sampler(loader)
    is_drawn = batches is not None and not isinstance(loader.dataset, IterableDataset)
    # the same as the loader's, but quicker
    length = len(cast(Any, batches)) if is_drawn else len(loader)
    return (
        None if is_poisson(loader) else length,
        getattr(batches, "sample_rate", None),
        getattr(batches, "batch_size", None),
        getattr(batches, "drop_last", None),
        type(sampler),
        getattr(sampler, "num_samples", None),  # of a Poisson sampler: drawn from
        getattr(sampler, "replacement", None),
    )


def changed_schedule(before: tuple[Any, ...], loader: DataLoader[Any]) -> str | None:
    """Explain that a loader no longer draws as it did when it was prepared.

    Args:
        before: What ``settings_of_schedule`` returned then.
        loader: The loader.
    """
    if settings_of_schedule(loader) == before:
        return None
    return (
        "The loader's sampler, or its num_samples, batch size, sample rate or length "
        "changed after make_private or make_monitored, but the accounting assumes the "
        "earlier ones. Make a new loader, and call make_private or make_monitored with "
        "it."
    )


class UnchangedSchedule:
    """Looks at each update whether a loader draws as it did when it was prepared.

    Args:
        loader: The loader that training iterates over; referred to weakly.
        chain: Its link "schedule" is broken if the loader was changed.
    """

    def __init__(self, loader: DataLoader[Any], chain: Chain) -> None:
        self._loader, self._chain = weakref.ref(loader), chain
        self._before = settings_of_schedule(loader)

    def compare(self) -> None:
        """Compare the loader's settings with the earlier ones."""
        loader = self._loader()
        if loader is not None:  # its truth value would be computed from its length
            reason = changed_schedule(self._before, loader)
            if reason:
                self._chain.break_link("schedule", reason, rules_out_epsilon=False)


def overlapping(loader: DataLoader[Any], num_processes: int) -> str | None:
    """Explain that several processes may draw one example for the same update.

    Args:
        loader: The loader of this process.
        num_processes: How many processes train together.
    """
    sampler = _drawing_sampler(loader)
    disjoint = (DistributedSampler, DistributedUniformWithReplacementSampler)
    if isinstance(sampler, disjoint) and sampler.num_replicas == num_processes:
        return None
    return (
        f"{num_processes} processes train together, but {type(sampler).__name__} draws "
        "from the whole data set in each of them. Use poisson_sampling=True, or "
        "DataLoader(sampler=DistributedSampler(data_set))."
    )


def user_collate_fn(loader: DataLoader[Any]) -> Callable[..., Any] | None:
    """Return the user's ``collate_fn`` from under the wrappers of Opacus.

    Opacus's wrapper remembers the first batch that it sees, so a sweep over the data
    set must not go through it.
    """
    collate_fn = loader.collate_fn
    while isinstance(collate_fn, CollateFnWithEmpty):
        collate_fn = collate_fn.wrapped_collator_fn
    return collate_fn


def _drawing_sampler(loader: DataLoader[Any]) -> Any:
    """Return the sampler that decides which examples are drawn.

    A plain ``BatchSampler`` only groups the indices of its own sampler; any other batch
    sampler, Opacus's included, draws by itself.
    """
    batches = loader.batch_sampler
    if type(batches) in (BatchSampler, type(None)):
        return getattr(batches, "sampler", loader.sampler)
    return batches
