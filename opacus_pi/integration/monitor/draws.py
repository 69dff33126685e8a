"""How often a data loader will draw an example, read off before it draws.

>>> from torch.utils.data import DataLoader
>>> draws_of(DataLoader(range(10), batch_size=4))
Draws(sample_rate=0.3333333333333333, mean_batch_size=4.0, sampling='fixed')
"""

from dataclasses import dataclass
from typing import Any, Literal

from opacus.data_loader import DPDataLoader
from torch.utils.data import DataLoader

from opacus_pi.models.batches import size_of


@dataclass(frozen=True)
class Draws:
    """How a loader draws the batch of an update.

    Args:
        sample_rate: Share of the updates that an example takes part in.
        mean_batch_size: Expected number of rows E[B], known before drawing.
        sampling: ``"poisson"`` or ``"fixed"``.
    """

    sample_rate: float
    mean_batch_size: float
    sampling: Literal["poisson", "fixed"]


def draws_of(loader: DataLoader[Any]) -> Draws:
    """What a loader will draw.

    An update of Opacus's Poisson loader draws ``sample_rate * n`` rows in expectation
    (not rounded). Any other loader is taken to show an example in one of its
    ``len(loader)`` batches, as shuffling does.

    Args:
        loader: A torch ``DataLoader`` of a data set with a length.

    Returns:
        Sample rate, expected batch size and kind of sampling.
    """
    num_examples = size_of(loader.dataset)
    if isinstance(loader, DPDataLoader):
        rate = loader.sample_rate
        return Draws(rate, rate * num_examples, "poisson")
    rate = 1 / len(loader)
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    size = min(size or num_examples * rate, num_examples)
    return Draws(rate, float(size), "fixed")
