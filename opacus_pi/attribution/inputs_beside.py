"""Find inputs of the model that do not have one row for each example, and that change.

A model may be given, beside the examples, a number or a tensor that all examples share:
a temperature, a mask, a step counter. It may also be a mean of the batch, or a hidden
state ``(1, b, h)`` that the loop keeps from batch to batch. Then each example is in the
gradients of others, which clipping does not bound. The two cannot be told apart from
one batch. But a constant stays the same and a schedule follows a rule, while what is
computed from examples has new values in every batch.

*Guarantee.* An input is noted if its values change from pass to pass without a rule
(:mod:`~opacus_pi.attribution.value_sequences`), unless it is a tensor of the delivered
batch or a view of all of its samples in their order, or tells the size of an input, or
is the state ``(l, b, ...)`` that the model returned for a part of the same batch, while
no backward pass has run: it belongs to the examples, and is differentiated with them.
Values are copied on their device, 64 entries at most, and read after four passes, then
after each 64, and when the ledger is asked for.

*What breaks it.* These inputs are not noted, whatever they are computed from: a tensor
whose shape occurs only once, because there is nothing to compare it with; masks, which
are tensors of truth values or have only entries that are 0, 1 or very negative; whole
numbers that are the size of an input, such as the number of examples; values that the
model reads from variables of the loop; and what an object holds that is neither a
container nor a number, such as a function.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from opacus_pi._torch_compat import storage_address
from opacus_pi.attribution.delivery import Delivery, ForwardPass
from opacus_pi.attribution.model_inputs import Input
from opacus_pi.attribution.samples import is_dense, tensors_in
from opacus_pi.attribution.value_sequences import ValueSequence
from opacus_pi.models.batches import NUM_ITEMS

__all__ = ["InputsBeside"]

_MAX_ENTRIES = 64
_MAX_PLACES = 256
_FIRST_LOOK, _LATER_LOOKS = 4, 64  # passes after which values are read
_MASKED = -1e4  # numbers below it mark entries that attention leaves out


class _Watched:
    """The values of one input: those that were read, and those that wait to be read.

    Args:
        tensor: The input; None: a number.
    """

    def __init__(self, tensor: Tensor | None) -> None:
        is_rounded = tensor is not None and tensor.is_floating_point()
        rounding = torch.finfo(tensor.dtype).eps if is_rounded else 0.0  # type: ignore[union-attr]  # a tensor
        self._values = ValueSequence(min(rounding, 1e-3))
        self._waiting: list[Any] = []
        self._entries: tuple[Tensor, ...] | None = None
        self._num_before_look = _FIRST_LOOK
        self.is_mask = tensor is not None and tensor.numel() > 1

    def add(self, value: Any) -> bool:
        """Keep a value.

        Args:
            value: A number, or a tensor of which some entries are copied.

        Returns:
            Whether it is time to look at the values.
        """
        self._waiting.append(self._some(value) if isinstance(value, Tensor) else value)
        return len(self._waiting) >= self._num_before_look

    def _some(self, tensor: Tensor) -> Tensor:
        """Return a copy of some entries of a tensor, always the same, on its device."""
        tensor = tensor.detach()
        if tensor.numel() <= _MAX_ENTRIES:
            return tensor.clone()
        if self._entries is None:
            places = np.linspace(0, tensor.numel() - 1, _MAX_ENTRIES).astype(np.int64)
            where = np.unravel_index(places, tensor.shape)
            self._entries = tuple(torch.tensor(w, device=tensor.device) for w in where)
        return tensor[self._entries]

    def look(self) -> None:
        """Read the values that wait."""
        waiting, self._waiting = self._waiting, []
        self._num_before_look = _LATER_LOOKS
        if waiting and isinstance(waiting[0], Tensor):
            rows = torch.stack([t.flatten() for t in waiting]).cpu().double().numpy()
        else:
            rows = np.array(waiting, dtype=np.float64).reshape(-1, 1)
        is_mark = (rows == 0) | (rows == 1) | (rows <= _MASKED)
        self.is_mask = self.is_mask and bool(is_mark.all())
        for row in rows:
            self._values.add(row)

    def forget(self) -> None:
        """Begin again: the values so far were found in the delivered batches."""
        self._values = ValueSequence(self._values.rounding)

    def is_doubtful(self, *, at_end: bool) -> bool:
        """Return whether the values change without a rule.

        Args:
            at_end: Whether the values are all that there are. If not, one change
                alone does not show whether there is a rule.
        """
        is_early = not at_end and self._values.num_changes < 2
        return not (self.is_mask or is_early or self._values.is_explained)


class InputsBeside:
    """The inputs of a model that have no row for each example.

    Args:
        dim: The dimension of the inputs along which the examples are.
    """

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._watched: dict[Any, _Watched] = {}
        self._are_doubtful = False

    def saw(
        self,
        forward: ForwardPass,
        given: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        awaiting_backward: Callable[[], Iterable[ForwardPass]],
    ) -> bool:
        """Look at the inputs of a forward pass.

        Args:
            forward: The pass.
            given: The dense tensors among its inputs.
            args: The positional inputs.
            kwargs: The inputs by keyword.
            awaiting_backward: Returns the earlier passes from whose outputs a loss may
                still be computed.

        Returns:
            Whether an input, in this pass or an earlier one, may be computed from other
            examples.
        """
        if not kwargs and len(args) == 1 and type(args[0]) is Tensor:  # nearly always
            return False
        size = forward.num_samples
        if self._are_doubtful or not size:
            return self._are_doubtful
        for place, value in _leaves((*enumerate(args), *kwargs.items())):
            if self._is_beside(value, size, given) and not (
                _may_be_state(value, size)
                and _is_output(value, forward, awaiting_backward())
            ):
                self._add(place, value, forward.delivery, size)
        return self._are_doubtful

    def doubtful_at_end(self) -> bool:
        """Return whether an input may be computed from other examples, as far as known.

        To be called when no further pass is waited for: it reads the values.
        """
        for watched in self._watched.values():
            watched.look()
            self._are_doubtful |= watched.is_doubtful(at_end=True)
        return self._are_doubtful

    def _is_beside(self, value: Any, size: int, given: Sequence[Tensor]) -> bool:
        """Return whether a value has no row for each example, and may be informative.

        Args:
            value: A number or a tensor.
            size: The number of examples.
            given: The dense tensors among the inputs.
        """
        if isinstance(value, Tensor):
            has_rows = value.dim() > self._dim and value.shape[self._dim] == size
            is_weight = value.requires_grad and value.is_leaf
            is_number = value.dtype is not torch.bool and not value.is_complex()
            return is_number and not has_rows and not is_weight and value.numel() > 0
        if isinstance(value, int):
            return not any(value in tensor.shape for tensor in given)
        return True

    def _add(
        self, place: Any, value: Any, delivery: Delivery | None, size: int
    ) -> None:
        """Keep the value of an input that is not delivered memory.

        Args:
            place: Where in the call it is.
            value: A number or a tensor.
            delivery: The batch of the pass.
            size: The number of examples.
        """
        key, tensor = place, None
        if isinstance(value, Tensor):
            if delivery is not None and _is_delivered(value, delivery, size):
                return
            key, tensor = (place, value.shape, value.dtype), value
        watched = self._watched.get(key)
        if watched is None:
            if len(self._watched) >= _MAX_PLACES:
                return
            watched = self._watched[key] = _Watched(tensor)
        if not watched.add(value):
            return
        watched.look()
        if not watched.is_doubtful(at_end=False):
            return
        if tensor is not None and delivery is not None:
            if _has_delivered_content(tensor, delivery, size):
                watched.forget()
                return
        self._are_doubtful = True
        self._watched.clear()


def _leaves(values: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the tensors and numbers of a call, each with a key for its place.

    Args:
        values: Pairs of a key and an input.
    """
    for place, value in values:
        if place == NUM_ITEMS:  # the probe of the model's own loss looks at it
            continue
        if type(value) is Tensor:
            if is_dense(value):
                yield place, value
        elif value is None or isinstance(value, bool | str | PackedSequence):
            continue
        elif isinstance(value, int | float):
            yield place, value
        elif isinstance(value, np.generic):
            if value.dtype.kind in "iuf":
                yield place, value.item()
        elif isinstance(value, list | tuple):
            yield from _leaves([((place, n), one) for n, one in enumerate(value)])
        elif isinstance(value, Mapping):
            yield from _leaves([((place, n), one) for n, one in value.items()])
        else:
            for n, tensor in enumerate(tensors_in(value)):
                yield (place, n), tensor


def _may_be_state(value: Any, size: int) -> bool:
    """Return whether a value may be a recurrent model's state, in its graph.

    Args:
        value: A number or a tensor without a row for each example.
        size: The number of examples, which a state has along the second dimension.
    """
    is_in_graph = isinstance(value, Tensor) and value.requires_grad
    has_rows = is_in_graph and value.dim() > 1 and value.shape[1] == size
    return has_rows and value.stride(1) != 0  # not one row, expanded


def _is_output(
    tensor: Tensor, forward: ForwardPass, earlier: Iterable[ForwardPass]
) -> bool:
    """Return whether a tensor was returned by an earlier pass over the same batch.

    Args:
        tensor: An input.
        forward: The pass that is given it.
        earlier: Passes whose backward pass has not run.
    """
    address = storage_address(tensor.untyped_storage())
    return any(
        f.delivery is forward.delivery is not None and address in f.output_storages
        for f in earlier
    )


def _is_delivered(tensor: Tensor, delivery: Delivery, size: int) -> bool:
    """Return whether a tensor is memory of a batch: shared, or all of its samples.

    Args:
        tensor: An input without a row for each example.
        delivery: The batch.
        size: The number of examples in the pass.
    """
    address = storage_address(tensor.untyped_storage())
    if any(address == shared.cdata for shared in delivery.shared):
        return True
    for dim, length in enumerate(tensor.shape):
        if length % size:
            continue
        wanted = np.repeat(np.arange(size), length // size)
        for delivered in delivery.tensors:
            where = delivered.stored.positions(tensor, dim)
            if where is not None and np.array_equal(where, wanted):
                return True
    return False


def _has_delivered_content(tensor: Tensor, delivery: Delivery, size: int) -> bool:
    """Return whether a tensor has the samples of a batch along another dimension.

    Args:
        tensor: An input without a row for each example.
        delivery: The batch.
        size: The number of examples in the pass.
    """
    for dim, length in enumerate(tensor.shape):
        given = Input(tensor, dim)
        if length == size and delivery.indices is not None:
            given.look([delivery], verify=True)
            if any(f.is_whole and f.is_in_place for f in given.findings):
                return True
    return False
