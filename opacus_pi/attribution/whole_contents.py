"""Checksums of whole samples, where the compared entries do not distinguish them.

Of a sample with more than 512 entries only some are compared (``samples.py``). Two
samples may be equal in all of these and differ elsewhere: sparse vectors, or small
objects on one background. Where a batch has such lookalikes, all entries are compared.

*Guarantee.* Samples with equal checksums have equal entries, as numbers in single
precision, except with a probability of about 2^-64.

*What breaks it.* Lookalikes are searched for in host memory only, because reading an
accelerator would wait for it.

>>> x = torch.zeros(2, 5000)
>>> x[1, 1234] = 1
>>> sums = whole_checksums(x, 0)
>>> bool(sums[0] == sums[1])
False
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["has_lookalikes", "whole_checksums"]

_CHUNK = 1 << 14  # entries of each sample that are summed at a time


def has_lookalikes(entries: NDArray[np.float32]) -> bool:
    """Return whether two rows are equal.

    Args:
        entries: float32 ``(b, k)``, k at least 1. A NaN equals one of the same bits.
    """
    bits = entries.view(np.int32)
    size, middle = bits.shape[0], bits.shape[1] // 2
    if len(set(bits[:, middle].tolist())) == size:  # real numbers, nearly always
        return False
    sums = np.add.reduce(bits, axis=1, dtype=np.int32)
    if len(set(sums.tolist())) == size:
        return False
    return len({row.tobytes() for row in bits}) < len(bits)


def whole_checksums(tensor: Tensor, dim: int) -> NDArray[np.int64]:
    """Compute a checksum of each sample from all of its entries, int64 ``(b,)``.

    Args:
        tensor: A dense tensor, not complex.
        dim: Its dimension that runs over the samples.
    """
    samples = tensor.detach().movedim(dim, 0).flatten(1)
    sums = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
    for number, chunk in enumerate(samples.split(_CHUNK, dim=1)):
        bits = chunk.float().contiguous().resolve_neg().view(torch.int32).long()
        weights, factor = _weights(samples.device, number)
        sums += (bits * weights[: bits.shape[1]]).sum(dim=1) * factor
    return sums.cpu().numpy()


@lru_cache(maxsize=256)
def _weights(device: torch.device, number: int) -> tuple[Tensor, int]:
    """Return weights of the entries of a chunk, and a factor; modulo 2^64.

    They are odd, so that no entry is lost, and always the same ones.

    Args:
        device: Where the entries are.
        number: Which chunk of a sample it is, from 0.
    """
    shared = np.random.default_rng(1).integers(1, 2**62, _CHUNK, dtype=np.int64)
    factor = int(np.random.default_rng([2, number]).integers(1, 2**62)) | 1
    return torch.from_numpy(shared * 2 + 1).to(device), factor
