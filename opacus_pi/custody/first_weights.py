"""Find out whether weights were written before the first update of a run.

The links of a run begin with its first update. A model that initialises itself from its
first batch, or a script that sets weights from the training data after
``make_private``, brings examples into the weights without clipping and without noise.
So the writes that torch counts and a few entries of each weight are noted when the run
is prepared, and compared before its first update. A state dict that is loaded in
between is accepted: like the weights before ``make_private``, it is a declaration of
every certificate that they do not come from the training data.

*Guarantee.* A write that torch counts and a change of a whole weight are found. Nothing
is written, and no random number is drawn.

*What breaks it.* Writes that torch does not count, such as those through ``.data``, to
entries other than the 16 that are compared. Distributed runs are not watched.

>>> import warnings
>>> weight, chain = torch.zeros(3), Chain()
>>> first = FirstWeights([weight], chain)
>>> _ = weight.add_(1)
>>> with warnings.catch_warnings():
...     warnings.simplefilter("ignore")
...     first.compare()
>>> "before the first update" in chain.doubts()["weights"][0]
True
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from opacus_pi._torch_compat import counts_of_writes
from opacus_pi.custody.chain import Chain
from opacus_pi.custody.weights import is_plain, sampled_entries

__all__ = ["FirstWeights"]

_WRITTEN = (
    "Weights were changed after make_private and before the first update, and not by "
    "loading a state dict. If the new values were computed from training data, as by a "
    "layer that initialises itself from its first batch, neither get_epsilon nor the "
    "ledger covers the model: compute them from public data. If they were not, nothing "
    "needs to be done."
)


class FirstWeights:
    """Compares the weights before the first update with those at the beginning.

    Args:
        parameters: The weights.
        chain: The chain of custody of the run. A change leaves its link "weights"
            unchecked, because what was written may be harmless.
    """

    def __init__(self, parameters: Iterable[Tensor], chain: Chain) -> None:
        self._parameters = [p for p in parameters if is_plain(p) and p.numel()]
        self._chain = chain
        self.note()

    def note(self) -> None:
        """Note the weights: they are those with which the run begins."""
        self._writes = counts_of_writes(self._parameters)
        self._strides = [p.stride() for p in self._parameters]
        self._entries = self._present()

    def compare(self) -> None:
        """Report a change: the first update is about to be made."""
        before, now = self._entries, self._present()
        is_changed = self._writes != counts_of_writes(self._parameters) or any(
            p.stride() == strides and not torch.equal(one, other)
            for p, strides, one, other in zip(
                self._parameters, self._strides, before, now, strict=True
            )
        )
        if is_changed:
            self._chain.leave_unchecked("weights", _WRITTEN)

    def _present(self) -> list[Tensor]:
        """Return a few entries of each weight as they are now, on the CPU."""
        entries = [sampled_entries(p.detach()) for p in self._parameters]
        return [one.to("cpu", torch.float64, copy=True) for one in entries]
