"""Models with inputs: one entry for each way in which a parameter can be used."""

import torch
from torch import nn

from tests.gradients.models import (
    NUM_CLASSES,
    Attends,
    FoldedTokens,
    Keywords,
    Lambda,
    OutsideLayers,
    Positions,
    Recurrent,
    Reused,
    RowOfPositions,
    Tied,
    Transformer,
    ValuesOutsideLayers,
    convolutions,
    frozen,
    masked_attention,
    masked_per_head,
    mlp,
    overridden,
    residual,
    weight_normed,
)


def tokens(b=8):
    return torch.randint(0, NUM_CLASSES, (b, 7))


def sequences(b=8):
    return torch.randn(b, 6, 8)


def images(b=8, size=9):
    return torch.randn(b, 3, size, size)


CASES = {
    "mlp": (mlp, lambda: torch.randn(8, 4, 6)),
    "frozen": (lambda: frozen(mlp()), lambda: torch.randn(8, 4, 6)),
    "linear-3d": (
        lambda: nn.Sequential(
            nn.Linear(6, 16),
            nn.ReLU(inplace=True),
            nn.Linear(16, 9),
            nn.Tanh(),
            Lambda(lambda x: x.mean(1)),
            nn.Linear(9, NUM_CLASSES),
        ),
        lambda: torch.randn(8, 12, 6),
    ),
    "linear-4d": (
        lambda: nn.Sequential(
            nn.Linear(6, 6),
            nn.ReLU(inplace=True),
            nn.Linear(6, 4, bias=False),
            nn.Flatten(),
            nn.Linear(24, NUM_CLASSES),
        ),
        lambda: torch.randn(8, 3, 2, 6),
    ),
    "conv-mixed": (
        lambda: convolutions(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
            nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=2),
            nn.Conv2d(6, 12, 1),
            nn.Conv2d(12, 6, 1, stride=2, bias=False),
            channels=6,
        ),
        images,
    ),
    "conv-depthwise": (
        lambda: convolutions(
            nn.Conv2d(3, 6, 5, padding=2, groups=3),
            nn.Conv2d(6, 6, 3, groups=6, bias=False),
            channels=6,
        ),
        images,
    ),
    "conv-wide-small": (
        lambda: convolutions(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.Conv2d(32, 40, 3, padding=1),
            nn.Conv2d(40, 32, 2, padding=1),
            nn.Conv2d(32, 24, 3, padding=2),
            nn.Conv2d(24, 32, 3, padding=0),
            channels=32,
        ),
        lambda: images(size=6),
    ),
    "conv-padding-modes": (
        lambda: convolutions(
            nn.Conv2d(3, 6, 3, padding="same"),
            nn.Conv2d(6, 6, (2, 4), padding="same", dilation=(1, 2)),
            nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(6, 6, 3, padding=2, padding_mode="circular", stride=2),
            nn.Conv2d(6, 8, 3, padding="valid"),
            channels=8,
        ),
        lambda: images(size=12),
    ),
    "conv1d": (
        lambda: convolutions(
            nn.Conv1d(3, 6, 5, stride=2, padding=2),
            nn.Conv1d(6, 24, 3, padding=1, bias=False),
            nn.Conv1d(24, 6, 3, padding=2, dilation=2, groups=2),
            channels=6,
        ),
        lambda: torch.randn(8, 3, 15),
    ),
    "conv3d": (
        lambda: convolutions(
            nn.Conv3d(2, 6, 3, padding=1), nn.Conv3d(6, 4, 2, stride=2), channels=4
        ),
        lambda: torch.randn(8, 2, 5, 5, 5),
    ),
    "conv-transpose": (
        lambda: convolutions(nn.ConvTranspose2d(3, 4, 3, stride=2), channels=4),
        lambda: images(size=4),
    ),
    "residual-group-norm": (lambda: residual(lambda: nn.GroupNorm(3, 6)), images),
    "residual-batch-norm": (lambda: residual(lambda: nn.BatchNorm2d(6)), images),
    "residual-instance-norm": (
        lambda: residual(lambda: nn.InstanceNorm2d(6, affine=True)),
        images,
    ),
    "residual-layer-norm": (lambda: residual(lambda: nn.LayerNorm([6, 5, 5])), images),
    "rms-norm": (
        lambda: nn.Sequential(
            nn.Linear(6, 8),
            nn.RMSNorm(8),
            nn.Linear(8, 8),
            nn.BatchNorm1d(4),
            nn.LayerNorm(8, bias=False),
            nn.Flatten(),
            nn.Linear(32, NUM_CLASSES),
        ),
        lambda: torch.randn(8, 4, 6),
    ),
    "transformer": (Transformer, lambda: torch.randn(8, 6, 8)),
    "transformer-sequence-first": (
        lambda: Transformer(batch_first=False),
        lambda: torch.randn(8, 6, 8),
    ),
    "sequence-first-as-long-as-the-batch": (
        lambda: Transformer(batch_first=False),
        lambda: torch.randn(6, 6, 8),
    ),
    "encoder-layer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            nn.Flatten(),
            nn.Linear(48, NUM_CLASSES),
        ),
        lambda: torch.randn(8, 6, 8),
    ),
    "attention-masked": (lambda: Attends(masked_attention), sequences),
    "attention-masked-per-head": (
        lambda: Attends(masked_per_head, bias=False),
        sequences,
    ),
    "attention-with-weights": (
        lambda: Attends(lambda attention, h: attention(h, h, h)),
        sequences,
    ),
    "attention-across": (
        lambda: Attends(lambda a, h: a(h, h + 1, h, need_weights=False)),
        sequences,
    ),
    "attention-with-bias": (
        lambda: Attends(lambda a, h: a(h, h, h, need_weights=False), add_bias_kv=True),
        sequences,
    ),
    "embedding-tied": (lambda: Tied(functional=False), tokens),
    "embedding-tied-functional": (lambda: Tied(functional=True), tokens),
    "positions": (lambda: Positions(7), tokens),
    "positions-as-many-as-the-batch": (lambda: Positions(7), lambda: tokens(7)),
    "positions-in-a-row": (lambda: RowOfPositions(7), tokens),
    "positions-squeezed": (lambda: RowOfPositions(7, squeeze=True), tokens),
    "embedding-bag": (
        lambda: nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, NUM_CLASSES)),
        tokens,
    ),
    "lstm": (Recurrent, lambda: torch.randn(8, 7, 6)),
    "reused": (Reused, lambda: torch.randn(8, 6)),
    "outside-layers": (OutsideLayers, lambda: torch.randn(8, 4, 6)),
    "outside-layers-one-example": (OutsideLayers, lambda: torch.randn(1, 4, 6)),
    "values-outside-layers": (ValuesOutsideLayers, lambda: torch.randn(8, 6)),
    "values-outside-layers-as-large-as-the-batch": (
        ValuesOutsideLayers,
        lambda: torch.randn(4, 6),
    ),
    "folded-tokens": (FoldedTokens, lambda: torch.randn(8, 4, 6)),
    "dict": (
        Keywords,
        lambda: {"a": torch.randn(8, 4), "b": torch.randn(8, 6)},
    ),
    "tuple": (Keywords, lambda: (torch.randn(8, 4), torch.randn(8, 6))),
    "weight-norm": (weight_normed, lambda: torch.randn(8, 6)),
    "forward-overridden": (overridden, lambda: torch.randn(8, 6)),
}


def make(name, seed=0):
    """The case's model, inputs and labels."""
    torch.manual_seed(seed)
    model, inputs = CASES[name]
    model, x = model(), inputs()
    first = next(iter(x.values())) if isinstance(x, dict) else x
    first = first[0] if isinstance(first, tuple) else first
    return model, x, torch.randint(0, NUM_CLASSES, (len(first),))
