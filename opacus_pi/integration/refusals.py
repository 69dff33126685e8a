"""What Opacus trains but nobody can account per example: training goes on as it is.

Each function returns the reason, with the remedy, or None.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from opacus.data_loader import CollateFnWithEmpty
from opacus.grad_sample import AbstractGradSampleHooks
from opacus.privacy_engine import PrivacyEngine
from opacus.utils.adaptive_clipping.adaptive_clipping_utils import (
    PrivacyEngineAdaptiveClipping,
)
from opacus.utils.uniform_sampler import (
    DistributedUniformWithReplacementSampler,
    UniformWithReplacementSampler,
)
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

_ONCE_AN_EPOCH = (SequentialSampler, SubsetRandomSampler, DistributedSampler)


def unknown_schedule(loader: DataLoader[Any]) -> str | None:
    """A loader that draws neither by Poisson sampling nor each example once an epoch.

    Args:
        loader: The loader that is trained from, the user's or Opacus's.
    """
    if is_poisson(loader):
        rate = cast(Any, loader.batch_sampler).sample_rate
        return _too_few_steps(rate, len(loader)) if rate * len(loader) > 1.001 else None
    if isinstance(loader.dataset, IterableDataset):
        return (
            "An iterable data set has no positions, so its rows belong to no example. "
            "Use a map-style data set."
        )
    batches = loader.batch_sampler
    sampler = getattr(batches, "sampler", loader.sampler)
    without_replacement = type(sampler) in _ONCE_AN_EPOCH or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples <= len(sampler.data_source)
    )
    if without_replacement and (batches is None or type(batches) is BatchSampler):
        return None
    odd = sampler if type(batches) in (BatchSampler, type(None)) else batches
    return (
        f"How often {type(odd).__name__} draws an example is not known, so no privacy "
        "loss follows from it. Use poisson_sampling=True, or shuffle=True."
    )


def _too_few_steps(rate: float, num_steps: int) -> str:
    """Why Opacus's accountant is told another rate than the sampler's."""
    return (
        f"The sampler draws at rate {rate:g}, and Opacus accounts for 1/{num_steps}, "
        "one over the loader's length. Use steps=int(1 / sample_rate)."
    )


def is_poisson(loader: DataLoader[Any]) -> bool:
    """Whether a loader draws every example independently in each update."""
    return type(loader.batch_sampler) in (
        UniformWithReplacementSampler,
        DistributedUniformWithReplacementSampler,
    )


def schedule_of(loader: DataLoader[Any]) -> tuple[Any, ...]:
    """What says how often a loader draws an example; the same as long as it does.

    Args:
        loader: That is trained from.
    """
    batches = loader.batch_sampler
    return len(loader), *(
        getattr(batches, n, None) for n in ("sample_rate", "batch_size")
    )


def changed_schedule(before: tuple[Any, ...], loader: DataLoader[Any]) -> str | None:
    """A loader that draws otherwise than when it was prepared.

    Args:
        before: What ``schedule_of`` said then.
        loader: The loader.
    """
    if schedule_of(loader) == before:
        return None
    return (
        "The loader's batch size, sample rate or length changed after make_private, "
        "and the accountant counts with the old one. Make a new loader, and call "
        "make_private with it."
    )


def overlapping(loader: DataLoader[Any], num_processes: int) -> str | None:
    """A loader from which several processes may draw an example for one update.

    Args:
        loader: The loader that this process trains from.
        num_processes: How many train together.
    """
    batches = loader.batch_sampler
    sampler = getattr(batches, "sampler", loader.sampler)
    drawer = sampler if type(batches) in (BatchSampler, type(None)) else batches
    spread = (DistributedSampler, DistributedUniformWithReplacementSampler)
    if isinstance(drawer, spread) and drawer.num_replicas == num_processes:
        return None
    return (
        f"{num_processes} processes train together, and {type(drawer).__name__} draws "
        "from the whole data set in each of them. Use poisson_sampling=True, or "
        "DataLoader(sampler=DistributedSampler(data_set))."
    )


def own_collate_fn(loader: DataLoader[Any]) -> Callable[..., Any] | None:
    """The user's collate_fn; Opacus's wrapper remembers the first batch it sees."""
    collate_fn = loader.collate_fn
    while isinstance(collate_fn, CollateFnWithEmpty):
        collate_fn = collate_fn.wrapped_collator_fn
    return collate_fn


def clipping_without_effect(engine: PrivacyEngine) -> str | None:
    """An engine whose criterion gives ghost clipping one loss for the whole batch.

    Args:
        engine: The engine that prepares the run.
    """
    if not isinstance(engine, PrivacyEngineAdaptiveClipping):
        return None
    return (
        "Opacus's PrivacyEngineAdaptiveClipping does not clip: its criterion reduces "
        "the loss before the examples are weighted. Use "
        'make_private(clipping="adaptive").'
    )


def batch_norms(hooks: AbstractGradSampleHooks) -> list[nn.Module]:
    """The layers of a model whose statistics may mix examples.

    Args:
        hooks: What ``make_private`` returned for the model.
    """
    mixing = nn.modules.batchnorm._BatchNorm
    return [m for m in hooks._module.modules() if isinstance(m, mixing)]


def batch_statistics(layers: Sequence[nn.Module]) -> str | None:
    """A BatchNorm layer in training mode, which Opacus accepts if it is frozen.

    Args:
        layers: What ``batch_norms`` returned.
    """
    if not any(layer.training for layer in layers):
        return None
    return (
        "A BatchNorm layer is in training mode: every output depends on the whole "
        "batch, so no gradient is one example's. Call .eval() on such layers after "
        "model.train(), or replace them by GroupNorm."
    )
