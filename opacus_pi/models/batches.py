"""Batches as users have them: tensors, or tuples and dicts of tensors.

A batch is a pair ``(x, y)``, or a dict whose ``"labels"`` are the targets, as the
collators of Hugging Face return it. Everything below treats ``x``, ``y`` and a model's
outputs as trees of tensors whose first dimension counts the examples.

>>> inputs_and_targets({"input_ids": [[7, 8]], "labels": [1]})
({'input_ids': [[7, 8]]}, [1])
"""

from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from opacus_pi._torch_compat import pytree
from opacus_pi.models.collating import Collate, Collating

# Names as in the package transformers. A model divides the sum of its losses by the
# number of items, if it is given one.
_TARGETS, _OUTPUTS, NUM_ITEMS = "labels", "logits", "num_items_in_batch"


def arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments with which a model is called on x.

    Args:
        x: A tensor, a tuple or list (``model(*x)``) or a dict (``model(**x)``); the
            first dimension of each tensor counts the examples.
    """
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x), {}) if isinstance(x, (tuple, list)) else ((x,), {})


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """Return the inputs and the targets of a batch.

    Args:
        batch: A pair ``(x, y)``, or a mapping with ``"labels"``, whose other entries
            are x.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(batch, Mapping) and _TARGETS in batch:
        return {k: v for k, v in batch.items() if k != _TARGETS}, batch[_TARGETS]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise ValueError(
        f'A batch must be a pair (x, y) or a dict with "{_TARGETS}", got a '
        f"{type(batch).__name__}. Pass a collate_fn that returns (inputs, targets)."
    )


def batches_of(data: Any, batch_size: int, collate_fn: Collate | None = None) -> Any:
    """Return an iterable of batches.

    Args:
        data: A data set, of torch or of another package such as ``datasets``, or what
            is an iterable of batches already: a loader, a list or a tuple of batches.
        batch_size: Batch size for a data set.
        collate_fn: Makes a batch of a list of items of a data set; None: torch's.
    """
    kind = type(data)
    is_indexed = hasattr(kind, "__getitem__") and hasattr(kind, "__len__")
    if isinstance(data, Dataset) or (is_indexed and not isinstance(data, list | tuple)):
        return DataLoader(data, batch_size, collate_fn=Collating(collate_fn))
    return data


def size_of(data_set: Dataset[Any]) -> int:
    """Return the number of examples of a map-style data set."""
    return len(data_set)  # type: ignore[arg-type]  # torch: Dataset has no __len__


def num_examples(targets: Any) -> int:
    """Return the number of examples of a batch.

    Args:
        targets: Its targets: one tensor, or several in any nesting, as a model with
            several heads has them. The first of them counts. 0 if it has no length.

    >>> num_examples((torch.zeros(8), torch.zeros(8, 3)))
    8
    """
    tensors = tensors_of(targets)
    if not tensors:
        return len(targets) if isinstance(targets, Sized) else 0
    return next((len(tensor) for tensor in tensors if tensor.dim()), 0)


def forward(model: nn.Module, x: Any) -> Any:
    """Return the model's outputs on the batch ``x``."""
    args, kwargs = arguments(x)
    return logits_of(model(*args, **kwargs))


def logits_of(outputs: Any) -> Any:
    """Return ``outputs["logits"]`` of a mapping (Hugging Face), else the outputs."""
    named = isinstance(outputs, Mapping) and _OUTPUTS in outputs
    return outputs[_OUTPUTS] if named else outputs


def give_only_logits(module: nn.Module, args: Any, outputs: Any) -> Any:
    """Return only the logits; a forward hook for copies of models.

    A copy is called in several ways (directly, by ``torch.func``); with this hook every
    caller gets logits.
    """
    return logits_of(outputs)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Return ``batch`` with ``function`` applied to each tensor in it."""
    if isinstance(batch, Tensor):
        return function(batch)
    return pytree.tree_map_only(Tensor, function, batch)


def rows(batch: Any, start: int, stop: int) -> Any:
    """Return the examples ``start`` to ``stop`` of each tensor in ``batch``."""
    return map_tensors(lambda tensor: tensor[start:stop], batch)


def rows_of(
    batch: Any,
    positions: Sequence[int],
    size: int,
    dim: int = 0,
    *,
    elsewhere: bool = True,
) -> Any:
    """Return some examples of each tensor of a batch, in this order.

    Args:
        batch: Tensors in any nesting. Those without a dimension for the examples are
            shared by all of them, and stay as they are.
        positions: Which examples.
        size: The number of examples.
        dim: The dimension of the examples, where a tensor has such a size there.
        elsewhere: Whether it is otherwise the first or the second, if one of them has
            such a size; if False, the tensor is shared.
    """
    places = (dim, 0, 1) if elsewhere else (dim,)

    def chosen(tensor: Tensor) -> Tensor:
        found = [d for d in places if tensor.shape[d : d + 1] == (size,)]
        index = torch.tensor(list(positions), device=tensor.device)
        return tensor.index_select(found[0], index) if found else tensor

    return map_tensors(chosen, batch)


def unsqueeze(example: Any) -> Any:
    """Return one example as a batch of one."""
    return map_tensors(lambda tensor: tensor.unsqueeze(0), example)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return ``batch`` with its tensors on ``device``."""
    return map_tensors(lambda tensor: tensor.to(device), batch)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer, the CPU without one."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def to_float64(value: Any) -> Any:
    """Return ``value`` with its floating tensors in float64."""
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, value)


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in any nesting of lists, tuples, dicts and the like."""
    if isinstance(tree, Tensor):  # nearly always, and this is called in each update
        return [tree]
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def floating(outputs: Any) -> dict[int, Tensor]:
    """Return the floating tensors among the leaves of ``outputs``, by position."""
    alone = isinstance(outputs, Tensor)
    return {
        place: leaf
        for place, leaf in enumerate(
            [outputs] if alone else pytree.tree_leaves(outputs)
        )
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }


def reached(
    outputs: Any, cotangents: Mapping[int, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs from which a backward pass can start, with their gradients.

    Args:
        outputs: The model's outputs.
        cotangents: The gradient at each floating output, by its position among the
            leaves.

    Returns:
        Two lists of one length; empty if no output depends on a parameter that requires
        gradients.
    """
    pairs = [
        (leaf, cotangents[place])
        for place, leaf in floating(outputs).items()
        if leaf.requires_grad
    ]
    return [leaf for leaf, _ in pairs], [cotangent for _, cotangent in pairs]
