"""Find inputs of the model whose sizes the loop changes from batch to batch.

A loop may cut a padded batch at its longest text before it calls the model, as in
``model(x[:, :longest])``, or pad what it computes to that length. If the model averages
over positions without a mask, the gradient of each example depends on the longest text
of its batch, which clipping does not bound. No value shows this: each row has entries
of its own example only. But the sizes of the input then go up and down, while
chunks repeat theirs and a growing length only rises.

*Guarantee.* An input is noted if one of its sizes, that along the examples left out,
rises and falls within passes over the loader while the sizes of the delivered batches
stay the same. That holds for views of a batch, for copies, and for inputs that the loop
computed from it. First, second and later forward passes over one batch are compared
with those of the same rank. Sizes are known without reading a tensor.

*What breaks it.* Sizes that only rise or only fall; that change between passes over the
loader only; or that alternate between two values, each for one or two batches, always
as many. Sizes that depend on the delivered ones, as where ``collate_fn`` pads to
different lengths, and those of more than 256 kinds of inputs and batches. Not seen are
sizes within a packed sequence, and a model that cuts its inputs itself, which is what
:mod:`~opacus_pi.custody.model_probe` tests. Whether the model ignores padding is not
known here: a loop that cuts for a model with a mask is noted as well, and so are sizes
drawn at random.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from opacus_pi.attribution.delivery import ForwardPass
from opacus_pi.attribution.samples import sizes_without

__all__ = ["InputSizes", "SizeSequence"]

# Which input, which pass over its batch, its dimensions, and the sizes of a sample in
# each tensor of that batch.
Key = tuple[int, int, int, tuple[tuple[int, ...], ...]]

_MAX_WATCHED = 256  # inputs, passes over a batch, and sizes of batches together
_TWO = 2  # sizes that may alternate
_LONGEST_RUN = 2  # of them; longer ones may come again because the batches do


class SizeSequence:
    """The values of one size, one after the other.

    >>> sizes = SizeSequence()
    >>> for size in (9, 7, 8):
    ...     sizes.add(size, loader_pass=1)
    >>> sizes.is_explained
    False
    """

    def __init__(self) -> None:
        self._last = self._pass = -1
        self._num_in_pass = self._num_runs = self._run = self._longest_run = 0
        self._lengths: dict[int, int] = {}  # of whole runs after the first, by size
        self._sizes: set[int] = set()
        self._rises = self._falls = self._is_regular = True
        self._changes_within = False

    @property
    def is_explained(self) -> bool:
        """Whether the size is constant or may follow a schedule."""
        if self._rises or self._falls or not self._changes_within:
            return True
        return self._is_regular and self._longest_run <= _LONGEST_RUN

    def add(self, size: int, loader_pass: int) -> None:
        """Add the size in the next pass of the model.

        Args:
            size: The size.
            loader_pass: The number of the pass over the loader.
        """
        is_between = loader_pass != self._pass and self._num_in_pass > 1
        if loader_pass != self._pass:
            self._pass, self._num_in_pass = loader_pass, 0
        self._num_in_pass += 1
        if size != self._last:
            self._begin_run(size, is_between=is_between)
        self._run += 1
        self._longest_run = max(self._longest_run, self._run)

    def _begin_run(self, size: int, *, is_between: bool) -> None:
        """Note a size that differs from the last one.

        Args:
            size: The size.
            is_between: Whether it is the first of a pass over the loader, after one of
                several batches.
        """
        if self._num_runs:
            self._changes_within |= not is_between
            self._rises &= size > self._last
            self._falls &= size < self._last
        if self._num_runs > 1:
            length = self._lengths.setdefault(self._last, self._run)
            self._is_regular &= length == self._run
        if len(self._sizes) < _TWO + 1:
            self._sizes.add(size)
            self._is_regular &= len(self._sizes) <= _TWO
        self._last, self._run = size, 0
        self._num_runs += 1


class InputSizes:
    """The sizes of a model's inputs, compared from pass to pass.

    Args:
        dim: The dimension of the inputs along which the examples are.

    Attributes:
        are_doubtful: Whether a size has changed without a rule.
    """

    def __init__(self, dim: int) -> None:
        self.are_doubtful = False
        self._dim = dim
        self._watched: dict[tuple[int, Key], SizeSequence] = {}
        # Of inputs that were whole delivered tensors, by pass over their batch: their
        # shapes, the pass over the loader, and how many there were in it.
        self._whole: dict[int, tuple[list[torch.Size], int, int]] = {}

    def saw(self, forward: ForwardPass, given: Sequence[Tensor]) -> bool:
        """Look at the sizes of the inputs of a forward pass.

        Args:
            forward: The pass.
            given: The dense tensors among its inputs.

        Returns:
            Whether sizes, in this pass or an earlier one, have changed without a rule.
        """
        delivery = forward.delivery
        if self.are_doubtful or delivery is None:
            return self.are_doubtful
        number, loader_pass = delivery.num_forward_passes, delivery.loader_pass.number
        if forward.is_whole_delivery and not self._watched:  # nearly always
            self._keep_whole(number, [t.shape for t in given], loader_pass)
            return False
        delivered = tuple(tensor.stored.sizes for tensor in delivery.tensors)
        num_samples = forward.num_samples
        for place, tensor in enumerate(given):
            if tensor.dim() > self._dim and tensor.shape[self._dim] == num_samples:
                key = place, number, tensor.dim(), delivered
                self._add(key, tensor.shape, loader_pass)
        return self.are_doubtful

    def _add(self, key: Key, shape: torch.Size, loader_pass: int) -> None:
        """Keep the sizes of an input.

        Args:
            key: The kind of input and of batch.
            shape: Its shape.
            loader_pass: The number of the pass over the loader.
        """
        for dim, size in enumerate(shape):
            if dim == self._dim:
                continue
            sizes = self._watched.get((dim, key))
            if sizes is None:
                if len(self._watched) >= _MAX_WATCHED:
                    return
                sizes = self._watched[dim, key] = SizeSequence()
                self._add_whole(sizes, dim, key)
            sizes.add(size, loader_pass)
            if not sizes.is_explained:
                self.are_doubtful = True
                self._watched.clear()
                return

    def _keep_whole(
        self, number: int, shapes: list[torch.Size], loader_pass: int
    ) -> None:
        """Keep the shapes of whole delivered tensors while no input is watched.

        Args:
            number: Which pass over their batch it is.
            shapes: The shapes of the inputs.
            loader_pass: The number of the pass over the loader.
        """
        _, before, num = self._whole.get(number, (shapes, loader_pass, 0))
        num = num + 1 if before == loader_pass else 1
        self._whole[number] = shapes, loader_pass, num

    def _add_whole(self, sizes: SizeSequence, dim: int, key: Key) -> None:
        """Add the size that an input had in passes that were not watched.

        Args:
            sizes: The sizes of an input, none yet.
            dim: The dimension that they are of.
            key: The kind of input and of batch.
        """
        place, number, num_dims, delivered = key
        shapes, loader_pass, num = self._whole.get(number, ([], 0, 0))
        shape = shapes[place] if place < len(shapes) else torch.Size()
        if len(shape) == num_dims and sizes_without(shape, self._dim) in delivered:
            for _ in range(min(num, 2)):
                sizes.add(shape[dim], loader_pass)
