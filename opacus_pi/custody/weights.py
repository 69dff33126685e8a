"""Writes to the weights that torch does not count: through ``.data`` or NumPy.

Torch counts writes to a tensor, which shows most changes between two updates at no
cost. A write to ``weight.data`` is not counted. So a few entries of every parameter are
kept after an update and compared before the next one.

*Guarantee.* A change of a whole parameter (an average of weights, a projection, a step
of another optimizer) is found, and so is a parameter whose memory was replaced.

*What breaks it.* 16 evenly spaced entries of a parameter are compared. A write that
changes a share s of its entries, at places that have nothing to do with these, is
missed with a probability of (1 - s)^16: .2 for a tenth of the entries. A change that
was undone before the next update is not seen.

>>> weight = torch.zeros(100)
>>> entries = SampledEntries()
>>> entries.watch([weight])
>>> entries.keep()
>>> _ = weight.data.add_(1)
>>> entries.have_changed()
True
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from opacus_pi.custody.chain import Chain

__all__ = ["SampledEntries", "WeightsLink"]

_COMPARED = "Every update was compared with the one before."
_CHANGED = (
    "Weights were changed between two updates, and not by the optimizer of the run. "
    "If the change used training data, neither get_epsilon nor the ledger covers the "
    "model: leave it out. If it was an average or a projection of weights, or used "
    "public data only, nothing needs to be done."
)

_NUM_ENTRIES = 16  # of a parameter


class SampledEntries:
    """A few entries of each parameter, compared from one update to the next."""

    def __init__(self) -> None:
        self._parameters: list[Tensor] = []
        self._views: dict[torch.device, list[Tensor]] = {}
        self._addresses: list[int] = []
        self._kept: dict[torch.device, Tensor] = {}
        self._late: dict[torch.device, Tensor] = {}

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Watch these parameters from now on, in place of earlier ones.

        Args:
            parameters: They are kept in memory, as an optimizer does.
        """
        self._parameters = [p for p in parameters if _is_plain(p) and p.numel()]
        self.forget()

    def forget(self) -> None:
        """Accept the parameters as they are."""
        self._kept, self._late = {}, {}

    def keep(self) -> None:
        """Keep the entries: an update has just been made."""
        self._find_views()
        self._kept = {d: _together(views) for d, views in self._views.items()}

    def have_changed(self) -> bool:
        """Return whether entries differ from those that were kept.

        On an accelerator the comparison is left running, and its result is reported by
        ``have_changed_late``, so that training does not wait for it.
        """
        changed = bool(self._kept) and self._addresses != self._present_addresses()
        for device, kept in self._kept.items():
            now = _together(self._views[device])
            if device.type == "cpu":
                changed |= not torch.equal(now, kept)
            else:
                differs = (now != kept).any()
                earlier = self._late.get(device)
                self._late[device] = differs if earlier is None else earlier | differs
        return changed

    def have_changed_late(self) -> bool:
        """Return whether a comparison on an accelerator has found a change."""
        return any(bool(found) for found in self._late.values())

    def have_changed_now(self) -> bool:
        """Return what ``have_changed`` does, and wait for accelerators."""
        return self.have_changed() or self.have_changed_late()

    def _present_addresses(self) -> list[int]:
        """Return where the parameters are in memory now."""
        return [parameter.data_ptr() for parameter in self._parameters]

    def _find_views(self) -> None:
        """Make views of the sampled entries, if parameters have moved in memory."""
        addresses = self._present_addresses()
        if addresses == self._addresses and self._views:
            return
        self._addresses, self._views = addresses, {}
        for parameter in self._parameters:
            views = self._views.setdefault(parameter.device, [])
            views.append(_entries_of(parameter.detach()))


class WeightsLink:
    """Watches that nothing but the updates of a run writes to its weights.

    The weights that were written to may be harmless (an average, a projection, public
    data) or not (training data). Which it is cannot be known, so the link is left
    unchecked.

    Args:
        chain: The chain of custody of the run.
        entries: Of its weights, which show writes that torch does not count.
    """

    def __init__(self, chain: Chain, entries: SampledEntries) -> None:
        self._chain, self._entries = chain, entries
        chain.check("weights", _COMPARED)
        chain.on_read(self._report_late, can_break=False)

    def before_update(self, *, was_written: bool = False) -> None:
        """Compare the weights with those that the last update left.

        Args:
            was_written: Whether writes were counted since.
        """
        if was_written or self._entries.have_changed():
            self._chain.leave_unchecked("weights", _CHANGED)

    def after_update(self) -> None:
        """Note the weights: nothing should write to them until the next update."""
        self._entries.keep()

    def forget(self) -> None:
        """Accept the weights as they are."""
        self._entries.forget()

    def _report_late(self) -> None:
        """Report a change that was found on an accelerator."""
        if self._entries.have_changed_late():
            self._chain.leave_unchecked("weights", _CHANGED)


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has one dense memory of its own in this process."""
    plain = type(tensor) in (Tensor, Parameter)
    return plain and tensor.layout is torch.strided and not tensor.is_meta


def _entries_of(tensor: Tensor) -> Tensor:
    """Return a view of evenly spaced entries of a tensor, whatever its strides."""
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        return flat[:: max(1, len(flat) // _NUM_ENTRIES)][:_NUM_ENTRIES]
    diagonal = tensor
    while diagonal.dim() > 1:  # e.g. channels_last: entries (i, i, ..., i)
        diagonal = diagonal.diagonal()
    return diagonal[:_NUM_ENTRIES]


def _together(views: list[Tensor]) -> Tensor:
    """Return copies of all entries as one tensor of float64 or their common type."""
    return torch.cat(views) if len({v.dtype for v in views}) == 1 else _widened(views)


def _widened(views: list[Tensor]) -> Tensor:
    """Return copies of entries of different types as float64."""
    return torch.cat([view.double() for view in views])
