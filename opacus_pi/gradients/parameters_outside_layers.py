"""Tap weights that are used outside of layers with a rule.

A module may add a parameter to a batch, scale it, look rows up in it, hand it to
``F.linear`` or ``F.layer_norm``, or compute with it first (``weight[:, None, None]``,
``log_rate.exp()``). A layer that overrides ``forward`` does the same. None of this is a
call of a layer for which a rule could be registered.

A ``TorchFunctionMode`` sees every operation of torch while the model runs. It follows
the values that depend on parameters but not on the examples
(:mod:`~opacus_pi.gradients.shared_values`). Where such a value meets the batch, it does
one of three things:

* an operation with a rule (:mod:`~opacus_pi.gradients.operations`) runs with the value
  frozen, and its output is tapped;
* where a value is expanded to one copy for each example, or meets the batch entry by
  entry, the copies are tapped: the gradient that arrives there is each example's own;
* any other operation runs unchanged. Its parameters stay live and are recognised by
  their ``.grad``; :attr:`ParametersOutsideLayers.unruled` has the operation's name.

The guarantee: results are those of the plain operations, and a gradient is either
tapped or left to autograd, never lost. What breaks it is what breaks a pulled-back
gradient: a computation with parameters that draws random numbers.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from opacus_pi._torch_compat import (
    current_backward_pass,
    has_saved_tensor_hooks,
    num_writes,
    pytree,
)
from opacus_pi.gradients.example_gradients import (
    ExampleGradients,
    ExplicitGradients,
    add_up,
)
from opacus_pi.gradients.operations import Use, is_pointwise, operation_use
from opacus_pi.gradients.shared_values import SharedValue, as_gradients, through
from opacus_pi.gradients.taps import Call, Taps

_EXPANSIONS = {
    *(Tensor.expand, Tensor.expand_as, Tensor.broadcast_to, torch.broadcast_to),
    *(Tensor.repeat, Tensor.tile, torch.tile),
}
# By a tensor's id, the tensor and its version counter when it was noted
_Noted = dict[int, tuple["weakref.ref[Tensor]", int]]
_MAX_ELEMENTS = 1 << 26  # of gradients that are formed by pulling them back


class ParametersOutsideLayers(TorchFunctionMode):
    """Tap the operations above on live parameters, while the mode is entered.

    Attributes:
        unruled: The names of the operations without a rule that parameters took part
            in, by parameter.
        has_tapped: Whether anything has been tapped.

    Args:
        taps: The object to which the operations report.
        model: The model that runs; its buffers are the same for all examples.
        sees_reruns: Whether the mode is also entered for the backward pass, in which
            ``torch.utils.checkpoint`` runs parts of the model again. Otherwise such
            parts run unchanged, so that both runs save the same tensors.
    """

    def __init__(
        self, taps: Taps, model: nn.Module, *, sees_reruns: bool = False
    ) -> None:
        super().__init__()
        self.unruled: dict[nn.Parameter, set[str]] = defaultdict(set)
        self.has_tapped = False
        self._taps, self._model, self._sees_reruns = taps, model, sees_reruns
        self._values: dict[int, SharedValue] = {}  # by the tensors' ids
        # Other tensors that do not depend on the examples, and their version counters
        self._constants: _Noted = {}
        # What depends on parameters that are left to autograd, and on no example
        self._untapped: _Noted = {}
        self._used_with_constants: set[nn.Parameter] = set()
        self._buffers: set[int] | None = None
        self._has_gradients = True

    def __enter__(self) -> "ParametersOutsideLayers":
        """Begin to intercept operations."""
        self._has_gradients = torch.is_grad_enabled()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Intercept no more, and drop the values of this pass."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._values.clear()
        self._constants.clear()
        self._untapped.clear()
        self._buffers = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation, tapped if it applies a shared value to a batch.

        Args:
            func: The operation; torch calls this in place of it.
            types: Not used.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        kwargs = kwargs or {}
        if not self._sees_reruns and has_saved_tensor_hooks():
            return func(*args, **kwargs)
        tensors, known = _tensors(args, kwargs), self._values
        values = {
            id(t): value
            for t in tensors
            # asking whether a plain tensor is a parameter is slow
            if (type(t) is not Tensor or id(t) in known) and (value := self._value(t))
        }
        if not values:
            return self._without_values(func, args, kwargs, tensors)
        others = [t for t in tensors if id(t) not in values]
        result = None
        is_shared = all(map(self._is_constant, others)) and not _writes(func)
        if is_shared and (
            self._was_shared(values) or not any(map(self._is_batch, others))
        ):
            return self._derived(func, args, kwargs, values, bool(others))
        if any(map(self._is_batch, others)):
            result = self._applied(func, args, kwargs, values)
        if result is not None:
            return result
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point():
            for value in values.values():
                for parameter in value.parameters:
                    self.unruled[parameter].add(resolve_name(func) or func.__name__)
        return self._followed(result, others)

    # ------------------------------------------------------ what is known of a tensor
    def _value(self, tensor: Tensor) -> SharedValue | None:
        """Return the shared value that a tensor is, ``None`` if it is not one."""
        value = self._values.get(id(tensor))
        is_known = value is not None and value.tensor is tensor and value.is_unchanged
        if value is not None and is_known:
            # A layer freezes its parameters while it runs: they are not live then.
            return value if all(map(self._taps.is_live, value.parameters)) else None
        if not self._taps.is_live(tensor):
            return None
        value = self._values[id(tensor)] = SharedValue(tensor)
        return value

    def _may_be_shared(self, tensor: Tensor) -> bool:
        """Return False for most tensors that depend on the examples, quickly."""
        key = id(tensor)
        return (
            type(tensor) is not Tensor
            or key in self._constants
            or key in self._untapped
            or key in self._buffer_ids()
        )

    def _buffer_ids(self) -> set[int]:
        """Return the ids of the model's buffers."""
        if self._buffers is None:
            self._buffers = {id(buffer) for buffer in self._model.buffers()}
        return self._buffers

    def _is_constant(self, tensor: Tensor) -> bool:
        """Return whether a tensor depends neither on examples nor on live parameters.

        Buffers and frozen parameters do not, and neither does what is computed from
        nothing else. A tensor that was written to since is not known.
        """
        if tensor.requires_grad:
            return False
        return (
            isinstance(tensor, nn.Parameter)
            or id(tensor) in self._buffer_ids()
            or _is_noted(tensor, self._constants)
        )

    def _is_untapped(self, tensor: Tensor) -> bool:
        """Return whether a tensor depends on parameters left to autograd, and no batch.

        It may have as many rows as there are examples, but they are not the examples'.
        """
        if isinstance(tensor, nn.Parameter):
            return tensor.requires_grad
        return _is_noted(tensor, self._untapped)

    def _is_batch(self, tensor: Tensor) -> bool:
        """Return whether a tensor has a row for each example."""
        return self._taps.wants(tensor) and not self._is_untapped(tensor)

    def _was_shared(self, values: Mapping[int, SharedValue]) -> bool:
        """Return whether a value's parameter was used with constants of another length.

        Position numbers have as many rows as examples in some batches only.
        """
        parameters = {p for value in values.values() for p in value.parameters}
        return not self._used_with_constants.isdisjoint(parameters)

    def _without_values(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        others: list[Tensor],
    ) -> Any:
        """Run an operation that no live parameter takes part in."""
        result = func(*args, **kwargs)
        # Most operations depend on the examples by their first tensor already.
        if others and not self._may_be_shared(others[0]):
            return result
        if isinstance(result, Tensor) and all(map(self._is_constant, others)):
            self._constants[id(result)] = weakref.ref(result), num_writes(result)
            return result
        return self._followed(result, others)

    def _followed(self, result: Any, others: list[Tensor]) -> Any:
        """Return a result, noted if it depends on no example.

        Args:
            result: The result of an operation that ran unchanged.
            others: The tensors that took part in it and are no shared values.
        """
        if all(self._is_constant(t) or self._is_untapped(t) for t in others):
            for tensor in _tensors((result,), {}):
                self._untapped[id(tensor)] = weakref.ref(tensor), num_writes(tensor)
        return result

    # ---------------------------------------------------- from values to other values
    def _derived(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        values: dict[int, SharedValue],
        has_constants: bool,
    ) -> Any:
        """Run an operation that depends on no example, and note its results.

        Args:
            func: The operation.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            values: The shared values among them, by the tensors' ids.
            has_constants: Whether there are other tensors among them.
        """
        result = func(*args, **kwargs)
        tensors = _tensors((result,), {})
        if not tensors or id(result) in values:
            return result
        parameters = {p for value in values.values() for p in value.parameters}
        if not self._has_gradients or any(t.requires_grad for t in tensors):
            self._taps.shared_uses.update(parameters)
            if has_constants:
                self._used_with_constants.update(parameters)
        call = _replaced((args, kwargs), values)
        if isinstance(result, Tensor):
            value = self._noted(result, func, call, None)
            if value is not None and func in _EXPANSIONS:
                return self._expanded(value, args[0])
            return result
        for place, part in enumerate(result):
            if isinstance(part, Tensor):
                self._noted(part, func, call, place)
        return result

    def _noted(
        self, tensor: Tensor, func: Callable[..., Any], call: Any, place: int | None
    ) -> SharedValue | None:
        """Note a result: a shared value, or a constant if it is cut off from autograd.

        In a pass without gradients everything is cut off, and the values are followed
        all the same.
        """
        if self._has_gradients and not tensor.requires_grad:
            self._constants[id(tensor)] = weakref.ref(tensor), num_writes(tensor)
            return None
        value = self._values[id(tensor)] = SharedValue(tensor, func, call, place)
        return value

    # ----------------------------------------------------- from values to the examples
    def _expanded(self, value: SharedValue, before: Tensor) -> Tensor:
        """Return a value expanded to one copy for each example, tapped.

        Class tokens are used this way: ``token.expand(b, -1, -1)`` is concatenated with
        the sequence. The copies are own tensors, because a tap changes its tensor in
        place.

        Args:
            value: The expanded value.
            before: What was expanded.
        """
        if self._taps.wants(value.tensor) and _is_shared(
            before.shape, value.tensor.shape
        ):
            return self._tapped_copies(value.tensor.detach().clone(), value.first_row)
        return value.tensor

    def _tapped_copies(self, copies: Tensor, value: SharedValue) -> Tensor:
        """Return copies of a value, one for each example, tapped.

        Args:
            copies: ``(b, ...)``, own memory.
            value: The value that each row has the entries of.
        """
        named = dict(_named(value))
        self.has_tapped = True

        def gradients(call: Call, grad: Tensor) -> dict[str, ExampleGradients]:
            inner = ExplicitGradients(grad.reshape(len(grad), *value.tensor.shape))
            return {name: through(value, p, inner) for name, p in named.items()}

        return self._taps.tap(copies, ((), {}), named, gradients)

    def _applied(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        values: dict[int, SharedValue],
    ) -> Any:
        """Run an operation of values and a batch, tapped.

        Returns:
            The result; ``None`` if there is no rule for it. The operation must be run
            unchanged then.
        """
        size = next(
            t.shape[0]
            for t in _tensors(args, kwargs)
            if id(t) not in values and self._is_batch(t)
        )
        if not all(_may_be_pulled_back(value, size) for value in values.values()):
            return None
        use = operation_use(func, args, kwargs)
        if use is not None:
            return self._by_rule(use, func, args, kwargs, values)
        if not is_pointwise(func) or "out" in kwargs:
            return None
        if _writes(func) and id(args[0]) in values:
            return None  # the parameter itself would be changed
        return self._entry_by_entry(func, args, kwargs, values)

    def _entry_by_entry(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        values: dict[int, SharedValue],
    ) -> Any:
        """Run a pointwise operation on a batch and tapped copies of the values."""
        batches = [t for t in _tensors(args, kwargs) if id(t) not in values]
        batch = max(batches, key=Tensor.dim)
        tensors = [value.tensor for value in values.values()]
        if not self._is_batch(batch) or not all(
            _is_shared(tensor.shape, batch.shape)
            # a tensor without axes counts less where types differ
            and (tensor.dim() > 0 or tensor.dtype == batch.dtype)
            for tensor in tensors
        ):
            return None
        is_rerun = current_backward_pass() != -1 and not has_saved_tensor_hooks()
        if is_rerun and not _writes(func):
            return self._entry_by_entry_in_rerun(func, (args, kwargs), values)
        copies = {
            key: self._tapped_copies(_copies(value.tensor, batch), value)
            for key, value in values.items()
        }
        args, kwargs = _replaced((args, kwargs), copies)
        return func(*args, **kwargs)

    def _entry_by_entry_in_rerun(
        self, func: Callable[..., Any], call: Call, values: dict[int, SharedValue]
    ) -> Tensor:
        """Run a pointwise operation with frozen values, and tap its output.

        A function with a backward pass of its own may run the operation there, and ask
        for the gradients of its inputs only: that of a copy would never be computed.

        Args:
            func: The operation.
            call: Its arguments.
            values: The shared values among them, by the tensors' ids.
        """
        leaves, structure = pytree.tree_flatten(call)
        places = [i for i, leaf in enumerate(leaves) if id(leaf) in values]
        used = {str(i): values[id(leaves[i])] for i in places}
        for i in places:
            leaves[i] = leaves[i].detach()
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        parameters = {name: p for value in used.values() for name, p in _named(value)}
        self.has_tapped = True

        def gradients(call: Call, grad: Tensor) -> dict[str, ExampleGradients]:
            again, _ = pytree.tree_flatten(call)
            with torch.enable_grad():
                for i in places:
                    again[i] = _copies(again[i], grad).requires_grad_()
                args, kwargs = pytree.tree_unflatten(again, structure)
                output = func(*args, **kwargs)
            copies = [again[i] for i in places]
            found = torch.autograd.grad(output, copies, grad.to(output.dtype))
            return _by_parameter(dict(zip(used, found, strict=True)), used)

        return self._taps.tap(
            func(*args, **kwargs), (args, kwargs), parameters, gradients
        )

    def _by_rule(
        self,
        use: Use,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        values: dict[int, SharedValue],
    ) -> Any:
        """Run an operation that has a rule with frozen values, and tap its output."""
        weights = {name: w for name, w in use.weights.items() if w is not None}
        used = {name: values[id(w)] for name, w in weights.items() if id(w) in values}
        rest = [w for name, w in weights.items() if name not in used]
        is_known = len(used) == len(values) and all(map(self._is_constant, rest))
        if not (is_known and self._is_batch(use.batch)):
            return None
        frozen = {key: value.tensor.detach() for key, value in values.items()}
        free_args, free_kwargs = _replaced((args, kwargs), frozen)
        output = func(*free_args, **free_kwargs)
        if not self._taps.wants(output):
            return None
        parameters = {name: p for value in used.values() for name, p in _named(value)}
        self.has_tapped = True

        def gradients(call: Call, grad: Tensor) -> dict[str, ExampleGradients] | None:
            ((x,), _) = call
            found = use.gradients(x, grad, list(used))
            return None if found is None else _by_parameter(found, used)

        return self._taps.tap(output, ((use.batch,), {}), parameters, gradients)


def _by_parameter(
    found: Mapping[str, Tensor | ExampleGradients], used: Mapping[str, SharedValue]
) -> dict[str, ExampleGradients]:
    """Return gradients by parameters from those by the values of one operation."""
    parts: dict[str, list[ExampleGradients]] = defaultdict(list)
    for name, inner in found.items():
        for key, parameter in _named(used[name]):
            parts[key].append(through(used[name], parameter, as_gradients(inner)))
    return {key: add_up(several) for key, several in parts.items()}


def _named(value: SharedValue) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a value under names that are the same in each value."""
    for parameter in value.parameters:
        yield str(id(parameter)), parameter


def _is_noted(tensor: Tensor, noted: _Noted) -> bool:
    """Return whether a tensor was noted, and not written to since."""
    reference, count = noted.get(id(tensor), (None, -1))
    is_same = reference is not None and reference() is tensor
    return is_same and num_writes(tensor) == count


def _tensors(args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors among arguments, and in lists and tuples of them."""
    found = [value for value in args if isinstance(value, Tensor)]
    if len(found) < len(args) or kwargs:
        for value in (*args, *kwargs.values()):
            if isinstance(value, (list, tuple)):
                found += [part for part in value if isinstance(part, Tensor)]
        found += [value for value in kwargs.values() if isinstance(value, Tensor)]
    return found


def _replaced(call: Any, replacements: Mapping[int, Any]) -> Any:
    """Return arguments with some tensors replaced, by their ids."""
    return pytree.tree_map(lambda leaf: replacements.get(id(leaf), leaf), call)


def _copies(tensor: Tensor, batch: Tensor) -> Tensor:
    """Return a copy of a value for each example, with as many axes as the batch."""
    axes = (1,) * (batch.dim() - tensor.dim()) + tuple(tensor.shape)
    return tensor.detach().reshape(axes).expand(len(batch), *axes[1:]).clone()


def _writes(func: Callable[..., Any]) -> bool:
    """Return whether an operation changes its first argument in place."""
    name = func.__name__
    is_in_place = name.endswith("_") and not name.endswith("__")
    return is_in_place or name in ("__setitem__", "__set__")


def _may_be_pulled_back(value: SharedValue, size: int) -> bool:
    """Return whether the gradients of so many examples may be formed, if need be."""
    if value.is_parameter:
        return True
    formed = [p.numel() for p in value.parameters if not value.is_cut_from(p)]
    return size * max(formed, default=0) <= _MAX_ELEMENTS


def _is_shared(shape: torch.Size, batch: torch.Size) -> bool:
    """Return whether each example of a batch uses the whole of a value, broadcast.

    This is false if the value has as many dimensions as the batch and several entries
    in the first one: then each example has an entry of its own.
    """
    pairs = zip(reversed(shape), reversed(batch), strict=False)
    return (
        len(shape) <= len(batch)
        and all(mine in (1, theirs) or theirs == 1 for mine, theirs in pairs)
        and (len(shape) < len(batch) or shape[0] == 1)
    )
