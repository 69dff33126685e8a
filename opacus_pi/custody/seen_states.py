"""Notice that a random generator is in a state in which it was before.

Noise drawn from an old state is old noise: two updates with equal noise are not two
draws of a mechanism, and their difference has no noise at all. That happens if
``torch.manual_seed(0)`` is called in every epoch, or at the start of a script that
continues an earlier run.

A state is kept as a digest of 63 bits. At most 4,096 are kept: when there are more,
only digests are kept, and compared, whose last bit is 0, then whose last two bits are
0, and so on. Which states are compared depends on the states alone, so a state that was
kept is recognised when it comes again.

*Guarantee.* During the first 4,096 updates, every state that comes again is found. In a
run of n updates, a stretch of n / 256 updates that repeats an earlier one is missed
with a probability below 10^-3. Different states are taken for equal with a probability
below 10^-6 in a billion updates.

*What breaks it.* The same numbers at another place (see ``seen_blocks``), other
generators with the same numbers, and generators without a state that can be read.

>>> seen = SeenStates()
>>> seen.add(b"one"), seen.add(b"other"), seen.add(b"one")
(True, True, False)
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["MAX_KEPT", "SeenStates"]

MAX_KEPT = 4096
_MAX_BITS = 62


class SeenStates:
    """Digests of the states in which a generator was.

    Args:
        digests: Those that are kept, as ``state`` returned them.
        num_bits: How many of their last bits are 0.
    """

    def __init__(self, digests: Iterable[int] = (), num_bits: int = 0) -> None:
        self._kept, self._num_bits = set(digests), num_bits
        self._mask = (1 << num_bits) - 1  # the bits that are 0 in digests that are kept

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, state: bytes) -> bool:
        """Keep a state; return False if it is known to have been there before.

        Args:
            state: What describes it.
        """
        found = hashlib.blake2b(state, digest_size=8).digest()
        digest = int.from_bytes(found, "little") >> 1
        if digest & self._mask:
            return True
        if digest in self._kept:
            return False
        self._kept.add(digest)
        while len(self._kept) > MAX_KEPT:
            self._num_bits += 1
            self._mask = (1 << self._num_bits) - 1
            self._kept = {kept for kept in self._kept if not kept & self._mask}
        return True

    def state(self) -> Tensor:
        """Return the number of bits and then the digests, int64 ``(1 + k,)``."""
        return torch.tensor([self._num_bits, *sorted(self._kept)], dtype=torch.int64)

    @classmethod
    def from_state(cls, state: Tensor) -> "SeenStates":
        """Return what ``state`` was made of.

        Args:
            state: int64 ``(1 + k,)``.
        """
        num_bits, *digests = state.tolist()
        return cls(digests, num_bits)

    @staticmethod
    def is_state(value: object) -> bool:
        """Return whether something can be a result of ``state``.

        Args:
            value: What a file holds.
        """
        return (
            isinstance(value, Tensor)
            and (value.dtype, value.dim()) == (torch.int64, 1)
            and 0 < len(value) <= MAX_KEPT + 1
            and bool((value >= 0).all())
            and int(value[0]) <= _MAX_BITS
        )
