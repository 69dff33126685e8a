"""The rule of self-attention, whose layer uses its weights without calling layers.

``nn.MultiheadAttention`` projects its inputs by ``F.linear`` and a fused kernel, which
layer rules cannot intercept. Its most frequent call (one batch-first sequence as query,
key and value, no attention weights returned) is therefore computed here in three steps:
a projection that is tapped as a linear layer, attention, and the output layer, which
has a rule of its own.

Any other call runs unchanged, and its parameters are measured more slowly, with the
same result. What breaks it: a new argument of ``nn.MultiheadAttention`` that changes
the usual call. The comparison of the first batch with autograd would find that.
"""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_pi._torch_compat import has_joint_projection
from opacus_pi.gradients.example_gradients import ExampleGradients
from opacus_pi.gradients.layers.linear import linear_gradients
from opacus_pi.gradients.layers.registry import computes_as
from opacus_pi.gradients.taps import Call, Taps


def tap_attention(taps: Taps, model: nn.Module) -> set[nn.Parameter]:
    """Replace ``forward`` of each attention layer that computes the standard form.

    Args:
        taps: The object to which the layers report.
        model: An evaluation copy.

    Returns:
        The parameters of these layers.
    """
    layers = [module for module in model.modules() if _is_standard(module)]
    for module in layers:
        _TappedAttention(taps, module)
    return {p for module in layers for p in module.parameters(recurse=False)}


def _is_standard(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Return whether a layer is batch first, has one input projection and adds nothing.

    Other layers project keys and values by separate matrices, or append a learned key.
    """
    return (
        isinstance(module, nn.MultiheadAttention)
        and computes_as(nn.MultiheadAttention, module)
        and module.batch_first
        and has_joint_projection(module)
        and module.bias_k is None
        and not module.add_zero_attn
    )


class _TappedAttention:
    """One attention layer, its projections tapped.

    Args:
        taps: The object to which the layer reports.
        module: The layer; its ``forward`` is replaced.
    """

    def __init__(self, taps: Taps, module: nn.MultiheadAttention) -> None:
        self._taps, self._module = taps, module
        self._plain_forward = module.forward
        module.forward = self.forward  # type: ignore[method-assign]  # a copy's

    def forward(
        self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Attend from a sequence to itself, tapped, or run the plain layer.

        Torch's transformer layers make the usual call: one sequence three times, with
        ``need_weights=False``. Everything else runs as torch has written it.

        Args:
            query: The sequence, ``(b, t, d)``.
            key: The same object in the usual call.
            value: The same object in the usual call.
            *args: Further arguments, which rule out the usual call.
            **kwargs: ``need_weights``, masks and ``is_causal``.

        Returns:
            The output ``(b, t, d)``, and ``None`` in place of attention weights.
        """
        usual = not args and kwargs.get("need_weights") is False
        masks = [kwargs.get(name) for name in ("attn_mask", "key_padding_mask")]
        if kwargs.get("is_causal") and masks[0] is None:
            usual = False  # the plain layer raises an error
        alone = query is key and key is value and self._taps.wants(query)
        if not (usual and alone and query.dim() == 3):
            return self._plain_forward(query, key, value, *args, **kwargs)
        return self._attend(query, *masks), None

    def _attend(self, x: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """Return the self-attention of a sequence.

        The output layer ``out_proj`` is a linear layer, and is called as a module: it
        is tapped by its own rule. Between the two projections there are no parameters.

        Args:
            x: The sequence, ``(b, t, d)``.
            mask: ``attn_mask``, ``(t, t)`` or ``(b * heads, t, t)``.
            padding: ``key_padding_mask``, ``(b, t)``.
        """
        b, t, d = x.shape
        heads = self._project(x).view(b, t, 3, self._module.num_heads, -1)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        bias = _bias(mask, padding, queries)
        heads = F.scaled_dot_product_attention(queries, keys, values, bias)
        output: Tensor = self._module.out_proj(heads.transpose(1, 2).reshape(b, t, d))
        return output

    def _project(self, x: Tensor) -> Tensor:
        """Return queries, keys and values ``(b, t, 3 d)``, from the frozen weights.

        ``in_proj_weight`` stacks the three projections, so together they are one linear
        layer, whose rule gives the gradients of all three at once.
        """
        weight, bias = self._module.in_proj_weight, self._module.in_proj_bias
        projected = F.linear(
            x, weight.detach(), None if bias is None else bias.detach()
        )
        named = {"weight": weight, "bias": bias}
        live = {name: p for name, p in named.items() if self._taps.is_live(p)}
        if not live:
            return projected

        def gradients(call: Call, grad: Tensor) -> dict[str, ExampleGradients] | None:
            (x,), _ = call
            return linear_gradients(self._module, x, grad, live)

        return self._taps.tap(projected, ((x,), {}), live, gradients)


def _bias(
    mask: Tensor | None, padding: Tensor | None, queries: Tensor
) -> Tensor | None:
    """Return the term added to the scores ``(b, heads, t, t)``, −∞ where masked.

    Args:
        mask: As for ``_attend``; a boolean mask is true where attention is forbidden, a
            floating one is added as it is.
        padding: As for ``_attend``, with the same two kinds.
        queries: ``(b, heads, t, d / heads)``, for sizes and type.

    Returns:
        The sum of both; ``None`` without any.
    """
    b, num_heads, t, _ = queries.shape
    parts = []
    if mask is not None:
        parts.append(mask if mask.dim() == 2 else mask.view(b, num_heads, t, t))
    if padding is not None:
        parts.append(padding[:, None, None, :])
    if not parts:
        return None
    added = [
        torch.zeros_like(part, dtype=queries.dtype).masked_fill(part, -torch.inf)
        if part.dtype is torch.bool
        else part.to(queries.dtype)
        for part in parts
    ]
    return sum(added[1:], added[0])
