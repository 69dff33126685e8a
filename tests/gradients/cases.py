"""Models with inputs: one entry for each way in which a parameter can be used."""

import types

import torch
import torch.nn.functional as F
from torch import nn

NUM_CLASSES = 5


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Residual(nn.Module):
    """``out += identity`` and an in-place ReLU after it."""

    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1, bias=False),
            norm(),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 3, padding=1, bias=False),
            norm(),
        )

    def forward(self, x):
        out = self.body(x)
        out += x
        return F.relu_(out)


def residual(norm):
    def trained_norm():
        layer = norm()
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
        return layer

    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        trained_norm(),
        nn.ReLU(inplace=True),
        Residual(trained_norm),
        Residual(trained_norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, NUM_CLASSES),
    )


class Transformer(nn.Module):
    """A raw position parameter, attention and LayerNorms, batch first or not."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 6, 8) * 0.3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.feed = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, NUM_CLASSES)
        self.batch_first = batch_first

    def forward(self, x):
        x = x + self.position
        if not self.batch_first:
            x = x.transpose(0, 1)
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = x + self.feed(self.norms[1](x))
        return self.head(x.mean(1 if self.batch_first else 0))


class Attends(nn.Module):
    """Attention called in a way of the test's choice."""

    def __init__(self, attend, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        if self.attention.out_proj.bias is not None:
            nn.init.normal_(self.attention.out_proj.bias)
        if self.attention.in_proj_bias is not None:
            nn.init.normal_(self.attention.in_proj_bias)
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)
        self.attend = attend

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.head(self.attend(self.attention, h)[0].mean(1))


def masked_attention(attention, h):
    b, t, _ = h.shape
    causal = torch.ones(t, t, dtype=torch.bool).triu(1)
    padding = torch.zeros(b, t)
    padding[:, -1] = -1.5  # a float mask is added
    options = {"attn_mask": causal, "key_padding_mask": padding, "need_weights": False}
    return attention(h, h, h, **options)


def masked_per_head(attention, h):
    b, t, _ = h.shape
    mask = torch.linspace(-1, 1, t * t).view(1, t, t).expand(2 * b, t, t).clone()
    mask[1::2] *= -1
    return attention(h, h, h, attn_mask=mask, need_weights=False)


class Tied(nn.Module):
    """The embedding's weight is the output layer's as well."""

    def __init__(self, functional):
        super().__init__()
        self.embedding = nn.Embedding(NUM_CLASSES, 7, padding_idx=0)
        self.hidden = nn.Linear(7, 7)
        self.functional = functional
        if not functional:
            self.head = nn.Linear(7, NUM_CLASSES)
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        h = torch.tanh(self.hidden(self.embedding(tokens))).mean(1)
        if self.functional:
            return F.linear(h, self.embedding.weight)
        return self.head(h)


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.first(torch.tanh(self.first(x)))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 4, batch_first=True)
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Positions(nn.Module):
    """A position embedding without a batch dimension."""

    def __init__(self, length):
        super().__init__()
        self.words, self.places = nn.Embedding(20, 6), nn.Embedding(length, 6)
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, tokens):
        h = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(torch.tanh(h).mean(1))


class RowOfPositions(Positions):
    """The positions as one row that all examples share."""

    def __init__(self, length, squeeze=False):
        super().__init__(length)
        self.squeeze = squeeze

    def forward(self, tokens):
        places = self.places(torch.arange(tokens.shape[1])[None])
        if self.squeeze:  # works for one row only
            places = places.view(tokens.shape[1], -1)
        return self.head(torch.tanh(self.words(tokens) + places).mean(1))


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 8), nn.Linear(6, 8)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, a, b):
        return self.head(torch.tanh(self.left(input=a) * self.right(b)))


class Bare(nn.Module):
    """Bare parameters in all the ways in which they meet a batch."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.second = nn.Parameter(torch.randn(1, 6))
        self.places = nn.Parameter(torch.randn(6, 6))
        self.gain = nn.Parameter(torch.randn(6))
        self.shift = nn.Parameter(torch.randn(()))
        self.row = nn.Parameter(torch.randn(6, 1))
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        b = len(x)
        tokens = self.token.expand(b, -1, -1), self.second.expand((b, 1, 6))
        h = torch.cat([*tokens, x], 1)
        h = torch.tanh(self.places + h) * self.gain
        h += self.shift
        h = self.row * self.mix(h)
        return self.head(torch.tanh(h).mean(1))


class BareElsewhere(nn.Module):
    """Bare parameters whose gradients are not the batch's rows."""

    def __init__(self):
        super().__init__()
        self.split = nn.Parameter(torch.randn(1, 2, 6))
        self.twice = nn.Parameter(torch.randn(6))
        self.left = nn.Parameter(torch.randn(4, 6))
        self.right = nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        x = x + self.split[:, 0] + self.split[0, 1]  # taken apart
        x = torch.tanh(x + self.twice) * self.twice
        y = x + (self.left + self.right).mean(0)  # no batch in the sum
        return self.head(torch.tanh(x + y))


class FoldedTokens(nn.Module):
    """Examples and tokens share the first dimension of the inner layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        h = torch.tanh(self.inner(x.reshape(-1, 6))).view(x.shape)
        return self.head(h.mean(1))


def frozen():
    model = mlp()
    model[1].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    return model


def mlp():
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(24, 16),
        nn.ReLU(),
        nn.Linear(16, 8),
        nn.Dropout(0.5),
        nn.Tanh(),
        nn.Linear(8, NUM_CLASSES),
    )


def convolutions(*layers, channels):
    return nn.Sequential(
        *[part for layer in layers for part in (layer, nn.Tanh())],
        nn.Flatten(2),
        Lambda(lambda x: x.mean(2)),
        nn.Linear(channels, NUM_CLASSES),
    )


def weight_normed():
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)),
        nn.Tanh(),
        nn.utils.weight_norm(nn.Linear(8, NUM_CLASSES)),
    )


def overridden():
    inner = nn.Linear(6, 6)
    inner.forward = types.MethodType(
        lambda self, x: F.linear(2 * x, self.weight), inner
    )
    return nn.Sequential(inner, nn.Tanh(), nn.Linear(6, NUM_CLASSES))


def tokens(b=8):
    return torch.randint(0, NUM_CLASSES, (b, 7))


def sequences(b=8):
    return torch.randn(b, 6, 8)


def images(b=8, size=9):
    return torch.randn(b, 3, size, size)


CASES = {
    "mlp": (mlp, lambda: torch.randn(8, 4, 6)),
    "frozen": (frozen, lambda: torch.randn(8, 4, 6)),
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
    "bare": (Bare, lambda: torch.randn(8, 4, 6)),
    "bare-one-example": (Bare, lambda: torch.randn(1, 4, 6)),
    "bare-elsewhere": (BareElsewhere, lambda: torch.randn(8, 6)),
    "bare-elsewhere-as-large-as-the-batch": (BareElsewhere, lambda: torch.randn(4, 6)),
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
