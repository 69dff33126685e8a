"""All steps of an LSTM as one operation of autograd.

Step by step, autograd would keep every intermediate result and return the gradients of
the gates one step at a time. Here the activations of the gates are kept in one tensor,
which the backward pass overwrites with the gradients of the gates.

The guarantee: outputs and gradients are those of the same steps under autograd, up to
rounding. A second backward pass is not possible; the tap at the gates raises an error
for it. The weights get no gradient here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_slope = torch.ops.aten  # with the backward formulas of sigmoid and tanh


class LSTMSteps(torch.autograd.Function):
    """Run all steps from the inputs' share of the gates.

    ``apply(gates, h, c, weight, backwards)``, with gates ``(b, t, 4 h)`` in torch's
    order, the initial state and cell ``(b, h)``, the weight of the states, and whether
    the last step comes first, returns the outputs ``(b, t, h)``, the state before each
    step ``(b, t, h)``, and the last state and cell.
    """

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, h: Tensor, c: Tensor, weight: Tensor, backwards: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run all steps and keep the activations of their gates."""
        b, t, _ = gates.shape
        size = h.shape[1]
        activations = gates.new_empty(t, b, 4 * size)
        cells, states = gates.new_empty(t, b, size), gates.new_empty(t + 1, b, size)
        before, after, start = states[:-1], states[1:], c
        if backwards:
            before, after = after, before
        states[t if backwards else 0] = h
        for s in reversed(range(t)) if backwards else range(t):
            act = activations[s]
            torch.addmm(gates[:, s], before[s], weight.mT, out=act)
            act[:, : 2 * size].sigmoid_()
            act[:, 2 * size : 3 * size].tanh_()
            act[:, 3 * size :].sigmoid_()
            i, f, new, o = act.split(size, 1)
            torch.mul(f, c, out=cells[s])
            c = cells[s].addcmul_(i, new)
            torch.tanh(c, out=after[s]).mul_(o)
        ctx.backwards = backwards
        ctx.save_for_backward(activations, cells, start, weight)
        last = after[0 if backwards else -1] if t else h
        outputs, before = after.transpose(0, 1).contiguous(), before.transpose(0, 1)
        ctx.mark_non_differentiable(before)
        return outputs, before, last.clone(), c.clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, _: Tensor, dh: Tensor, dc: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the gates and of the initial state and cell."""
        activations, cells, start, weight = ctx.saved_tensors
        t, _, size = cells.shape
        for k in range(t):
            s = k if ctx.backwards else t - 1 - k
            earlier = s + 1 if ctx.backwards else s - 1
            c_before = cells[earlier] if 0 <= earlier < t else start
            i, f, new, o = activations[s].split(size, 1)
            squashed = torch.tanh(cells[s])
            dh = dh + grad[:, s]
            dc = dc + _slope.tanh_backward(dh * o, squashed)
            of_gates = [
                _slope.sigmoid_backward(dc * new, i),
                _slope.sigmoid_backward(dc * c_before, f),
                _slope.tanh_backward(dc * i, new),
                _slope.sigmoid_backward(dh * squashed, o),
            ]
            dc = dc * f
            torch.cat(of_gates, 1, out=activations[s])
            dh = activations[s] @ weight
        return activations.transpose(0, 1), dh, dc, None, None
