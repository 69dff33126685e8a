"""Models whose main layer is not linear, convolutional or attention.

A recurrent classifier, a recommender of bags, a U-Net and a language model, in sizes
that a forward and backward pass of a batch takes some tens of milliseconds for.
"""

import torch
from torch import Tensor, nn

from benchmarks.common.transformer import Block


class SequenceClassifier(nn.Module):
    """An LSTM and a linear layer on its last output."""

    def __init__(
        self, num_inputs: int = 64, width: int = 128, classes: int = 10
    ) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(num_inputs, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of sequences ``(b, t, num_inputs)``."""
        return self.head(self.recurrent(x)[0][:, -1])


def recommender(rows: int = 20_000, width: int = 64, classes: int = 10) -> nn.Module:
    """Build a classifier of bags of items ``(b, t)``."""
    return nn.Sequential(
        nn.EmbeddingBag(rows, width),
        nn.Linear(width, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


class UNet(nn.Module):
    """Two halvings and doublings of an image, with shortcuts (arXiv 1505.04597)."""

    def __init__(self, channels: int = 3, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.first = _twice(channels, width)
        self.second = _twice(width, 2 * width)
        self.third = _twice(2 * width, 4 * width)
        self.up_second = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join_second = _twice(4 * width, 2 * width)
        self.up_first = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join_first = _twice(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)
        self.halve = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for each pixel, ``(b, classes, height, width)``."""
        first = self.first(x)
        second = self.second(self.halve(first))
        third = self.third(self.halve(second))
        second = self.join_second(torch.cat([self.up_second(third), second], 1))
        first = self.join_first(torch.cat([self.up_first(second), first], 1))
        return self.head(first)


def _twice(channels: int, width: int) -> nn.Sequential:
    """Build two 3×3 convolutions with GroupNorm."""
    layers: list[nn.Module] = []
    for fan_in in (channels, width):
        layers.append(nn.Conv2d(fan_in, width, 3, padding=1))
        layers += [nn.GroupNorm(4, width), nn.ReLU()]
    return nn.Sequential(*layers)


class LanguageModel(nn.Module):
    """A small GPT; the output layer may share its weight with the embedding."""

    def __init__(
        self,
        *,
        is_tied: bool,
        vocabulary: int = 4096,
        length: int = 256,
        dim: int = 128,
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, dim)
        self.positions = nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*(Block(dim, 4, True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        if is_tied:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the next tokens' logits, ``(b, vocabulary, t)``."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        places = places.repeat(len(tokens), 1)
        features = self.blocks(self.words(tokens) + self.positions(places))
        return self.head(self.norm(features)).mT
