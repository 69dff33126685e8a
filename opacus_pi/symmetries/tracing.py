"""Follow the dimensions of every tensor through one run of a model.

The model runs once on an example. For each operation that torch dispatches, a rule says
how the dimensions of the outputs follow from those of the inputs. An operation without
a rule fixes the dimensions of all its inputs: fewer permutations are found, but never a
wrong one.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from opacus_pi._torch_compat import (
    TorchDispatchMode,
    operation_overload,
    operation_schema,
)
from opacus_pi.models.batches import tensors_of
from opacus_pi.symmetries.axes import Dims, fix, fresh
from opacus_pi.symmetries.operation_rules import RULES, pointwise

# Operations that are not counted: whether torch dispatches a ``detach`` depends on who
# else holds the tensor, so runs of one model may differ in them.
_UNCOUNTED = {"detach"}
_ACTIVATIONS = {"addmm", "mm", "bmm", "baddbmm", "convolution"}


class AxisTracer(TorchDispatchMode):
    """Assign dimensions, as products of atoms, to every tensor of a run.

    A context manager: it follows every operation that torch dispatches inside it.

    Args:
        sources: Tensors whose dimensions may be permuted: parameters and buffers.

    Attributes:
        seen: Each tensor of the run with its dimensions, by its ``id``. The tensors are
            kept alive until the run is over, because Python reuses the ``id`` of a
            tensor that is gone, and the next tensor would get its dimensions.
        outputs: Dimensions of each operation's first output, in order of execution;
            ``None`` unless it is an activation (pointwise, convolution, product).
    """

    def __init__(self, sources: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.seen: dict[int, tuple[Tensor, Dims]] = {}
        self.outputs: list[Dims | None] = []
        self._sources = {id(tensor): tensor for tensor in sources}

    def dims(self, tensor: Tensor) -> Dims:
        """Return the dimensions of a tensor; those of an unknown tensor are fixed.

        Unknown tensors are the inputs of the model, constants stored outside parameters
        and buffers, and outputs for which a rule returned nothing.

        Args:
            tensor: A parameter or buffer, or any tensor of the run.
        """
        if id(tensor) not in self.seen:
            free = id(tensor) in self._sources
            self.seen[id(tensor)] = tensor, fresh(tensor.shape, fixed=not free)
        return self.seen[id(tensor)][1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and assign dimensions to its outputs.

        Torch calls this for every operation inside the context. ``outputs`` gets one
        entry for each operation that is counted, so that ``OutputCapture``, which
        counts the same way, finds an activation of another model by its number.
        """
        result = func(*args, **(kwargs or {}))
        outputs = tensors_of(result)
        found = self._output_dims(func, args, kwargs, result) if outputs else []
        for tensor, dims in zip(outputs, found, strict=False):
            self.seen[id(tensor)] = tensor, dims
        name = _base_name(func)
        if name not in _UNCOUNTED:
            is_activation = found and (_is_pointwise(func) or name in _ACTIVATIONS)
            self.outputs.append(found[0] if is_activation else None)
        return result

    def _output_dims(
        self, func: Any, args: Any, kwargs: Any, result: Any
    ) -> list[Dims]:
        """Apply the operation's rule; without a rule, fix everything it touches."""
        rule = RULES.get(_base_name(func))
        if rule is None and _is_pointwise(func):
            rule = pointwise
        if rule is not None:
            return rule(self.dims, _bound(func, args, kwargs), result)
        fix(dim for tensor in tensors_of((args, kwargs)) for dim in self.dims(tensor))
        return [fresh(tensor.shape, fixed=True) for tensor in tensors_of(result)]


class OutputCapture(TorchDispatchMode):
    """Keep the first output of selected operations of a run.

    The operations are numbered as in ``AxisTracer.outputs``. A model of the traced
    architecture runs the same operations in the same order.

    Args:
        numbers: Numbers of the operations, from 0 in order of execution.

    Attributes:
        kept: The outputs, by number. They are copies, because a later operation may
            write to an output in place.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.kept: dict[int, Tensor] = {}
        self._numbers = set(numbers)
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one operation, and keep a copy of its output if it is selected."""
        result = func(*args, **(kwargs or {}))
        if _base_name(func) not in _UNCOUNTED:
            if self._count in self._numbers:
                self.kept[self._count] = tensors_of(result)[0].clone()
            self._count += 1
        return result


@contextlib.contextmanager
def elementary_operations() -> Iterator[None]:
    """Context in which attention runs as elementary operations, without gradients.

    Torch has fused kernels for attention and for whole transformer layers. Each is one
    operation without a rule, so its dimensions would be fixed. The settings of the
    process are restored at the end.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _base_name(func: Any) -> str:
    """Return the name of an operation, the same for its in-place variant."""
    name: str = operation_schema(func).name
    return name.removeprefix("aten::").removesuffix("_")


def _is_pointwise(func: Any) -> bool:
    """Return whether each output entry depends only on input entries at its position.

    Torch tags most such operations. It does not tag all in-place variants, so the
    variant that is not in place is looked up as well.
    """
    if torch.Tag.pointwise in func.tags:
        return True
    packet = getattr(torch.ops.aten, _base_name(func), None)
    functional = getattr(packet, operation_overload(func), None)
    return functional is not None and torch.Tag.pointwise in functional.tags


def _bound(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments by the names of the operation's schema, with defaults.

    Rules look up arguments by name. Torch passes some by position, some by name, and
    leaves out those with their default value.
    """
    arguments = operation_schema(func).arguments
    names = [argument.name for argument in arguments]
    defaults = {argument.name: argument.default_value for argument in arguments}
    return {**defaults, **dict(zip(names, args, strict=False)), **(kwargs or {})}
