"""A sample of the weights after each update, to detect that other code wrote to them.

Torch counts writes to a tensor, which shows most changes between two updates at no
cost. A write to ``weight.data``, or through NumPy, is not counted. So the counts, the
places in memory and a few entries of every parameter are kept after an update and
compared before the next one.

*Guarantee.* Three changes are always found: a write that torch counts; a change of a
whole parameter (an average of weights, a projection, a step of another optimizer); and
a parameter whose memory was replaced.

If the loop makes the step of an update by itself, without the optimizer of the run, the
weights are compared when its update ends, with a reason of their own.

*What breaks it.* 16 evenly spaced entries of a parameter are compared. Suppose that a
write which torch does not count changes a share s of the entries, at places unrelated
to these 16. It is missed with probability (1 - s)^16, which is 0.19 for a tenth of the
entries. A change that was undone before the next update is not seen if torch did not
count it, unless the model was called meanwhile (``custody/weights_in_passes.py``).

>>> weight = torch.zeros(100)
>>> snapshot = WeightSnapshot()
>>> snapshot.watch([weight])
>>> snapshot.take()
>>> _ = weight.data.add_(1)
>>> snapshot.has_changed()
True
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from opacus_pi._torch_compat import counts_of_writes
from opacus_pi.custody.chain import Chain

__all__ = ["WeightSnapshot", "WeightsLink", "is_plain", "sampled_entries"]

_COMPARED = (
    "Compared before every update, the weights were as the update before had left them."
)
_CHANGED = (
    "Weights were changed between two updates, and not by the optimizer of the run. "
    "If the change used training data, neither get_epsilon nor the ledger covers the "
    "model: do not make this change. If it was an average or a projection of weights, "
    "brought back earlier weights of this run, or used public data only, nothing needs "
    "to be done, unless training data decided when it was made."
)

_NO_STEP = (
    "Noise was drawn for an update (by optimizer.pre_step, for example), but the "
    "optimizer that was passed to make_private did not step, and the weights were "
    "changed in another way. Which gradients were used is not known. If the new "
    "weights were computed from p.grad, which has noise, and earlier weights alone, "
    "nothing needs to be done. If they were computed from p.summed_grad or "
    "p.grad_sample, which have no noise, or from other training data, neither "
    "get_epsilon nor the ledger covers the model. Call optimizer.step()."
)

_OTHERS_IN_PASS = (
    "The model was called with other weights than those that the update before had "
    "left, and they were put back before optimizer.step(). If the weights were moved "
    "by training data, as sharpness-aware minimisation (SAM) moves them along the "
    "batch's gradient, each gradient depends on all examples of the batch, and "
    "max_grad_norm does not bound what an example contributes: do not do this. If the "
    "other weights follow from the weights alone (they are rounded, for example), or "
    "from random numbers or public data, nothing needs to be done."
)

_NUM_ENTRIES = 16  # of a parameter
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class WeightSnapshot:
    """Counts of writes, addresses and a few entries of parameters at one moment."""

    def __init__(self) -> None:
        self._parameters: list[Tensor] = []
        self._writes: list[int] | None = None  # None: no snapshot was taken
        self._addresses: list[int] = []
        # Views of the sampled entries: as NumPy arrays of their bits where that is
        # possible, because that is what is read fastest; else by device.
        self._on_host: list[NDArray[np.generic]] = []
        self._elsewhere: dict[torch.device, list[Tensor]] = {}
        self._bits = b""
        self._entries: dict[torch.device, Tensor] = {}
        self._views: list[Tensor] = []  # the same views in the parameters' order
        self._late: dict[torch.device, Tensor] = {}

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Watch these parameters from now on, in place of earlier ones.

        Args:
            parameters: The parameters; the snapshot keeps references to them, as an
                optimizer does.
        """
        self._parameters = [p for p in parameters if is_plain(p) and p.numel()]
        self._addresses = []
        self._writes, self._entries, self._late = None, {}, {}

    def accept_writes(self) -> None:
        """Accept the writes so far; values are compared, and may be the same."""
        if self._writes is not None:
            self._writes = counts_of_writes(self._parameters)

    def take(self) -> None:
        """Take the snapshot: an update has just been made."""
        addresses = list(map(Tensor.data_ptr, self._parameters))
        if addresses != self._addresses:
            self._addresses = addresses
            self._make_views()
        self._writes = counts_of_writes(self._parameters)
        self._bits = _bits_of(self._on_host)
        if self._elsewhere:
            self._entries = {d: _joined(v) for d, v in self._elsewhere.items()}

    def has_changed(self) -> bool:
        """Return whether the parameters differ from the snapshot.

        On an accelerator the entries are compared in the background, so that training
        does not wait; ``has_changed_late`` returns the result.
        """
        if self._differs_on_host():
            return True
        for device, differs in self._differences_elsewhere():
            earlier = self._late.get(device)
            self._late[device] = differs if earlier is None else earlier | differs
        return False

    def has_changed_in_pass(self, *, counts_only: bool) -> bool:
        """Return whether the parameters differ, as far as is known at once.

        Args:
            counts_only: Whether only the counts of writes are compared, which is the
                fastest.
        """
        if not counts_only:
            return self._differs_on_host()
        writes = self._writes
        return writes is not None and writes != counts_of_writes(self._parameters)

    def has_changed_late(self) -> bool:
        """Return whether a comparison on an accelerator has found a change."""
        return any(bool(found) for found in self._late.values())

    def has_changed_now(self) -> bool:
        """Return what ``has_changed`` does, and wait for accelerators."""
        return self._differs_on_host() or any(
            bool(differs) for _, differs in self._differences_elsewhere()
        )

    def has_other_values(self) -> bool:
        """Return what ``has_changed_now`` does, but accept parameters that were moved.

        A model may be moved to another device when its training is over. Its entries
        are then compared with those in the memory that it had.
        """
        addresses = list(map(Tensor.data_ptr, self._parameters))
        if self._writes is None or self._addresses == addresses:
            return self.has_changed_now()
        if self._writes != counts_of_writes(self._parameters):
            return True
        if self._bits != _bits_of(self._on_host):
            return True
        if any(bool(differs) for _, differs in self._differences_elsewhere()):
            return True
        now = [sampled_entries(p.detach()).cpu() for p in self._parameters]
        pairs = zip(self._views, now, strict=True)
        return not all(torch.equal(view.cpu(), entries) for view, entries in pairs)

    def _differs_on_host(self) -> bool:
        """Return whether what is known without an accelerator differs."""
        return self._writes is not None and (
            self._writes != counts_of_writes(self._parameters)
            or self._addresses != list(map(Tensor.data_ptr, self._parameters))
            or self._bits != _bits_of(self._on_host)
        )

    def _differences_elsewhere(self) -> Iterator[tuple[torch.device, Tensor]]:
        """Yield each accelerator and whether the entries there differ, bool ``()``."""
        for device, kept in self._entries.items():
            yield device, (_joined(self._elsewhere[device]) != kept).any()

    def _make_views(self) -> None:
        """Make views of the sampled entries, in the present memory of parameters."""
        self._on_host, self._elsewhere, self._views = [], {}, []
        for parameter in self._parameters:
            entries = sampled_entries(parameter.detach())
            self._views.append(entries)
            bits = _BITS.get(entries.element_size())
            if entries.is_cpu and bits is not None:
                self._on_host.append(np.from_dlpack(entries.view(bits)))
            else:
                self._elsewhere.setdefault(entries.device, []).append(entries)


class WeightsLink:
    """Check that only the updates of a run write to its weights.

    Such a write may be harmless (an average, a projection, public data) or not
    (training data). Which of them it is cannot be known, so the link is left unchecked.

    Args:
        chain: The chain of custody of the run.
        snapshot: A snapshot of the weights, taken after each update.
        were_others: Returns whether gradients of the present update are those of other
            weights. Default: they are not.
    """

    def __init__(
        self,
        chain: Chain,
        snapshot: WeightSnapshot,
        were_others: Callable[[], bool] = bool,
    ) -> None:
        self._chain, self._snapshot = chain, snapshot
        self._were_others = were_others
        chain.check("weights", _COMPARED)
        chain.on_read(self._report_late, can_break=False)

    def before_update(self) -> None:
        """Compare the weights with those after the last update."""
        were_others = self._were_others()
        if self._snapshot.has_changed():
            self._chain.leave_unchecked("weights", _CHANGED)
        elif were_others:
            self._chain.leave_unchecked("weights", _OTHERS_IN_PASS)

    def no_step_was_made(self) -> None:
        """Compare the weights: the optimizer of the run has not written them."""
        if self._snapshot.has_changed():
            self._chain.leave_unchecked("weights", _NO_STEP)

    def after_update(self) -> None:
        """Take a snapshot: the next update should find the weights unchanged."""
        self._snapshot.take()

    def state_dict_was_loaded(self) -> None:
        """Accept the write if it brought the weights back, as after an evaluation."""
        self._snapshot.accept_writes()

    def _report_late(self) -> None:
        """Report a change that was found on an accelerator."""
        if self._snapshot.has_changed_late():
            self._chain.leave_unchecked("weights", _CHANGED)


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has one dense memory of its own in this process.

    Args:
        tensor: Any tensor.
    """
    plain = type(tensor) in (Tensor, Parameter)
    return plain and tensor.layout is torch.strided and not tensor.is_meta


def sampled_entries(tensor: Tensor) -> Tensor:
    """Return a view of at most 16 entries of a tensor, evenly spaced if it is dense.

    Args:
        tensor: Any strided tensor with entries.
    """
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        return flat[:: max(1, len(flat) // _NUM_ENTRIES)][:_NUM_ENTRIES]
    diagonal = tensor
    while diagonal.dim() > 1:  # e.g. channels_last: entries (i, i, ..., i)
        diagonal = diagonal.diagonal()
    return diagonal[:_NUM_ENTRIES]


def _bits_of(views: list[NDArray[np.generic]]) -> bytes:
    """Return the bits of all entries in host memory."""
    return b"".join(map(np.ndarray.tobytes, views))


def _joined(views: list[Tensor]) -> Tensor:
    """Return copies of all entries as one tensor of float64 or their common type."""
    return torch.cat(views) if len({v.dtype for v in views}) == 1 else _widened(views)


def _widened(views: list[Tensor]) -> Tensor:
    """Return copies of entries of different types as float64."""
    return torch.cat([view.double() for view in views])
