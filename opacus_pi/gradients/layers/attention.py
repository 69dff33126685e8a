"""Tap self-attention: ``nn.MultiheadAttention`` uses its weights without layers.

Its usual call (one batch-first sequence as query, key and value; no attention weights
wanted back) is computed here as a tapped projection, attention, and the tapped output
layer. Any other call runs as it is, and its parameters are left over.
"""

from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_pi._torch_compat import forward_pre_hooks, has_joint_projection
from opacus_pi.gradients.layers.linear import linear_squares
from opacus_pi.gradients.taps import Taps


def tap_attention(taps: Taps, model: nn.Module) -> set[nn.Parameter]:
    """Replace ``forward`` of each attention layer that computes the standard form.

    Args:
        taps: Where the layers report.
        model: An evaluation copy.

    Returns:
        The parameters of these layers.
    """
    layers = [module for module in model.modules() if _is_standard(module)]
    for module in layers:
        _TappedAttention(taps, module)
    return {p for module in layers for p in module.parameters(recurse=False)}


def _is_standard(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether a layer is batch first, with one input projection and nothing added."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and "forward" not in vars(module)
        and not hasattr(module, "parametrizations")
        and not forward_pre_hooks(module)
        and module.batch_first
        and has_joint_projection(module)
        and module.bias_k is None
        and not module.add_zero_attn
    )


class _TappedAttention:
    """One attention layer, its projections tapped."""

    def __init__(self, taps: Taps, module: nn.MultiheadAttention) -> None:
        self._taps, self._module = taps, module
        self._rule = partial(linear_squares, module)
        self._plain_forward = module.forward
        module.forward = self.forward  # type: ignore[method-assign]  # a copy's

    def forward(
        self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Attend from a sequence to itself, tapped; or the plain layer."""
        usual = not args and kwargs.get("need_weights") is False
        masks = [kwargs.get(name) for name in ("attn_mask", "key_padding_mask")]
        if kwargs.get("is_causal") and masks[0] is None:
            usual = False  # an error of the plain layer
        alone = query is key and key is value and self._taps.wants(query)
        if not (usual and alone and query.dim() == 3):
            return self._plain_forward(query, key, value, *args, **kwargs)
        return self._attend(query, *masks), None

    def _attend(self, x: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """Self-attention of ``(b, t, d)``."""
        b, t, d = x.shape
        heads = self._project(x).view(b, t, 3, self._module.num_heads, -1)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        bias = _bias(mask, padding, queries)
        seen = F.scaled_dot_product_attention(queries, keys, values, bias)
        output: Tensor = self._module.out_proj(seen.transpose(1, 2).reshape(b, t, d))
        return output

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values ``(b, t, 3 d)``, from the frozen weights."""
        weight, bias = self._module.in_proj_weight, self._module.in_proj_bias
        projected = F.linear(
            x, weight.detach(), None if bias is None else bias.detach()
        )
        named = {"weight": weight, "bias": bias}
        live = {name: p for name, p in named.items() if self._taps.is_live(p)}
        return self._taps.tap(projected, x, live, self._rule) if live else projected


def _bias(
    mask: Tensor | None, padding: Tensor | None, queries: Tensor
) -> Tensor | None:
    """What is added to the scores ``(b, heads, t, t)``: −∞ where masks are true."""
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
