"""Pre-norm transformers for images and for token sequences.

Positions are an ``nn.Embedding``, and attention consists of ``nn.Linear`` layers. Every
library that supports these layers can therefore measure the whole model.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def vit(
    image_shape: tuple[int, ...],
    num_classes: int = 10,
    dim: int = 192,
    depth: int = 6,
    num_heads: int = 3,
    patch: int = 4,
) -> "Transformer":
    """Build a small vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929)."""
    channels, *sides = image_shape
    length = prod(side // patch for side in sides)
    words = nn.Sequential(
        nn.Conv2d(channels, dim, patch, stride=patch), nn.Flatten(2), _Swap()
    )
    return Transformer(words, length, num_classes, dim, depth, num_heads)


def text_transformer(
    vocabulary: int = 20_000,
    length: int = 128,
    num_classes: int = 4,
    dim: int = 128,
    depth: int = 2,
    num_heads: int = 4,
) -> "Transformer":
    """Build a classifier of token sequences ``(b, length)``."""
    words = nn.Embedding(vocabulary, dim)
    return Transformer(words, length, num_classes, dim, depth, num_heads)


class Transformer(nn.Module):
    """Embedding, positions, blocks, and a linear layer on the sequence's mean."""

    def __init__(
        self,
        words: nn.Module,
        length: int,
        num_classes: int,
        dim: int,
        depth: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.words = words
        self.positions = nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*(Block(dim, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images or tokens."""
        words = self.words(x)
        places = torch.arange(words.shape[1], device=x.device).repeat(len(x), 1)
        features = self.norm(self.blocks(words + self.positions(places)))
        return self.head(features.mean(1))


class Block(nn.Module):
    """Attention and a two-layer network, each with a LayerNorm and a shortcut."""

    def __init__(self, dim: int, num_heads: int, is_causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads, is_causal)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return features ``(b, t, dim)``."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class Attention(nn.Module):
    """Multi-head self-attention from linear layers."""

    def __init__(self, dim: int, num_heads: int, is_causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.is_causal = num_heads, is_causal
        self.inputs = nn.Linear(dim, 3 * dim)
        self.outputs = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return features ``(b, t, dim)``."""
        b, t, dim = x.shape
        split = self.inputs(x).view(b, t, 3, self.num_heads, dim // self.num_heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=self.is_causal
        )
        return self.outputs(seen.transpose(1, 2).reshape(b, t, dim))


class _Swap(nn.Module):
    """Transposes ``(b, dim, t)`` to ``(b, t, dim)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT
