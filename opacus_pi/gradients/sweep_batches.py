"""How many examples a sweep measures at once, by the memory that an example takes.

Small models are measured faster in large batches, because each operation has a fixed
cost. Large models are not, and need the memory. So one forward pass on the first batch
counts the bytes that autograd keeps for the backward pass, and the batches that follow
have as many examples as fit into a budget: 32 MiB on the CPU, where larger batches fall
out of the caches, an eighth of the free memory on a GPU.

*Guarantee.* At least ``SMALLEST`` examples and at most ``LARGEST``. On the CPU the
number depends only on the model and the first batch.

*What breaks it.* Later examples that are much larger than the first ones. On a GPU a
batch that does not fit is halved (``in_halves``).

>>> examples_at_once(nn.Linear(3, 2), torch.randn(64, 3))
1024
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._torch_compat import pytree
from opacus_pi.gradients.fallback import MODEL_ERRORS, raise_if_out_of_memory
from opacus_pi.models.batches import forward, num_examples, rows
from opacus_pi.models.copies import evaluation_copy

__all__ = ["SMALLEST", "examples_at_once", "in_halves"]

SMALLEST, LARGEST = 64, 1024
_CPU_BUDGET = 1 << 25  # bytes
_GPU_SHARE = 8  # backward passes and norms need about as much again as autograd keeps

Squares = Callable[[Any, Any], tuple[Tensor, Any]]


def examples_at_once(model: nn.Module, x: Any) -> int:
    """Return how many examples to measure at once, a multiple of ``SMALLEST``.

    Args:
        model: A plain module, or a wrapped one; a copy is run.
        x: Inputs of ``SMALLEST`` examples, on the model's device.
    """
    device = next(model.parameters()).device
    budget = _CPU_BUDGET
    if device.type == "cuda":
        budget = torch.cuda.mem_get_info(device)[0] // _GPU_SHARE
    try:
        kept = _bytes_kept(evaluation_copy(model), x)
    except MODEL_ERRORS as error:  # such as those of hooks within torch.func
        raise_if_out_of_memory(error)
        return SMALLEST
    batches = budget // max(kept, 1)
    return SMALLEST * max(1, min(batches, LARGEST // SMALLEST))


def _bytes_kept(model: nn.Module, x: Any) -> int:
    """Return how many bytes of a forward pass autograd keeps, without the weights."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward(model, x)
    for weight in (*model.parameters(), *model.buffers()):
        kept.pop(weight.untyped_storage().data_ptr(), None)
    del outputs  # until here, so that no storage was used twice
    return sum(kept.values())


def in_halves(squares: Squares, x: Any, y: Any) -> tuple[Tensor, Any]:
    """Measure a batch; where memory runs out, one half after the other.

    Args:
        squares: Returns squared norms, ``(b,)``, and outputs, as
            ``NormEngine.squares``.
        x: Inputs of ``b`` examples.
        y: Their targets.

    Raises:
        torch.OutOfMemoryError: If not even ``SMALLEST`` examples fit.
    """
    size = num_examples(y)
    try:
        return squares(x, y)
    except torch.OutOfMemoryError:
        if size <= SMALLEST:
            raise
    middle = size // 2
    halves = [
        in_halves(squares, rows(x, *ends), rows(y, *ends))
        for ends in ((0, middle), (middle, size))
    ]
    found, outputs = zip(*halves, strict=True)
    return torch.cat(found), pytree.tree_map(lambda *p: torch.cat(p), *outputs)
