"""Notice that a Mersenne Twister goes back to numbers that it has passed before.

A seed that is set again, after which other things draw more numbers or fewer, brings no
earlier state back, but the same stream: noise is then that of earlier updates, shifted
by some entries. Torch's generator of the CPU makes its numbers in blocks of 624, and
its state holds the block. A stream never comes to a block for a second time, and within
a block only goes on.

*Guarantee.* Noise whose drawing begins in a block in which earlier noise began is
found, if the block was left since, or at an earlier place. As for ``seen_states``, at
most 4,096 blocks are kept.

*What breaks it.* Only the block in which the drawing of noise begins is compared. If
the noise of a model with many weights fills several blocks, and the two streams are
shifted so that it always begins in other blocks, the repetition is not seen. Neither
are streams of accelerators, and blocks of a run before it was saved and loaded.

>>> import torch
>>> generator, seen = torch.Generator().manual_seed(0), SeenBlocks()
>>> seen.goes_back(generator.get_state().numpy().tobytes())
False
>>> _ = torch.rand(2000, generator=generator)
>>> seen.goes_back(generator.get_state().numpy().tobytes())
False
>>> seen.goes_back(generator.manual_seed(0).get_state().numpy().tobytes())
True
"""

import sys

from opacus_pi.custody.seen_states import SeenStates

__all__ = ["SeenBlocks"]

_SIZE = 5056  # bytes of a state of torch's generator of the CPU
_LEFT = slice(8, 12)  # how many numbers of the block are left, plus one
_BLOCK = slice(24, 536)  # its first 64 numbers identify it


class SeenBlocks:
    """Blocks of 624 numbers in which the drawing of noise began."""

    def __init__(self) -> None:
        self._blocks = SeenStates()
        self._last, self._left = b"", 0

    def goes_back(self, state: bytes) -> bool:
        """Return whether a generator has gone back since the last call.

        Args:
            state: The bytes of what ``torch.Generator.get_state`` returns.

        Returns:
            False also for other generators than torch's of the CPU.
        """
        if len(state) != _SIZE:
            return False
        block, left = state[_BLOCK], int.from_bytes(state[_LEFT], sys.byteorder)
        is_same, before = block == self._last, self._left
        self._last, self._left = block, left
        return left > before if is_same else not self._blocks.add(block)
