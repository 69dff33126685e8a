"""Inner products of gradients: of single examples, and of minibatches' sums.

A norm is the length of one gradient. A bound for a whole group of examples also needs
the angles between them, which the Gram matrix of their gradients contains: examples
that push the weights in the same direction are revealed more easily than each of them
alone.

The gradients are formed for a part of the weights at a time, so that memory stays
bounded for any model (:mod:`~opacus_pi.gradients.held_gram`); inner products are added
up over the parts in float64. The model is not changed. What breaks it: a model whose
examples influence each other in a later batch, but not in the first one.

>>> data = [(torch.tensor([3.0, 4.0]), 0), (torch.tensor([4.0, -3.0]), 0)]
>>> model = nn.Linear(2, 1, bias=False)
>>> gradient_gram(model, lambda outputs, y: outputs[:, 0], data, [0, 1])
tensor([[25.,  0.],
        [ 0., 25.]], dtype=torch.float64)
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices, expect, in_range, positive
from opacus_pi.gradients.fallback import MODEL_ERRORS, raise_if_out_of_memory
from opacus_pi.gradients.held_gram import Batches, ProductSum, tapped_gram
from opacus_pi.gradients.norm_engine import NormEngine
from opacus_pi.models.backward_gradients import gradients_by_backward
from opacus_pi.models.batches import (
    arguments,
    forward,
    give_only_logits,
    inputs_and_targets,
    num_examples,
    rows,
    size_of,
    to_device,
    unsqueeze,
)
from opacus_pi.models.collating import Collate, Collating
from opacus_pi.models.copies import evaluation_copy
from opacus_pi.models.losses import float64_losses
from opacus_pi.models.no_trace import isolated
from opacus_pi.models.own_losses import Criterion

_MAX_BYTES = 1 << 30  # of gradients held at once
_VMAP_ELEMENTS = 1 << 26  # entries of gradients that one call of vmap forms


def gradient_gram(
    model: nn.Module,
    criterion: Criterion,
    data_set: Dataset[Any],
    indices: ArrayLike,
    *,
    batch_size: int = 64,
    collate_fn: Collate | None = None,
) -> Tensor:
    r"""Return the inner products of the gradients of each example's own loss.

    :math:`K_{ij} = \langle \nabla_\theta \ell_i, \nabla_\theta \ell_j \rangle`, not
    clipped. One pass over the examples holds the inputs and output gradients of as many
    layers as fit into three quarters of a gigabyte; with 1,000 images of 32 x 32 pixels
    a ResNet-18 takes four passes. Weights that are used outside of known layers, and
    layers that do not fit alone, are cut into parts of a gigabyte of gradients, and
    each part takes a pass.

    Args:
        model: A plain module, or one wrapped by Opacus or for distributed training;
            measured in evaluation mode on the device of its parameters.
        criterion: ``criterion(outputs, targets)`` with one loss per example; a torch
            loss module may have any reduction (it is copied).
        data_set: A map-style data set of ``(x, y)``.
        indices: Positions in the data set, ``(m,)``, each once.
        batch_size: Examples at a time; the result does not depend on it.
        collate_fn: Makes ``(x, y)`` batches of lists of examples; torch's by default.

    Returns:
        float64 ``(m, m)`` on the CPU, in the order of ``indices``.

    Raises:
        ValueError: If an index is outside the data set, the criterion does not give one
            loss per example, nothing is trainable, or examples share batch statistics.
    """
    positive(batch_size=batch_size, remedy="Try 64.")
    distinct_indices("indices", indices, size_of(data_set))
    chosen = np.asarray(indices, dtype=np.int64)
    with isolated():
        source = _Gradients(model, criterion)
        loader = _Batches(data_set, batch_size, collate_fn, source.device)
        batches = partial(loader, chosen)
        engine = NormEngine(model, criterion)
        gram, covered = tapped_gram(engine, batches, len(chosen))
        left = {n: size for n, size in source.sizes.items() if n not in covered}
        return (gram + _gram_in_parts(source, batches, left, len(chosen))).cpu()


def _gram_in_parts(
    source: "_Gradients", batches: Batches, sizes: Mapping[str, int], num_examples: int
) -> Tensor:
    """Return the Gram matrix of the gradients by some parameters, by vmap.

    Args:
        source: The gradients.
        batches: Iterates over all examples at every call: once for each part of the
            weights.
        sizes: Number of weights of each parameter.
        num_examples: m.
    """
    total, kind = ProductSum(num_examples, source.device), source.dtype
    width = max(1, _MAX_BYTES // (kind.itemsize * max(1, num_examples)))
    for names, columns in _parts(sizes, width):
        shape = num_examples, columns.stop - columns.start
        part = torch.empty(shape, dtype=kind, device=source.device)
        done = 0
        for x, y in batches():
            found = source.of_examples(x, y, names)[:, columns]
            part[done : done + len(found)] = found
            done += len(found)
        total.add(part)
    return total.matrix()


def minibatch_gram(
    model: nn.Module,
    criterion: Criterion,
    data_set: Dataset[Any],
    batches: Sequence[ArrayLike],
    centre: ArrayLike,
    *,
    factors: ArrayLike | None = None,
    batch_size: int = 256,
    collate_fn: Collate | None = None,
) -> Tensor:
    r"""Return inner products of gradient sums of minibatches, relative to a centre.

    The gradient sum of a centre batch is subtracted from that of each minibatch:

    :math:`K_{ij} = \langle U_i - U', U_j - U' \rangle` with
    :math:`U_i = \sum_{x \in B_i} c_x \nabla_\theta \ell_x`. The differences are taken
    in float64 before the products: subtracting the products would lose every digit.

    Args:
        model: As for :func:`gradient_gram`.
        criterion: As for :func:`gradient_gram`.
        data_set: As for :func:`gradient_gram`.
        batches: J batches of positions in the data set; an empty one sums to 0.
        centre: The batch whose sum is U'.
        factors: c, ``(n,)``, such as the clipping factors min(1, C/‖g‖); default: 1.
        batch_size: Examples at a time; the result does not depend on it.
        collate_fn: As for :func:`gradient_gram`.

    Returns:
        float64 ``(J, J)`` on the CPU.

    Raises:
        ValueError: As :func:`gradient_gram` does.
    """
    positive(batch_size=batch_size, remedy="Try 256.")
    size = size_of(data_set)
    weights = np.ones(size) if factors is None else np.asarray(factors, np.float64)
    expect(
        weights.shape == (size,),
        "factors",
        f"an array of shape {weights.shape}",
        f"must have shape ({size},)",
        "Give one factor for each example of the data set.",
    )
    members = [np.asarray(batch, dtype=np.int64) for batch in (centre, *batches)]
    for batch in members:
        in_range(0, size - 1, batches=batch, remedy="Pass positions in data_set.")
    with isolated():
        source = _Gradients(model, criterion)
        loader = _Batches(data_set, batch_size, collate_fn, source.device)
        middle, *sums = (source.summed(loader, batch, weights) for batch in members)
        gram = torch.zeros(len(sums), len(sums), dtype=torch.float64)
        for name, origin in middle.items():
            apart = [(one[name] - origin).flatten() for one in sums]
            if apart:
                stacked = torch.stack(apart)
                gram += (stacked @ stacked.T).cpu()
    return gram


class _Batches:
    """Batches of chosen examples, on a device; a call iterates over them once."""

    def __init__(
        self,
        data_set: Dataset[Any],
        batch_size: int,
        collate_fn: Collate | None,
        device: torch.device,
    ) -> None:
        self._data_set, self._device = data_set, device
        self._options: dict[str, Any] = {
            "batch_size": batch_size,
            "collate_fn": Collating(collate_fn),
        }

    def __call__(self, indices: NDArray[np.int64]) -> Iterator[tuple[Any, Any]]:
        generator = torch.Generator()  # a loader draws a seed when it is iterated
        part = Subset(self._data_set, indices.tolist())
        for batch in DataLoader(part, generator=generator, **self._options):
            yield to_device(inputs_and_targets(batch), self._device)


class _Gradients:
    """Gradients of an evaluation copy of a model, single or summed."""

    def __init__(self, model: nn.Module, criterion: Criterion) -> None:
        self._model = evaluation_copy(model)
        self._model.register_forward_hook(give_only_logits)
        self._losses = float64_losses(criterion)
        named = self._model.named_parameters()
        self._trainable = {name: p for name, p in named if p.requires_grad}
        self._vectorised = True
        expect(
            bool(self._trainable),
            "model",
            f"a {type(model).__name__} without one",
            "must have a trainable parameter",
            "Set requires_grad on the parameters to measure.",
        )

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(iter(self._trainable.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest type that holds the gradients without rounding."""
        kinds = {p.dtype for p in self._trainable.values()}
        return torch.float64 if torch.float64 in kinds else torch.float32

    @property
    def sizes(self) -> dict[str, int]:
        """Number of weights of each trainable parameter."""
        return {name: p.numel() for name, p in self._trainable.items()}

    def of_examples(self, x: Any, y: Any, names: Sequence[str]) -> Tensor:
        """Return each example's flat gradient by some parameters.

        Once ``torch.func.vmap`` has failed, every later batch is differentiated one
        example after the other.

        Args:
            x: Inputs of ``b`` examples.
            y: Their targets.
            names: The parameters, in the order of their entries.

        Returns:
            float64 ``(b, P)``, with P the number of entries of these parameters.

        Raises:
            CoupledLoss: If the criterion divides by a number that depends on the whole
                batch.
        """
        self._losses.check_targets(y)
        chosen = {name: self._trainable[name] for name in names}
        if self._vectorised:
            try:
                return self._vmapped(x, y, chosen)
            except MODEL_ERRORS as error:
                raise_if_out_of_memory(error)
                self._vectorised = False
        found = []
        for i in range(num_examples(y)):
            one = self._loss_sum(rows(x, i, i + 1), rows(y, i, i + 1), None)
            found.append(torch.cat([g.flatten() for g in _grad(one, chosen)]))
        return torch.stack(found)

    def _vmapped(self, x: Any, y: Any, chosen: Mapping[str, Tensor]) -> Tensor:
        """Return these gradients by ``torch.func``, for many examples at once.

        Each example is alone in its forward pass, so that the model cannot mix them.
        """
        values = {name: p.detach() for name, p in chosen.items()}

        def loss(values: dict[str, Tensor], x: Any, y: Any) -> Tensor:
            call = arguments(unsqueeze(x))
            outputs = torch.func.functional_call(self._model, values, *call)
            return self._losses(outputs, unsqueeze(y)).sum()

        size = sum(p.numel() for p in values.values())
        gradients = torch.func.vmap(
            torch.func.grad(loss),
            in_dims=(None, 0, 0),
            chunk_size=max(1, _VMAP_ELEMENTS // size),
        )(values, x, y)
        flat = [gradients[name].double().flatten(1) for name in chosen]
        return torch.cat(flat, 1)

    def summed(
        self, loader: _Batches, batch: NDArray[np.int64], factors: NDArray[np.float64]
    ) -> dict[str, Tensor]:
        """Return the sum of a batch's weighted gradients, in float64, by parameter.

        Args:
            loader: Returns the batch in parts that fit into memory.
            batch: Positions in the data set.
            factors: The weights, one for each example of the data set, ``(n,)``.
        """
        total = {
            name: torch.zeros_like(p, dtype=torch.float64)
            for name, p in self._trainable.items()
        }
        weights = torch.from_numpy(factors[batch])
        done = 0
        for x, y in loader(batch):
            size = num_examples(y)
            part = weights[done : done + size].to(self.device)
            done += size
            gradients = _grad(self._loss_sum(x, y, part), self._trainable)
            for sum_, gradient in zip(total.values(), gradients, strict=True):
                sum_ += gradient
        return total

    def _loss_sum(self, x: Any, y: Any, weights: Tensor | None) -> Tensor:
        """Return the weighted sum of the losses of a batch."""
        losses = self._losses(forward(self._model, x), y)
        return losses.sum() if weights is None else losses.double() @ weights


def _grad(loss: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the gradients of one number, dense and in float64, zeros if unused."""
    wanted = list(parameters.values())
    return [
        torch.zeros_like(p, dtype=torch.float64) if g is None else g.to_dense().double()
        for p, g in zip(wanted, gradients_by_backward(loss, wanted), strict=True)
    ]


def _parts(sizes: Mapping[str, int], width: int) -> Iterator[tuple[list[str], slice]]:
    """Cut all weights into parts of at most ``width`` entries.

    Args:
        sizes: Number of entries of each parameter, in order.
        width: Entries of a part.

    Yields:
        The parameters that a part touches, and which columns of their joint flat
        gradient belong to the part.
    """
    if not sizes:
        return
    ends = np.cumsum(list(sizes.values()))
    starts = ends - list(sizes.values())
    for low in range(0, int(ends[-1]), width):
        high = min(low + width, int(ends[-1]))
        inside = np.flatnonzero((ends > low) & (starts < high))
        first = int(starts[inside[0]])
        names = [name for k, name in enumerate(sizes) if k in inside]
        yield names, slice(low - first, high - first)
