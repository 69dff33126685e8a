"""Every private name of torch that this package uses, each in one place.

Torch may rename or drop a private name in any release. The rest of the package
therefore imports from here, so that only this file has to change for a new version of
torch. Every name below was seen, and had the same meaning, in torch 2.6 (the oldest
that ``setup.py`` allows) and in torch 2.14.

Some private *methods* of torch are overridden in subclasses, which an import cannot
show; ``tests/test_torch_compat.py`` checks that torch still calls them.

=======================  =================================  ==========================
class of torch           overridden                         in
=======================  =================================  ==========================
``DataLoader``           ``_index_sampler``,                ``attribution.observer``
                         ``_get_iterator``
iterator of a            ``_reset``, ``_get_data``          ``attribution.observer``
``DataLoader``
=======================  =================================  ==========================
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, UntypedStorage, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.modules.dropout import _DropoutNd as DropoutBase
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNormBase
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
)
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter as LoaderIterator

__all__ = [
    "BACKWARD_HOOK_FUNCTION",
    "BACKWARD_HOOK_TABLES",
    "COMPILED_CALL",
    "CONVOLUTION_METHOD",
    "FORWARD_HOOK_TABLES",
    "BatchNormBase",
    "DropoutBase",
    "InstanceNormBase",
    "LoaderIterator",
    "StorageWeakRef",
    "TorchDispatchMode",
    "at_end_of_backward",
    "backward_hooks",
    "both_sides_padding",
    "compiled_module",
    "count_of_writes",
    "counts_of_writes",
    "current_backward_pass",
    "forward_hooks",
    "forward_pre_hooks",
    "gradient_hooks",
    "has_backward_hooks",
    "has_joint_projection",
    "has_saved_tensor_hooks",
    "has_workers",
    "index_sampler",
    "is_functorch_wrapped_tensor",
    "is_traceable_wrapper_subclass",
    "load_hooks",
    "makes_own_iterators",
    "never_compile",
    "next_index",
    "num_writes",
    "operation_overload",
    "operation_schema",
    "operations_seen_by_no_mode",
    "own_buffers",
    "own_parameters",
    "pytree",
    "received_position",
    "remove_hooks",
    "replace_own_parameters_",
    "result_is_saved",
    "run_backward_in_modes",
    "running_node",
    "sequence_number",
    "starts_of_backward",
    "step_hook_tables",
    "step_hooks",
    "storage_address",
    "viewed_tensor",
    "with_gradient_hooks",
]

# Autograd function through which torch passes inputs and outputs of a module that has
# full backward hooks. Its outputs are views that must not be changed in place; torch's
# error about that contains this name.
BACKWARD_HOOK_FUNCTION = "BackwardHookFunction"
# Attributes of a module that hold its hooks, each a dict from a number to the hook.
FORWARD_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks")
BACKWARD_HOOK_TABLES = ("_backward_pre_hooks", "_backward_hooks")
_NEVER_COMPILED: set[str] = set()
# Attribute in which ``module.compile()`` keeps the compiled call.
COMPILED_CALL = "_compiled_call_impl"
# Method of convolutions that does what ``forward`` does; subclasses override it, too.
CONVOLUTION_METHOD = "_conv_forward"


def step_hooks(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the hooks on the steps of an optimizer, those before and those after."""
    tables = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    return [h for t in tables for h in getattr(optimizer, t, {}).values()]


def forward_hooks(module: nn.Module) -> dict[int, Any]:
    """Return the live table of forward hooks (``_forward_hooks``)."""
    return module._forward_hooks


def forward_pre_hooks(module: nn.Module) -> dict[int, Any]:
    """Return the live table of forward pre-hooks (``_forward_pre_hooks``)."""
    return module._forward_pre_hooks


def backward_hooks(module: nn.Module) -> dict[int, Any]:
    """Return a module's backward hooks: the dict itself, from a number to the hook."""
    return module._backward_hooks


def load_hooks(module: nn.Module) -> dict[int, Any]:
    """Return the live table of hooks that are called after a state dict is loaded.

    Source: ``_load_state_dict_post_hooks``.
    """
    return module._load_state_dict_post_hooks


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the live table of a module's own buffers (``_buffers``)."""
    return module._buffers


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the live table of a module's own parameters (``_parameters``).

    Unlike ``named_parameters`` it is not computed anew, lists a parameter under every
    name that it has, and lists absent ones (``bias=False``) as None.
    """
    return module._parameters


def replace_own_parameters_(
    module: nn.Module, table: Mapping[str, Tensor | None]
) -> None:
    """Replace the table of a module's own parameters (``_parameters``).

    This is what ``torch.func.functional_call`` does, without its cost for each call.

    Args:
        module: The module, changed in place.
        table: By name; plain tensors may stand in for parameters.
    """
    module.__dict__["_parameters"] = table


def compiled_module(model: nn.Module) -> nn.Module | None:
    """Return the module inside the wrapper that ``torch.compile`` returns.

    Returns:
        What the wrapper keeps as its submodule ``_orig_mod``; ``None`` for a model
        that is no such wrapper.
    """
    return model._modules.get("_orig_mod")


def num_writes(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place (``_version``).

    Views share the count with their base. Writes through ``.data`` and through NumPy
    are not counted, nor is any write to a tensor made under ``torch.inference_mode``:
    its count is always 0.
    """
    return 0 if tensor.is_inference() else tensor._version


# ``num_writes`` without a call; raises for tensors of ``torch.inference_mode``.
count_of_writes = attrgetter("_version")


def counts_of_writes(tensors: Sequence[Tensor]) -> list[int]:
    """Return ``num_writes`` of each tensor.

    Args:
        tensors: Any tensors. Torch may raise for those of ``torch.inference_mode``.
    """
    try:
        return list(map(count_of_writes, tensors))
    except RuntimeError:
        return [num_writes(tensor) for tensor in tensors]


def current_backward_pass() -> int:
    """Return the number of the backward pass that runs in this thread, -1 if none does.

    Source: ``torch._C._current_graph_task_id``.
    """
    return torch._C._current_graph_task_id()


def running_node() -> Node | None:
    """Return the node of autograd's graph that runs in this thread, None if none does.

    Within a hook of a tensor it is the node that made the tensor. Source:
    ``torch._C._current_autograd_node``.
    """
    return torch._C._current_autograd_node()


def never_compile(package: str) -> None:
    """Have ``torch.compile`` run the functions of a package as they are.

    What it compiles calls the forward hooks of a module, too. A hook may do what the
    compiler cannot trace: it takes a weak reference to a module for a call of the
    module. Making any optimizer of torch has imported the compiler already. Source:
    ``torch._dynamo.trace_rules.add``.

    Args:
        package: Its name.
    """
    if package not in _NEVER_COMPILED:
        from torch._dynamo import trace_rules

        trace_rules.add(package)
        _NEVER_COMPILED.add(package)


def starts_of_backward() -> list[Node]:
    """Return the nodes of autograd's graph at which the pass that runs now began.

    Autograd itself keeps no reference from a tensor to what was computed from it. But
    the function that entered the pass is still running, in this thread or, for an
    accelerator, in the one that waits for it. Source: the local variable ``t_outputs``
    of ``torch.autograd.graph._engine_run_backward``.

    Returns:
        Those of all passes that run now in this thread, or, if there are none, in any
        thread. A pass that was begun in another way has none here, so whoever needs the
        graph of one pass must look whether ``running_node`` is in the graph of these
        nodes.
    """
    found = _starts_in(sys._getframe())
    if not found:
        for present in map(_starts_in, sys._current_frames().values()):
            found += present
    return found


def _starts_in(present: FrameType | None) -> list[Node]:
    """Return the nodes at which the backward passes began that run in a thread.

    Args:
        present: The innermost frame of the thread.
    """
    code = torch.autograd.graph._engine_run_backward.__code__
    found: list[Node | None] = []
    while present is not None:
        if present.f_code is code:
            outputs = present.f_locals["t_outputs"]
            found += [t.grad_fn if isinstance(t, Tensor) else t.node for t in outputs]
        present = present.f_back
    # No variable refers to a frame here: that of the caller is among them, and such a
    # cycle would keep the variables of all callers, the loop's batch included.
    return [node for node in found if node is not None]


def step_hook_tables(optimizer: torch.optim.Optimizer) -> tuple[dict[int, Any], ...]:
    """Return the tables of hooks before the step of an optimizer, and of those after.

    Returns:
        Four live tables: of all optimizers and of this one before the step, in the
        order in which torch calls them, then of this one and of all after the step.
    """
    module = sys.modules[torch.optim.Optimizer.__module__]
    return (
        module._global_optimizer_pre_hooks,
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        module._global_optimizer_post_hooks,
    )


def operations_seen_by_no_mode() -> AbstractContextManager[None]:
    """Return a context in which no ``TorchFunctionMode`` sees the operations of torch.

    Source: ``torch._C.DisableTorchFunction``.
    """
    return torch._C.DisableTorchFunction()


def remove_hooks(table: dict[int, Any], kind: type) -> None:
    """Remove the hooks of one kind from one of a module's tables.

    A module that is prepared again, or is a copy of a prepared one, still has those of
    the run before.

    Args:
        table: As ``forward_hooks`` and its like return it.
        kind: The class of the hooks, or of the objects whose methods they are.
    """
    for key, hook in list(table.items()):
        if isinstance(getattr(hook, "__self__", hook), kind):
            del table[key]


def has_saved_tensor_hooks() -> bool:
    """Return whether tensors saved for the backward pass are handed to a hook now.

    ``torch.utils.checkpoint`` with ``use_reentrant=False`` does this in its first run.
    Source: ``torch._C._autograd._top_saved_tensors_default_hooks``, which torch 2.6
    lacks; there, hooks cannot be disabled while there are any, which takes longer.
    """
    newest_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if newest_hooks is not None:
        return newest_hooks(True) is not None
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("not used here"):
            return False
    except RuntimeError:
        return True


def run_backward_in_modes(outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Run ``torch.autograd.backward`` so that modes see what runs within it.

    ``torch.autograd.backward`` is itself an operation that a ``TorchFunctionMode``
    intercepts, and a mode is not active while it handles an operation. Source:
    ``torch.autograd.Variable._execution_engine.run_backward``, which it calls.

    Args:
        outputs: The tensors to differentiate.
        grads: The gradient at each of them.
    """
    torch.autograd.Variable._execution_engine.run_backward(
        tuple(outputs),
        tuple(grads),
        False,  # keep the graph
        False,  # make a graph of the gradients
        (),  # of all leaves
        allow_unreachable=True,
        accumulate_grad=True,
    )


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs in this thread has ended.

    Source: ``torch.autograd.Variable._execution_engine.queue_callback``, which torch's
    distributed wrappers use.
    """
    torch.autograd.Variable._execution_engine.queue_callback(function)


def sequence_number(node: Node) -> int:
    """Return the number of a node of autograd's graph, in the order of a thread.

    Source: ``Node._sequence_nr``. Nodes that accumulate gradients have the largest one.
    """
    return cast(int, cast(Any, node)._sequence_nr())


def gradient_hooks(tensor: Tensor) -> list[Any]:
    """Return the hooks that run when a tensor's gradient is computed or accumulated.

    Only those that were registered in Python: ``Tensor.register_hook`` and
    ``Tensor.register_post_accumulate_grad_hook``.
    """
    tables = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    return [hook for table in tables if table for hook in table.values()]


def result_is_saved(tensor: Tensor) -> bool:
    """Return whether autograd has kept a tensor itself for its backward pass.

    Such a tensor must not be changed in place. The results of ``tanh``, ``sigmoid`` and
    some other operations are kept (``grad_fn._saved_result``).
    """
    return hasattr(tensor.grad_fn, "_saved_result")


def viewed_tensor(tensor: Tensor) -> Tensor | None:
    """Return the tensor that another one shows in a different shape.

    A linear layer multiplies matrices and returns the product as a view of more
    dimensions.

    Returns:
        A tensor with the same entries in the same order; ``None`` if this one is not a
        view, shows only a part, or autograd has more than the view between both.
    """
    base, function = tensor._base, tensor.grad_fn
    if base is None or base.dtype != tensor.dtype or base.numel() != tensor.numel():
        return None
    if function is not None and not (
        function.name() == "ViewBackward0"
        and function.next_functions == ((base.grad_fn, 0),)
    ):
        return None
    return base if base.is_contiguous() and tensor.is_contiguous() else None


def with_gradient_hooks(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters for which ``gradient_hooks`` is not empty."""
    return [p for p in parameters if p._backward_hooks or p._post_accumulate_grad_hooks]


def has_backward_hooks(tensor: Tensor) -> bool:
    """Return whether a tensor came out of a module with full backward hooks.

    Also true for the inputs of such a module, as its ``forward`` sees them.
    """
    return BACKWARD_HOOK_FUNCTION in type(tensor.grad_fn).__name__


def both_sides_padding(convolution: nn.Module) -> list[int]:
    """Return a convolution's padding in the order that ``F.pad`` expects.

    Source: ``_reversed_padding_repeated_twice``, which is what the layer itself passes
    to ``F.pad`` for ``padding_mode`` other than zeros.
    """
    return cast(list[int], convolution._reversed_padding_repeated_twice)


def has_joint_projection(attention: nn.MultiheadAttention) -> bool:
    """Return whether query, key and value sizes are equal (``_qkv_same_embed_dim``)."""
    return cast(bool, attention._qkv_same_embed_dim)


def storage_address(storage: UntypedStorage) -> int:
    """Return the address of torch's C++ object for a storage (``_cdata``).

    It is unique while the storage, or a ``StorageWeakRef`` to it, exists. The address
    of the data itself is not: the allocator reuses it.
    """
    return int(storage._cdata)


def has_workers(iterator: Any) -> bool:
    """Return whether worker processes load an iterator's batches (``_num_workers``)."""
    return bool(iterator._num_workers)


def makes_own_iterators(loader_class: type[DataLoader[Any]]) -> bool:
    """Return whether a loader's class makes iterators differently from torch's loader.

    That is, whether it overrides ``_get_iterator``.
    """
    return loader_class._get_iterator is not DataLoader._get_iterator


def index_sampler(iterator: Any) -> Any:
    """Return what a loader's iterator draws its indices from (``_index_sampler``)."""
    return iterator._index_sampler


def next_index(iterator: Any) -> Any:
    """Draw the next batch of indices of a loader's iterator without loading the batch.

    Only for iterators without worker processes (``_next_index``).

    Raises:
        StopIteration: At the end of the pass.
    """
    return iterator._next_index()


def received_position(iterator: Any) -> int | None:
    """Return which batch of its sampler an iterator with workers returned last.

    Returns:
        The position in the sampler's order, from 0 (``_rcvd_idx``); ``None`` if batches
        are returned in the order in which workers finish (``_in_order`` is false).
    """
    return iterator._rcvd_idx - 1 if iterator._in_order else None


def operation_schema(operation: Any) -> Any:
    """Return the schema of a dispatched operation (``_schema``): name and arguments."""
    return operation._schema


def operation_overload(operation: Any) -> str:
    """Return the overload name of a dispatched operation (``_overloadname``)."""
    return cast(str, operation._overloadname)
