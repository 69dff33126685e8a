"""A model's forward pass that is repeated on a copy, with some examples changed.

The probe of the model (:mod:`~opacus_pi.custody.model_probe`) runs a batch again with
other examples, or without one of them. This file makes these calls and measures how far
outputs are apart.

*Guarantee.* Every run starts from the same random state and with a new copy of the
model, which shares nothing but the weights. Random states are restored, also those of
torch generators that are the user's own.

*What breaks it.* A state that the model keeps outside its layers, such as a generator
of NumPy's that is a global variable.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from opacus_pi._quiet import quiet
from opacus_pi._torch_compat import BatchNormBase
from opacus_pi.custody.layer_rows import LayerRows, watch_rows
from opacus_pi.models.accelerators import device_random_states, kinds_in_use
from opacus_pi.models.batches import map_tensors, tensors_of, to_float64
from opacus_pi.models.copies import same_mode_copy
from opacus_pi.models.live_modules import hidden_from_opacus
from opacus_pi.models.no_trace import random_state_untouched
from opacus_pi.models.own_generators import OwnGenerators
from opacus_pi.models.own_losses import half_replaced

__all__ = [
    "NoDropout",
    "ProbedCall",
    "ProbedRun",
    "difference",
    "distance",
    "example_dims",
    "no_trace",
    "num_examples",
    "order_of",
    "rounding_of",
]

_DROPOUT = (
    nn.functional.dropout,
    nn.functional.dropout1d,
    nn.functional.dropout2d,
    nn.functional.dropout3d,
    nn.functional.alpha_dropout,
    nn.functional.feature_alpha_dropout,
    torch.dropout,
)
_BACKWARD = (Tensor.backward, torch.autograd.backward)


@dataclass(frozen=True)
class ProbedCall:
    """One call of the model, with its arguments.

    Args:
        model: The user's module, unwrapped.
        args: Positional inputs.
        kwargs: Inputs by keyword.
        batch_dim: The dimension of the inputs along which the examples are.
        size: The number of examples.
        autocast: The type of automatic mixed precision on a device, if it is on.
        is_float64: Whether to compute in float64.
        has_dropout: Whether dropout is active.
        is_training: Whether layers keep their mode; False: all in evaluation mode.
        has_gradients: Whether autograd records the call, as in training. A model may
            compute something else if it does not.
        changed_buffers: Names of buffers that a run changed are added to it.
        keeps_order: Whether examples are replaced by neighbours that come after them,
            and the first one never is. Sorted sequences then stay sorted, and the
            longest one stays.
        replaces_states: Whether examples are replaced also in tensors of at least three
            dimensions that have them along the second one, as the states of recurrent
            layers do: ``(layers, b, hidden)``.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch_dim: int
    size: int
    autocast: tuple[str, torch.dtype] | None = None
    is_float64: bool = False
    has_dropout: bool = True
    is_training: bool = True
    has_gradients: bool = True
    changed_buffers: set[str] = field(default_factory=set)
    keeps_order: bool = False
    replaces_states: bool = False

    @property
    def inputs(self) -> list[Tensor]:
        """The input tensors with one entry per example along the batch dimension."""
        return [
            t for t in tensors_of((self.args, self.kwargs)) if self._has_examples(t)
        ]

    def _has_examples(self, tensor: Tensor) -> bool:
        dim = self.batch_dim
        return tensor.dim() > dim and tensor.shape[dim] == self.size

    def _replaced_dim(self, tensor: Tensor) -> int | None:
        """Return the dimension along which examples are replaced, or None.

        Args:
            tensor: An input.
        """
        if self._has_examples(tensor):
            return self.batch_dim
        is_state = tensor.dim() > 2 and tensor.shape[1] == self.size
        return 1 if is_state and self.replaces_states else None

    def half_replaced(self, kept: int, *, only_first: bool = False) -> "ProbedCall":
        """Return the call on a batch in which every second example is replaced.

        Args:
            kept: As for ``half_replaced``.
            only_first: Whether to replace in the first input only.
        """
        first = self.inputs[0]

        def change(tensor: Tensor) -> Tensor:
            dim = self._replaced_dim(tensor)
            if dim is None or (only_first and tensor is not first):
                return tensor
            rows = tensor.transpose(0, dim)
            changed: Tensor
            if self.keeps_order:
                others = half_replaced(rows[1:], self.size - 1, kept=kept)
                changed = torch.cat([rows[:1].detach(), others])
            else:
                order = order_of(self.size)
                changed = half_replaced(rows, self.size, kept=kept, order=order)
            return changed.transpose(0, dim).contiguous()

        args, kwargs = map_tensors(change, (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs)

    def kept_places(self, kept: int) -> Tensor:
        """Return the places of the examples that ``half_replaced`` does not replace.

        Args:
            kept: As for ``half_replaced``.
        """
        if not self.keeps_order:
            return order_of(self.size)[kept::2]
        return torch.cat([torch.tensor([0]), torch.arange(1, self.size)[kept::2]])

    def without_last(self) -> "ProbedCall":
        """Return the call on a batch without its last example."""

        def shorten(tensor: Tensor) -> Tensor:
            if not self._has_examples(tensor):
                return tensor
            kept = tensor.narrow(self.batch_dim, 0, self.size - 1)
            return kept.contiguous()

        args, kwargs = map_tensors(shorten, (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs, size=self.size - 1)

    def reversed(self) -> "ProbedCall":
        """Return the call on the examples in reverse order."""

        def turn(tensor: Tensor) -> Tensor:
            is_batch = self._has_examples(tensor)
            return tensor.flip(self.batch_dim) if is_batch else tensor

        args, kwargs = map_tensors(turn, (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs)

    def in_float64(self) -> "ProbedCall":
        """Return the call in float64, without mixed precision."""
        args, kwargs = to_float64((self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs, autocast=None, is_float64=True)

    def outputs(self) -> tuple[list[Tensor], Tensor]:
        """Run a new copy of the model; return outputs and random state afterwards."""
        found = self.run()
        return found.outputs, found.random_state

    def run(
        self,
        before: "ProbedCall | None" = None,
        watch: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
    ) -> "ProbedRun":
        """Run a new copy of the model, always from the same random state.

        Args:
            before: A call that the same copy gets before this one.
            watch: Returns for the copy the context in which it is called.
        """
        model = same_mode_copy(self.model)
        model = model.double() if self.is_float64 else model
        model = model if self.is_training else model.eval()
        with ExitStack() as stack:
            stack.enter_context(random_state_untouched())
            own = stack.enter_context(OwnGenerators())
            stack.enter_context(torch.set_grad_enabled(self.has_gradients))
            stack.enter_context(hidden_from_opacus(self.model.modules()))
            if self.autocast is not None:
                device, kind = self.autocast
                stack.enter_context(torch.autocast(device, dtype=kind))
            if not self.has_dropout:
                stack.enter_context(NoDropout())
            if before is not None:
                model(*before.args, **before.kwargs)
            layers: list[LayerRows] = []
            watch_rows(model, self.model, self.batch_dim, layers)
            first, first_of_others = _random_state(), _other_states(model)
            with watch(model):
                outputs = model(*self.args, **self.kwargs)
            state = _random_state()
            has_drawn = not torch.equal(first, state)
            has_drawn |= own.were_used or first_of_others != _other_states(model)
        found = [t.detach() for t in tensors_of(outputs) if t.is_floating_point()]
        if not self.is_float64:
            self.changed_buffers.update(_changed_buffers(self.model, model))
        return ProbedRun(found, state, has_drawn, *_kept_by(model), layers)


def _random_state() -> Tensor:
    """Return the states of torch's global generators, as one tensor of bytes."""
    return torch.cat([torch.get_rng_state(), *device_random_states()])


def _other_states(model: nn.Module) -> tuple[Any, ...]:
    """Return the states of the generators of Python and NumPy.

    Args:
        model: Generators that are attributes of its layers count, too.
    """
    held = [value for module in model.modules() for value in vars(module).values()]
    own = [state for value in held for state in _state_of(value)]
    return random.getstate(), *_comparable(np.random.get_state(legacy=True)), *own


def _state_of(value: Any) -> Iterator[Any]:
    """Yield the state of a generator of Python or NumPy, and nothing for other objects.

    Args:
        value: Any object.
    """
    if isinstance(value, random.Random):
        yield value.getstate()
    elif isinstance(value, np.random.RandomState):
        yield from _comparable(value.get_state(legacy=True))
    elif isinstance(value, np.random.Generator):
        yield repr(value.bit_generator.state)


def _comparable(state: Any) -> tuple[Any, ...]:
    """Return a state of NumPy's older generators with its keys as bytes.

    Args:
        state: ``(name, keys, position, has_gauss, cached_gaussian)``.
    """
    name, keys, *rest = state
    return name, np.asarray(keys).tobytes(), *rest


@dataclass(frozen=True)
class ProbedRun:
    """The outputs of one run of a model, and the state that it left.

    Attributes:
        outputs: The floating-point tensors among its outputs.
        random_state: The random state that the run has left.
        has_drawn: Whether it drew random numbers.
        buffers: The floating-point buffers after it, without those of batch
            normalisation, which has a check of its own.
        memory: Other floating-point tensors that are attributes of its layers.
        layers: The rows of the inputs of its layers.
    """

    outputs: list[Tensor]
    random_state: Tensor
    has_drawn: bool
    buffers: list[Tensor]
    memory: list[Tensor]
    layers: list[LayerRows]


def _changed_buffers(before: nn.Module, after: nn.Module) -> Iterator[str]:
    """Yield the names of the floating-point buffers that a run has changed.

    Args:
        before: The model.
        after: Its copy, which was run.
    """
    now = dict(after.named_buffers())
    for name, buffer in before.named_buffers():
        is_same = name in now and distance([buffer.detach()], [now[name].detach()]) == 0
        if buffer.is_floating_point() and not is_same:
            yield name


def _kept_by(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return a model's buffers, and the tensors in attributes of its layers."""
    buffers: list[Tensor] = []
    memory: list[Tensor] = []
    for module in model.modules():
        if not isinstance(module, BatchNormBase):
            buffers += module.buffers(recurse=False)
        own = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        memory += tensors_of(own)
    return (
        [tensor.detach() for tensor in buffers if tensor.is_floating_point()],
        [tensor.detach() for tensor in memory if tensor.is_floating_point()],
    )


class NoDropout(TorchFunctionMode):
    """Context in which torch's dropout functions return their input unchanged.

    Also those that a backward pass calls: gradient checkpointing runs layers again
    there. Torch turns a mode off while it handles a function, ``backward`` included, so
    the mode is turned on again for the pass itself, which begins at edges of the graph:
    torch shows a function to modes only if it is called with tensors.
    """

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the input of a dropout function; call any other one."""
        options = dict(kwargs or {})
        if function in _BACKWARD and options.get("inputs") is None:
            tensors, *positional = args
            options.pop("inputs", None)
            with self:
                if function is Tensor.backward:
                    first = options.pop("gradient", None)
                    options["grad_tensors"] = first
                else:
                    tensors = tuple(map(get_gradient_edge, tensors))
                return torch.autograd.backward(tensors, *positional, **options)
        if function in _DROPOUT:
            return args[0] if args else options["input"]
        if function is nn.functional.scaled_dot_product_attention:
            args, options = args[:4], {**options, "dropout_p": 0.0}
        return function(*args, **options)


def order_of(size: int) -> Tensor:
    """Return a random order of examples, always the same for a given number of them."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))


def example_dims(outputs: Tensor, call: ProbedCall) -> list[int]:
    """Return the dimensions of an output along which its examples may be.

    Usually it is one. If several have the right size, the examples may be along any of
    them: states of recurrent layers have theirs along the second.
    """
    return [d for d, n in enumerate(outputs.shape) if n == call.size]


def difference(one: Tensor, other: Tensor, dim: int, places: Tensor) -> float:
    """Return the largest difference at some examples, relative to the largest output.

    Args:
        one: Outputs.
        other: Outputs of the same shape.
        dim: The dimension of the examples.
        places: Which examples.
    """
    places = places.to(one.device)
    return distance([one.index_select(dim, places)], [other.index_select(dim, places)])


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the largest relative difference of two lists of tensors.

    Infinity if they have other shapes, or one is not a number where the other is.
    """
    largest = 0.0
    for a, b in zip(one, other, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if torch.equal(a, b) or a.numel() == 0:
            continue
        a, b = a.cpu().double(), b.cpu().double()  # not every device has float64
        alike = (a == b) | (a.isnan() & b.isnan())
        gap = torch.where(alike, 0.0, (a - b).abs()).nan_to_num(float("inf"))
        scale = torch.where(a.isfinite(), a.abs(), 0.0).max()
        largest = max(largest, float(gap.max() / scale.clamp(min=1e-300)))
    return largest


def rounding_of(call: ProbedCall) -> float:
    """Return the tolerance for rounding where float64 is not possible."""
    kinds = [t.dtype for t in call.model.parameters() if t.is_floating_point()]
    kinds += [call.autocast[1]] if call.autocast else []
    return 32 * max((torch.finfo(kind).eps for kind in kinds), default=1e-6)


@contextmanager
def no_trace() -> Iterator[None]:
    """Context without gradients, autocast and warnings.

    A ``ProbedCall`` turns gradients on for the pass itself.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device in kinds_in_use():
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(quiet())
        yield


def num_examples(inputs: Sequence[Tensor], batch_dim: int) -> int:
    """Return the number of examples of the first input; 0 if there is none."""
    for tensor in inputs:
        if tensor.ndim > batch_dim:
            return int(tensor.shape[batch_dim])
    return 0
