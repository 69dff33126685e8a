"""Follow the dimensions of every tensor through one run of a model.

The model runs once on an example; each operation that torch dispatches is met by a rule
that says how the output's dimensions come from the inputs'. An operation without a rule
pins what it touches: fewer permutations are found, never a wrong one.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from opacus_pi.symmetries.axes import Dims, fresh, pin
from opacus_pi.symmetries.axis_rules import RULES, pointwise

_UNCOUNTED = {"detach"}  # torch adds one where somebody else holds a new tensor
_ACTIVATIONS = {"addmm", "mm", "bmm", "baddbmm", "convolution"}


class AxisTracer(TorchDispatchMode):
    """Gives every tensor of a run its dimensions, as products of atoms.

    Args:
        sources: Tensors whose dimensions are free: parameters and buffers.

    Attributes:
        seen: Each tensor met so far with its dimensions, by its id.
        outputs: Dimensions of each operation's first output, in order of execution;
            ``None`` unless it is an activation (pointwise, convolution, product).
    """

    def __init__(self, sources: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.seen: dict[int, tuple[Tensor, Dims]] = {}
        self.outputs: list[Dims | None] = []
        self._sources = {id(tensor): tensor for tensor in sources}

    def dims(self, tensor: Tensor) -> Dims:
        """The tensor's dimensions; those of an unknown tensor are pinned."""
        if id(tensor) not in self.seen:
            free = id(tensor) in self._sources
            self.seen[id(tensor)] = tensor, fresh(tensor.shape, fixed=not free)
        return self.seen[id(tensor)][1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and label what comes out."""
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        name = _base_name(func)
        elementwise = _is_pointwise(func)
        if not outputs:
            labels = []
        elif name in RULES:
            labels = RULES[name](self.dims, _bound(func, args, kwargs), result)
        elif elementwise:
            labels = pointwise(self.dims, _bound(func, args, kwargs), result)
        else:
            pin(d for t in _tensors((args, kwargs)) for d in self.dims(t))
            labels = [fresh(tensor.shape, fixed=True) for tensor in outputs]
        for tensor, label in zip(outputs, labels, strict=False):
            self.seen[id(tensor)] = tensor, label
        if name not in _UNCOUNTED:
            activation = labels and (elementwise or name in _ACTIVATIONS)
            self.outputs.append(labels[0] if activation else None)
        return result


class OutputCapture(TorchDispatchMode):
    """Keeps the first output of chosen operations of a run.

    Args:
        numbers: Which operations, counted from 0 in order of execution.

    Attributes:
        kept: The outputs, by number.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.kept: dict[int, Tensor] = {}
        self._numbers = set(numbers)
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and keep a copy of what comes out if it was chosen."""
        result = func(*args, **(kwargs or {}))
        if _base_name(func) not in _UNCOUNTED:
            if self._count in self._numbers:
                self.kept[self._count] = _tensors(result)[0].clone()
            self._count += 1
        return result


@contextlib.contextmanager
def elementary_operations() -> Iterator[None]:
    """Have attention run as elementary operations, without gradients."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _base_name(func: Any) -> str:
    """An operation's name, in-place variants under the name of the other."""
    name: str = func._schema.name
    return name.removeprefix("aten::").removesuffix("_")


def _is_pointwise(func: Any) -> bool:
    """Whether each output entry depends on the input entries at its own place only."""
    if torch.Tag.pointwise in func.tags:
        return True
    packet = getattr(torch.ops.aten, _base_name(func), None)
    functional = getattr(packet, func._overloadname, None)
    return functional is not None and torch.Tag.pointwise in functional.tags


def _bound(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by the names of the operation's schema, defaults included."""
    names = [argument.name for argument in func._schema.arguments]
    defaults = {
        argument.name: argument.default_value for argument in func._schema.arguments
    }
    return {**defaults, **dict(zip(names, args, strict=False)), **(kwargs or {})}


def _tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested lists and dicts."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
