r"""Squared norms of sums of outer products, by the cheaper of two exact formulas.

The gradient of a linear layer's weight is :math:`G = \sum_t g_t a_t^\top` over t
positions, with inputs :math:`a_t` of length d and output gradients :math:`g_t` of
length p. There are two exact ways to compute its norm:

* *direct*: form G, :math:`t d p` multiplications, and take its length;
* *Gram*: the inner products of all pairs of positions, :math:`t^2 (d + p)`
  multiplications, without forming G (Rochette et al. 2019, arXiv 1912.06015).

Which one is used follows from these counts alone, so that a result repeats bit for bit.
The Gram formula is the cheaper one for few positions and wide layers.

The guarantee: a norm is never too small by more than rounding, so that clipping by it
bounds the example. The danger is terms that nearly cancel, such as long inputs that
differ little with opposite gradients: the Gram formula then returns a difference of
large numbers, which is mostly rounding error. In this case the largest possible error
is added (:func:`pair_squares`).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from opacus_pi.models.accelerators import widened

_CPU_BLOCK = 1 << 18  # elements of an intermediate that stay in the CPU's cache
_GPU_BLOCK = 1 << 26  # elements of an intermediate on a GPU: a quarter of a GiB
# Up to this length torch's vector_norm is fast and accurate; longer float32 rows are
# added up naively, and lose digits.
_SHORT_ROW = 1 << 12
_CANCELLED = 2.0**-12  # share of the terms' size below which rounding errors count
_ROUNDING = 16  # units in the last place by which the sum may be wrong, in that size

Product = Callable[[Tensor, Tensor], Tensor]


def at_least_float32(values: Tensor) -> Tensor:
    """Return half precision as float32, in which norms can be added up."""
    half = values.dtype in (torch.float16, torch.bfloat16)
    return values.float() if half else values


def squared_lengths(values: Tensor) -> Tensor:
    """Return the squared norm of each row, float64 ``(b,)``.

    Long rows are cut into pieces whose norms are added up in float64.

    Args:
        values: ``(b, ...)``, flattened to rows.
    """
    lengths: Tensor
    flat = at_least_float32(values.flatten(1))
    if flat.shape[1] <= _SHORT_ROW:
        lengths = torch.linalg.vector_norm(flat, dim=1)
        return widened(lengths).square()
    whole = flat.shape[1] - flat.shape[1] % _SHORT_ROW
    pieces = flat[:, :whole].unflatten(1, (-1, _SHORT_ROW))
    lengths = torch.linalg.vector_norm(pieces, dim=2)
    squares = widened(lengths).square().sum(1)
    return squares + squared_lengths(flat[:, whole:])


def blocks(values: Tensor, row_size: int) -> Iterator[slice]:
    """Yield slices of the examples such that an intermediate of each fits the cache.

    An empty batch has one slice, which is empty.

    Args:
        values: A tensor with one row per example.
        row_size: Elements of the intermediate per example.
    """
    limit = _GPU_BLOCK if values.is_cuda else _CPU_BLOCK
    step = max(1, limit // max(1, row_size))
    for start in range(0, max(1, len(values)), step):
        yield slice(start, start + step)


def outer_product_squares(a: Tensor, g: Tensor) -> Tensor:
    r"""Return :math:`\|\sum_t g_t a_t^\top\|_F^2` for each example.

    For one position this is :math:`\|g\|^2 \|a\|^2`, otherwise whichever of
    :func:`direct_squares` and :func:`gram_squares` takes fewer operations.

    Args:
        a: Inputs, ``(b, t, d)``.
        g: Output gradients, ``(b, t, p)``.

    Returns:
        float64 ``(b,)``.
    """
    if a.shape[1] == 1:
        return squared_lengths(a) * squared_lengths(g)
    counts = _num_operations(a.shape[1], a.shape[2], g.shape[2])
    return min(counts, key=counts.__getitem__)(a, g)


def _num_operations(t: int, d: int, p: int) -> dict[Product, int]:
    """Return the number of multiplications of either formula, divided by t."""
    return {gram_squares: t * (d + p), direct_squares: d * p}


def direct_squares(a: Tensor, g: Tensor) -> Tensor:
    """Return the norms of :func:`outer_product_squares` from the matrices themselves.

    The matrices are formed for a block of examples at a time.
    """
    size = a.shape[2] * g.shape[2]
    return torch.cat(
        [squared_lengths(g[i].mT @ a[i]) for i in blocks(a, row_size=size)]
    )


def gram_squares(a: Tensor, g: Tensor) -> Tensor:
    r"""Return the norms of :func:`outer_product_squares` from pairs of positions.

    :math:`\sum_{ts} \langle a_t, a_s\rangle \langle g_t, g_s\rangle`.
    """
    t = a.shape[1]
    return torch.cat(
        [
            pair_squares(a[i] @ a[i].mT, g[i] @ g[i].mT)
            for i in blocks(a, row_size=t * t)
        ]
    )


def pair_squares(inputs: Tensor, grads: Tensor) -> Tensor:
    """Return the sum of the entrywise products of two Gram matrices, float64 ``(b,)``.

    Where the terms nearly cancel, the result is mostly rounding error, and clipping by
    a length that is too small would not bound the example. In this case the possible
    error is added.

    Args:
        inputs: Inner products of inputs, ``(b, t, t)``, overwritten.
        grads: Inner products of output gradients, ``(b, t, t)``.
    """
    inputs, grads = at_least_float32(inputs), at_least_float32(grads)
    lengths = [widened(m.diagonal(dim1=1, dim2=2)) for m in (inputs, grads)]
    # The sum that the terms would have if none cancelled: (sum_t |a_t| |g_t|)^2.
    size = (lengths[0] * lengths[1]).clamp_(min=0.0).sqrt_().sum(1).square_()
    squares = widened(inputs.mul_(grads).flatten(1).sum(1))
    return with_rounding(squares, size, inputs.dtype)


def with_rounding(squares: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """Return squared lengths, plus the possible rounding error where terms cancelled.

    Args:
        squares: The computed squared lengths, float64 ``(b,)``.
        size: Their values if no terms cancelled, float64 ``(b,)``.
        dtype: The type in which the terms were computed.
    """
    error = size * (_ROUNDING * torch.finfo(dtype).eps)
    squares = squares.clamp(min=0.0)
    return torch.where(squares < _CANCELLED * size, squares + error, squares)
