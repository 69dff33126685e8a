"""Gram matrix of per-example gradients from a few passes over the examples.

**Idea.** The gradients of 1,000 examples by all weights of a large model do not fit
into memory, and a pass for every part of the weights that fits takes dozens of passes.
A layer's inputs and the gradients at its outputs, from which its gradients follow, are
often many times smaller. So a pass *holds* these for as many parameters as fit. Then
the gradients by one parameter after the other are formed, some rows of the parameter
at a time, and their inner products are added up in float64.

**Guarantee.** The matrix is that of gradients which are computed one at a time, up to
rounding. A norm of the first batch is compared with plain autograd, as in a sweep
(:mod:`~opacus_pi.gradients.norm_engine`). Every example is passed forward and backward
once for each group of parameters that fits, and the first batch twice more.

**What breaks it.** Parameters without a rule, and those whose inputs and output
gradients alone do not fit, are not covered; :mod:`~opacus_pi.gradients.gram` computes
them by a pass for each part of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi.gradients.example_gradients import ExampleGradients, ExplicitGradients
from opacus_pi.gradients.norm_engine import NormEngine
from opacus_pi.models.batches import map_tensors, num_examples

__all__ = ["ProductSum", "tapped_gram"]

Batches = Callable[[], Iterator[tuple[Any, Any]]]
_HELD_BYTES = 3 << 28  # of inputs and output gradients held at once: 3/4 GiB
_FORMED_ENTRIES = 1 << 25  # of gradients formed at once: 128 MiB in float32
_PRODUCT_ENTRIES = 1 << 24  # multiplied at once: 128 MiB in float64
_PRODUCT_BLOCKS = 8  # of rows; only blocks on and below the diagonal are multiplied


class ProductSum:
    """Sum of the inner products of rows, multiplied and added up in float64.

    Args:
        size: Number of rows, m.
        device: Where the products are computed.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._total = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Add the inner products of all pairs of rows.

        Args:
            rows: ``(m, P)``, some of the entries of m vectors.
        """
        size = max(1, len(rows))
        step = -(-size // _PRODUCT_BLOCKS)
        for columns in rows.split(max(1, _PRODUCT_ENTRIES // size), dim=1):
            wide = columns.double()
            for start in range(0, len(rows), step):
                stop = start + step
                self._total[start:stop, :stop] += wide[start:stop] @ wide[:stop].T

    def matrix(self) -> Tensor:
        """Return the sum, float64 ``(m, m)``, symmetric."""
        return self._total.tril() + self._total.tril(-1).T


def tapped_gram(
    engine: NormEngine, batches: Batches, num_examples: int
) -> tuple[Tensor, set[str]]:
    """Return the Gram matrix of the gradients by the parameters that taps measure.

    Args:
        engine: A new engine.
        batches: Iterates over all examples, on the engine's device, at every call.
        num_examples: m.

    Returns:
        float64 ``(m, m)`` on the engine's device, and the names of the parameters that
        it covers.
    """
    total = ProductSum(num_examples, engine.device)
    scales = torch.ones(num_examples, dtype=torch.float64, device=engine.device)
    _confirm(engine, batches)
    covered = set()
    for names in _groups(_bytes_per_example(engine, batches), num_examples):
        held, scales = _hold(engine, batches, names)
        for name in names:
            gradients, parameter = held.pop(name), engine.tapped.get(name)
            if parameter is None:  # a later batch uses it where no tap measures it
                continue
            for part in _formed(gradients, parameter, num_examples):
                total.add(part)
            covered.add(name)
    # Gradients are held at unit length at the output, where they cannot underflow.
    return total.matrix() * torch.outer(scales, scales), covered


def _confirm(engine: NormEngine, batches: Batches) -> None:
    """Measure batches until plain autograd has confirmed or refuted a norm."""
    for x, y in batches():
        engine.squares(x, y)
        if engine.is_confirmed:
            return


def _bytes_per_example(engine: NormEngine, batches: Batches) -> dict[str, int]:
    """Return what an example takes of memory for each parameter, by the first batch."""
    first = next(batches(), None)
    if first is None or not engine.tapped:
        return {}
    x, y = first
    found, _ = engine.held(x, y, set(engine.tapped))
    sizes = {}
    for name, parameter in engine.tapped.items():
        used = found[name].num_entries // num_examples(y) if name in found else 0
        width = max(4, parameter.dtype.itemsize)
        sizes[name] = width * min(used, parameter.numel())
    return sizes


def _groups(sizes: Mapping[str, int], num_examples: int) -> list[list[str]]:
    """Divide parameters into groups that can be held together.

    The largest that still fits is taken first. One that does not fit alone is in no
    group.

    Args:
        sizes: Bytes that an example takes for each parameter.
        num_examples: Number of examples.
    """
    groups: list[list[str]] = []
    rooms: list[int] = []
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        needed = sizes[name] * num_examples
        if needed > _HELD_BYTES:
            continue
        place = next((i for i, room in enumerate(rooms) if needed <= room), None)
        if place is None:
            place = len(groups)
            groups.append([])
            rooms.append(_HELD_BYTES)
        groups[place].append(name)
        rooms[place] -= needed
    return groups


def _hold(
    engine: NormEngine, batches: Batches, names: Sequence[str]
) -> tuple[dict[str, list[tuple[int, ExampleGradients | None]]], Tensor]:
    """Make one pass, and hold what the gradients by some parameters follow from.

    Returns:
        For each parameter, for each batch its size and the gradients, None if the batch
        did not use the parameter; and the length of each example's gradient at the
        output, float64 ``(m,)``.
    """
    held: dict[str, list[tuple[int, ExampleGradients | None]]] = {n: [] for n in names}
    scales = []
    for x, y in batches():
        # A loader may write its next batch into the same memory.
        found, lengths = engine.held(map_tensors(torch.clone, x), y, set(names))
        for name, parts in held.items():
            gradients = found.get(name)
            parameter = engine.tapped.get(name)
            if gradients is not None and parameter is not None:
                gradients = _smaller(gradients, len(lengths), parameter)
            parts.append((len(lengths), gradients))
        scales.append(lengths)
    return held, torch.cat(scales)


def _smaller(
    gradients: ExampleGradients, size: int, parameter: nn.Parameter
) -> ExampleGradients:
    """Return the gradients formed where that takes less memory."""
    if size * parameter.numel() < gradients.num_entries:
        return ExplicitGradients(gradients.form().flatten(1))
    return gradients


def _formed(
    batches: Sequence[tuple[int, ExampleGradients | None]],
    parameter: nn.Parameter,
    num_examples: int,
) -> Iterator[Tensor]:
    """Form the gradients of all examples by one parameter, some of its rows at a time.

    Args:
        batches: For each batch its size and gradients.
        parameter: The parameter.
        num_examples: m.

    Yields:
        ``(m, P)``, with P the number of entries of these rows.
    """
    num_rows = len(parameter) if parameter.dim() else 1
    width = parameter.numel() // max(1, num_rows)
    step = max(1, _FORMED_ENTRIES // max(1, num_examples * width))
    kind = torch.promote_types(parameter.dtype, torch.float32)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        shape = num_examples, (rows.stop - start) * width
        part = torch.zeros(shape, dtype=kind, device=parameter.device)
        done = 0
        for size, gradients in batches:
            if gradients is not None:
                part[done : done + size] = gradients.form_rows(rows, num_rows)
            done += size
        yield part
