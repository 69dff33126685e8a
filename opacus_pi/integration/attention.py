"""Attention that Opacus can train, and that computes what torch's attention computes.

Opacus replaces ``nn.MultiheadAttention`` by its ``DPMultiheadAttention``, which has the
same weights in layers that Opacus has rules for. Its ``forward`` (1.6.0) computes
something else with ``batch_first=True``, where it mixes examples with heads, and it
refuses masks there, masks of numbers for padding, and ``is_causal``. ``Attention`` is
that class with a ``forward`` that agrees with torch's for all arguments.
"""

from typing import cast

import torch
from opacus.layers import DPMultiheadAttention
from torch import Tensor, nn

__all__ = ["Attention"]


class Attention(DPMultiheadAttention):
    """``nn.MultiheadAttention``, built from layers that Opacus has rules for."""

    @classmethod
    def replacing(cls, original: nn.MultiheadAttention) -> "Attention":
        """Return an ``Attention`` with the weights of a ``nn.MultiheadAttention``.

        Args:
            original: The layer of torch; not changed.
        """
        made = cls(
            original.embed_dim,
            original.num_heads,
            dropout=original.dropout,
            bias=original.in_proj_bias is not None,
            add_bias_kv=original.bias_k is not None,
            add_zero_attn=original.add_zero_attn,
            kdim=original.kdim,
            vdim=original.vdim,
            batch_first=original.batch_first,
        )
        made.to(original.out_proj.weight)
        made.load_state_dict(original.state_dict())
        if made.add_bias_kv:  # their layout is the one in which they are given
            made.seq_bias_k.batch_first = made.batch_first
            made.seq_bias_v.batch_first = made.batch_first
        for name in "qkv":
            own = original.in_proj_weight
            own = getattr(original, f"{name}_proj_weight") if own is None else own
            linear = getattr(made, f"{name}linear")
            linear.weight.requires_grad_(own.requires_grad)
            if linear.bias is not None:
                linear.bias.requires_grad_(original.in_proj_bias.requires_grad)
        for name, parameter in original.out_proj.named_parameters():
            made.out_proj.get_parameter(name).requires_grad_(parameter.requires_grad)
        made.train(original.training)
        return made

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what ``nn.MultiheadAttention`` computes, from the same arguments.

        Args:
            query: ``(b, t, e)``, or ``(t, b, e)`` with ``batch_first=False``.
            key: As ``query``, with s steps.
            value: As ``key``.
            key_padding_mask: ``(b, s)``; True, or a number to add, where a key is left
                out.
            need_weights: Whether to return the weights.
            attn_mask: ``(t, s)`` or ``(b * heads, t, s)``, as ``key_padding_mask``.
            average_attn_weights: Whether to average the weights over heads.
            is_causal: Whether ``attn_mask`` is the causal mask.

        Returns:
            The output, as ``query``; and the weights, if they are needed.

        Raises:
            ValueError: Without a batch dimension, and with ``is_causal`` but no mask.
        """
        if query.dim() != 3:
            raise ValueError(
                f"query has {query.dim()} dimensions, but per-example gradients need a "
                "batch dimension. Pass a batch of one example: query.unsqueeze(0)."
            )
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True was given without attn_mask. Pass the mask."
            )
        q = self._heads(self.qlinear(query))
        k, v = self.klinear(key), self.vlinear(value)
        num_added = 0
        if self.add_bias_kv:
            k, v, num_added = self.seq_bias_k(k), self.seq_bias_v(v), 1
        k, v = self._heads(k), self._heads(v)
        if self.add_zero_attn:
            k, v = (nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
            num_added += 1
        scores = (q * self.head_dim**-0.5) @ k.transpose(2, 3)
        if is_causal and not need_weights and key_padding_mask is None:
            # torch then leaves the mask unread, and masks added keys, too
            attn_mask = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
            num_added = 0
        if attn_mask is not None:
            shape = (-1, self.num_heads) if attn_mask.dim() == 3 else (1, 1)
            mask = _added(attn_mask, scores, num_added)
            scores = scores + mask.view(*shape, *mask.shape[-2:])
        if key_padding_mask is not None:
            mask = _added(key_padding_mask, scores, num_added)
            scores = scores + mask[:, None, None, :]
        weights = self.dropout(scores.softmax(dim=-1))
        joined = (weights @ v).transpose(1, 2).flatten(2)  # (b, t, e)
        out = self.out_proj(joined if self.batch_first else joined.transpose(0, 1))
        if not need_weights:
            return out, None
        return out, weights.mean(dim=1) if average_attn_weights else weights

    def _heads(self, x: Tensor) -> Tensor:
        """Return ``(b, heads, steps, head_dim)`` of what a projection returned."""
        x = x if self.batch_first else x.transpose(0, 1)
        heads = x.unflatten(-1, (self.num_heads, self.head_dim))
        return cast(Tensor, heads.transpose(1, 2))


def _added(mask: Tensor, scores: Tensor, num_added: int) -> Tensor:
    """Return what a mask adds to scores; keys that were added are not masked.

    Args:
        mask: Bool or uint8, True where a key is left out; or numbers to add.
        scores: Of what is added; for its type.
        num_added: How many keys were added behind those that the mask has.
    """
    if not mask.is_floating_point():
        left_out = mask.to(torch.bool)
        mask = torch.zeros_like(mask, dtype=scores.dtype)
        mask = mask.masked_fill(left_out, float("-inf"))
    return nn.functional.pad(mask.to(scores.dtype), (0, num_added))
