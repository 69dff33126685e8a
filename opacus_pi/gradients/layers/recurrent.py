r"""Recurrent layers, unrolled so that the gradient at their gates can be intercepted.

``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` run all steps in one kernel, which returns no
gradient at the gates. Here a layer is computed step by step. The projection of the
inputs to the gates, for all steps at once, is tapped: with gradients :math:`g_t` at the
gates of step t, inputs :math:`x_t` and states :math:`h_t`,

.. math:: \nabla W_{ih} = \sum_t g_t x_t^\top, \quad
   \nabla W_{hh} = \sum_t g_t h_{t-1}^\top, \quad
   \nabla b_{ih} = \nabla b_{hh} = \sum_t g_t.

In a GRU the reset gate :math:`r_t` multiplies the state's share of the candidate, so
that this part of :math:`g_t` is multiplied by :math:`r_t` for the parameters of the
state. A projection of the states (``proj_size``) is tapped at every step, as a linear
layer that is used several times.

The guarantee: outputs are those of the plain layer up to rounding, for any number of
layers, both directions, initial states and packed sequences. Calls of another form,
such as a sequence without a batch dimension, run unchanged and are measured more
slowly. So do layers that draw random numbers: dropout between layers, in training mode.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pad_packed_sequence,
)

from opacus_pi.gradients.example_gradients import ExampleGradients, ExplicitGradients
from opacus_pi.gradients.layers.linear import OuterProducts, linear_gradients
from opacus_pi.gradients.layers.lstm_steps import LSTMSteps
from opacus_pi.gradients.layers.registry import computes_as, register_layer_rule
from opacus_pi.gradients.products import at_least_float32
from opacus_pi.gradients.taps import Call, Taps

_GATED = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
State = tuple[Tensor, ...]  # (h,), or (h, c) of an LSTM


def tap_recurrent(taps: Taps, model: nn.Module) -> set[nn.Parameter]:
    """Replace ``forward`` of each recurrent layer of torch.

    Args:
        taps: The object to which the layers report.
        model: An evaluation copy.

    Returns:
        The parameters of these layers.
    """
    layers = [module for module in model.modules() if is_recurrent(module)]
    for module in layers:
        _TappedRecurrent(taps, module)
    return {p for module in layers for p in module.parameters(recurse=False)}


def is_recurrent(module: nn.Module) -> TypeGuard[nn.RNNBase]:
    """Return whether a module computes what a recurrent class of torch computes."""
    return any(computes_as(cls, module) for cls in (nn.LSTM, nn.GRU, nn.RNN))


@dataclass
class _Steps:
    """States and gates that the steps of one layer in one direction have computed.

    Attributes:
        states: The states before each step, ``(b, h)``.
        together: The states in the place of ``states``, ``(b, t, h)``, by time.
        resets: The reset gates of a GRU, ``(b, h)``.
    """

    states: list[Tensor] = field(default_factory=list)
    together: Tensor | None = None
    resets: list[Tensor] = field(default_factory=list)


# ``step(gates, state, weights, steps)``: the next state, before any projection
_Step = Callable[[Tensor, State, Mapping[str, Tensor | None], _Steps], State]


class _TappedRecurrent:
    """One recurrent layer of a copy, unrolled.

    Args:
        taps: The object to which the layer reports.
        module: The layer; its ``forward`` is replaced.
    """

    def __init__(self, taps: Taps, module: nn.RNNBase) -> None:
        self._unrolled = Unrolled(taps, module)
        self._plain_forward = module.forward
        module.forward = self.forward  # a copy's

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run the layer, unrolled if it is given a batch of sequences.

        Args:
            input: ``(b, t, d)``, ``(t, b, d)`` without ``batch_first``, or packed.
            hx: The initial state, with ``(layers * directions, b, h)``.

        Returns:
            The outputs and the state that the plain layer returns.
        """
        found = self._unrolled.run(input, hx)
        return self._plain_forward(input, hx) if found is None else found


class Unrolled:
    """Computes a recurrent layer step by step, its gates tapped.

    Args:
        taps: The object to which the layer reports.
        module: The layer.
    """

    def __init__(self, taps: Taps, module: nn.RNNBase) -> None:
        self._taps, self._module = taps, module
        self._num_directions = 2 if module.bidirectional else 1
        self._step = _STEPS[module.mode]

    def run(self, input: Any, hx: Any = None) -> tuple[Any, Any] | None:
        """Return the outputs and the state that the plain layer returns.

        Args:
            input: ``(b, t, d)``, ``(t, b, d)`` without ``batch_first``, or packed.
            hx: The initial state, with ``(layers * directions, b, h)``.

        Returns:
            ``None`` if the layer is not given a batch of sequences, no parameter of it
            is measured, or it draws random numbers.
        """
        live = any(self._taps.is_live(p) for p in self._module.parameters())
        is_random = self._module.training and self._module.dropout > 0
        x, lengths = self._padded(input) if live and not is_random else (None, None)
        if not (isinstance(x, Tensor) and x.dim() == 3 and self._taps.wants(x)):
            return None
        inside = None
        if lengths is not None:
            inside = torch.arange(x.shape[1])[:, None] < lengths
            inside = inside[..., None].to(x.device)  # (t, b, 1)
        ends: list[State] = []
        for layer in range(self._module.num_layers):
            outputs = []
            for direction in range(self._num_directions):
                start = self._start(x, hx, len(ends))
                output, end = self._run(x, start, layer, direction, inside)
                outputs.append(output)
                ends.append(end)
            x = torch.cat(outputs, 2)
        last = [torch.stack(part) for part in zip(*ends, strict=True)]
        final = tuple(last) if len(last) > 1 else last[0]
        return self._packed(x, input, lengths), final

    def _padded(self, x: Any) -> tuple[Any, Tensor | None]:
        """Return the sequences ``(b, t, d)``, and their lengths if they were packed."""
        if isinstance(x, PackedSequence):
            return pad_packed_sequence(x, batch_first=True)
        turned = isinstance(x, Tensor) and x.dim() == 3 and not self._module.batch_first
        return (x.transpose(0, 1) if turned else x), None

    def _packed(self, x: Tensor, original: Any, lengths: Tensor | None) -> Any:
        """Return outputs ``(b, t, h)`` in the form of the layer's input."""
        if lengths is None:
            return x if self._module.batch_first else x.transpose(0, 1)
        order = original.sorted_indices
        if order is not None:
            x, lengths = x[order], lengths[order.cpu()]
        data = pack_padded_sequence(x, lengths, batch_first=True).data
        return original._replace(data=data)

    def _start(self, x: Tensor, hx: Any, place: int) -> State:
        """Return the initial state of a layer in a direction.

        Args:
            x: The layer's input.
            hx: The initial states that the caller has passed, for all layers.
            place: The index of this layer and direction in ``hx``.
        """
        if hx is not None:
            parts = hx if isinstance(hx, tuple) else (hx,)
            return tuple(part[place] for part in parts)
        module = self._module
        sizes = [module.proj_size or module.hidden_size]
        sizes += [module.hidden_size] if module.mode == "LSTM" else []
        return tuple(x.new_zeros(len(x), size) for size in sizes)

    def _run(
        self,
        x: Tensor,
        state: State,
        layer: int,
        direction: int,
        inside: Tensor | None,
    ) -> tuple[Tensor, State]:
        """Run one layer in one direction.

        Args:
            x: Its input, ``(b, t, d)``.
            state: Its initial state.
            layer: Its number.
            direction: 0 from the first step to the last, 1 the other way round.
            inside: Whether a step is within a sequence, ``(t, b, 1)``.

        Returns:
            The outputs ``(b, t, h)`` and the state after the last step.
        """
        suffix = f"_l{layer}" + ("_reverse" if direction else "")
        own = {
            name.removesuffix(suffix): p
            for name, p in self._module.named_parameters(recurse=False)
            if name.endswith(suffix)
            and name.removesuffix(suffix) in (*_GATED, "weight_hr")
        }
        weights: dict[str, Tensor | None] = dict.fromkeys((*_GATED, "weight_hr"))
        weights.update({name: self._frozen(p) for name, p in own.items()})
        steps = _Steps()
        together = self._gates(x, own, weights, steps, backwards=direction == 1)
        if inside is None and self._runs_at_once(together, state, own, weights):
            stacked, steps.together, h, c = LSTMSteps.apply(
                together, *state, weights["weight_hh"], direction == 1
            )
            return stacked, (h, c)
        gates = together.unbind(1)
        outputs: list[Tensor] = []
        times = range(x.shape[1])
        for t in reversed(times) if direction else times:
            steps.states.append(state[0].detach())
            after = self._step(gates[t], state, weights, steps)
            if "weight_hr" in own:
                after = (self._project(after[0], own["weight_hr"]), *after[1:])
            if inside is not None:
                pairs = zip(after, state, strict=True)
                after = tuple(torch.where(inside[t], a, b) for a, b in pairs)
            state = after
            outputs.append(state[0])
        stacked = torch.stack(outputs[::-1] if direction else outputs, 1)
        return stacked, state

    def _runs_at_once(
        self,
        gates: Tensor,
        state: State,
        own: Mapping[str, nn.Parameter],
        weights: Mapping[str, Tensor | None],
    ) -> bool:
        """Return whether :class:`LSTMSteps` can run the steps.

        It cannot project states, differentiate by a weight that is left to autograd, or
        compute in several types, as autocast does.

        Args:
            gates: The inputs' share of the gates.
            state: The initial state.
            own: The layer's parameters, by their names without the layer.
            weights: The same, frozen.
        """
        weight = weights["weight_hh"]
        assert weight is not None
        return (
            self._module.mode == "LSTM"
            and "weight_hr" not in own
            and not weight.requires_grad
            and len({v.dtype for v in (gates, weight, *state)}) == 1
        )

    def _gates(
        self,
        x: Tensor,
        own: Mapping[str, nn.Parameter],
        weights: Mapping[str, Tensor | None],
        steps: _Steps,
        *,
        backwards: bool,
    ) -> Tensor:
        """Return the inputs' share of the gates, ``(b, t, gates)``, tapped.

        Args:
            x: The layer's input, ``(b, t, d)``.
            own: The layer's parameters, by their names without the layer.
            weights: The same, frozen.
            steps: Filled by the steps, and read when the gradient arrives.
            backwards: Whether the last step is the first.
        """
        weight, bias = weights["weight_ih"], weights["bias_ih"]
        assert weight is not None
        other = None if self._module.mode == "GRU" else weights["bias_hh"]
        if bias is not None and other is not None:
            bias = bias + other
        gates = F.linear(x, weight, bias)
        live = {n: own[n] for n in _GATED if n in own and self._taps.is_live(own[n])}
        if not live:
            return gates

        def gradients(call: Call, grad: Tensor) -> dict[str, ExampleGradients]:
            (x,), _ = call
            return _gradients(x, grad, steps, live, backwards=backwards)

        return self._taps.tap(gates, ((x,), {}), live, gradients)

    def _frozen(self, parameter: nn.Parameter) -> Tensor:
        """Return a parameter detached, unless it is left to autograd."""
        return parameter.detach() if self._taps.is_live(parameter) else parameter

    def _project(self, state: Tensor, weight: nn.Parameter) -> Tensor:
        """Return a step's state projected to ``proj_size``, tapped."""
        projected = F.linear(state, self._frozen(weight))
        if not self._taps.is_live(weight):
            return projected

        def gradients(call: Call, grad: Tensor) -> dict[str, ExampleGradients] | None:
            (state,), _ = call
            return linear_gradients(self._module, state, grad, ["weight"])

        return self._taps.tap(projected, ((state,), {}), {"weight": weight}, gradients)


def _gradients(
    x: Tensor,
    grad: Tensor,
    steps: _Steps,
    names: Mapping[str, Any],
    *,
    backwards: bool,
) -> dict[str, ExampleGradients]:
    """Return the examples' gradients of one layer in one direction.

    Args:
        x: Its input, ``(b, t, d)``.
        grad: The gradient at its gates, ``(b, t, gates)``.
        steps: The states and gates of its steps.
        names: Which of its parameters are wanted.
        backwards: Whether the last step came first.
    """

    def by_time(values: list[Tensor]) -> Tensor:
        return at_least_float32(torch.stack(values[::-1] if backwards else values, 1))

    of_state = grad
    if steps.resets:
        resets = by_time(steps.resets)
        others = grad[..., : -resets.shape[2]]
        of_state = torch.cat([others, grad[..., -resets.shape[2] :] * resets], 2)
    found: dict[str, ExampleGradients] = {}
    if "weight_ih" in names:
        found["weight_ih"] = OuterProducts(x, grad)
    if "weight_hh" in names:
        states = steps.together
        states = by_time(steps.states) if states is None else at_least_float32(states)
        found["weight_hh"] = OuterProducts(states, of_state)
    if "bias_ih" in names:
        found["bias_ih"] = ExplicitGradients(grad.sum(1))
    if "bias_hh" in names:
        found["bias_hh"] = ExplicitGradients(of_state.sum(1))
    return found


@register_layer_rule(nn.RNNCell, nn.GRUCell, whole_call=True)
def cell_gradients(
    module: Any, call: Call, grad: Tensor, names: Collection[str]
) -> dict[str, ExampleGradients] | None:
    """Gradients of one step of a cell, which is computed again up to its gates.

    Args:
        module: The cell.
        call: Its arguments: the input ``(b, d)`` and, unless it is zero, the state
            ``(b, h)``.
        grad: The gradient at its output, ``(b, h)``.
        names: Which of its parameters are wanted.

    Returns:
        By name; ``None`` for an input without a batch dimension.
    """
    x, h = _arguments(*call[0], **call[1])
    if x.dim() != 2:
        return None
    state = x.new_zeros(len(x), module.hidden_size) if h is None else h
    weights = {name: getattr(module, name) for name in _GATED}
    weights = {
        n: None if w is None else w.detach().to(x.dtype) for n, w in weights.items()
    }
    kind = getattr(module, "nonlinearity", None)
    step = _gru_step if kind is None else _STEPS[f"RNN_{kind.upper()}"]
    bias = weights["bias_ih"]
    if kind is not None and bias is not None:
        bias = bias + weights["bias_hh"]
    steps = _Steps(states=[state])
    with torch.enable_grad():
        gates = F.linear(x, weights["weight_ih"], bias).requires_grad_(True)
        (after,) = step(gates, (state,), weights, steps)
        (of_gates,) = torch.autograd.grad(after, gates, grad.to(after))
    wanted = dict.fromkeys(names)
    return _gradients(x[:, None], of_gates[:, None], steps, wanted, backwards=False)


def _arguments(input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the arguments of a call in the order of a cell's ``forward``."""
    return input, hx


def _lstm_step(
    gates: Tensor, state: State, weights: Mapping[str, Tensor | None], steps: _Steps
) -> State:
    """Return the next state and cell of an LSTM."""
    h, c = state
    weight = weights["weight_hh"]
    assert weight is not None
    size = c.shape[1]  # few operations, because each costs more than its arithmetic
    both, new, o = torch.addmm(gates, h, weight.mT).split([2 * size, size, size], 1)
    i, f = torch.sigmoid(both).chunk(2, 1)
    c = torch.addcmul(f * c, i, torch.tanh(new))
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_step(
    gates: Tensor, state: State, weights: Mapping[str, Tensor | None], steps: _Steps
) -> State:
    """Return the next state of a GRU, and note its reset gate."""
    (h,) = state
    weight, size = weights["weight_hh"], h.shape[1]
    assert weight is not None
    of_state = F.linear(h, weight, weights["bias_hh"])
    both = torch.sigmoid(gates[:, : 2 * size] + of_state[:, : 2 * size])
    reset, keep = both.chunk(2, 1)
    steps.resets.append(reset.detach())
    new = torch.tanh(gates[:, 2 * size :] + reset * of_state[:, 2 * size :])
    return (new + keep * (h - new),)


def _simple_step(activation: Callable[[Tensor], Tensor]) -> _Step:
    """Return the step of an Elman network."""

    def step(
        gates: Tensor, state: State, weights: Mapping[str, Tensor | None], steps: _Steps
    ) -> State:
        weight = weights["weight_hh"]
        assert weight is not None
        return (activation(torch.addmm(gates, state[0], weight.mT)),)

    return step


_STEPS: dict[str, _Step] = {
    "LSTM": _lstm_step,
    "GRU": _gru_step,
    "RNN_TANH": _simple_step(torch.tanh),
    "RNN_RELU": _simple_step(torch.relu),
}
