"""Small models over the items of ``hidden_ids``, and criteria.

Those in the first part treat every example by itself. Those in the second part mix the
examples of a batch, in the ways that programs do so without noticing.
"""

import torch
from opacus.layers import DPLSTM, DPMultiheadAttention
from torch import nn
from torch.nn import functional as F

from tests.custody.hidden_ids import CLASSES, ENTRIES, PADDING, VOCABULARY


# ---------------------------------------------------------- every example by itself
def perceptron():
    return nn.Sequential(nn.Linear(ENTRIES, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def linear_without_bias():
    return nn.Linear(ENTRIES, CLASSES, bias=False)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * ENTRIES, CLASSES),
    )


def normalised():
    return nn.Sequential(
        nn.Linear(ENTRIES, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, CLASSES)
    )


def with_dropout():
    """A rate that drops nothing, so that passes can be repeated; the mode matters."""
    net = perceptron()
    net.insert(2, nn.Dropout(1e-9))
    return net


def with_frozen_layer():
    net = perceptron()
    net[0].requires_grad_(False)
    return net


class Recurrent(nn.Module):
    """An LSTM over sequences ``(b, time, entries)``.

    Args:
        batch_first: Whether the LSTM takes the first dimension for the samples.
    """

    def __init__(self, *, batch_first=True):
        super().__init__()
        self.lstm = DPLSTM(6, 5, batch_first=batch_first)
        self.out = nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


class Attentive(nn.Module):
    """Self-attention over sequences ``(b, time, entries)``.

    Args:
        batch_first: Whether the layer is told that samples come first.
    """

    def __init__(self, *, batch_first=True):
        super().__init__()
        self.attention = DPMultiheadAttention(6, 2, batch_first=batch_first)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class TokenModel(nn.Module):
    """The mean of token embeddings, without the padding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 5, padding_idx=PADDING)
        self.out = nn.Linear(5, CLASSES)

    def forward(self, tokens):
        kept = (tokens != PADDING).unsqueeze(-1)
        return self.out((self.embedding(tokens) * kept).sum(1) / kept.sum(1))


class BagModel(nn.Module):
    """``nn.EmbeddingBag``, for which Opacus's per-example gradient is wrong."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCABULARY, 5, mode="sum")
        self.out = nn.Linear(5, CLASSES)

    def forward(self, tokens, offsets):
        return self.out(self.bag(tokens, offsets))


class TwoInputs(nn.Module):
    """Takes two inputs of the same shape; the second is optional."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(ENTRIES, 6), nn.Linear(ENTRIES, 6)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x, other=None):
        hidden = self.a(x) + self.b(x if other is None else other)
        return self.out(torch.tanh(hidden))


# ------------------------------------------------------- mixing the examples of a batch
class Centred(nn.Module):
    """Subtracts the batch's mean from the hidden layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(ENTRIES, 6), nn.Linear(6, CLASSES)

    def mix(self, hidden):
        return hidden - hidden.mean(0)

    def forward(self, x):
        return self.b(torch.tanh(self.mix(self.a(x))))


class FunctionalBatchNorm(Centred):
    """Normalises over the batch by hand, so that there is no layer to be found."""

    def mix(self, hidden):
        variance = hidden.var(0, correction=0)
        return (hidden - hidden.mean(0)) / (variance + 0.1).sqrt()


class SoftmaxOverBatch(Centred):
    """Takes the softmax along the wrong dimension."""

    def mix(self, hidden):
        return hidden.softmax(0)


class AttendsOverBatch(Centred):
    """Weights hidden vectors by their similarity to those of other examples."""

    def mix(self, hidden):
        return (hidden @ hidden.T / 6).softmax(1) @ hidden


class Rolled(Centred):
    """Adds the previous example's hidden vector, as a mistaken reshape does."""

    def mix(self, hidden):
        return hidden + 0.5 * hidden.roll(1, 0)


class ScaledByBatch(Centred):
    """Divides by the largest entry of the batch."""

    def mix(self, hidden):
        return hidden / hidden.abs().max()


def time_first_lstm():
    return Recurrent(batch_first=False)


def time_first_attention():
    return Attentive(batch_first=False)


# ------------------------------------------------------------------------- criteria
class SampleLosses(nn.Module):
    """One cross-entropy per example, combined as subclasses say.

    Args:
        reduction: ``"mean"``, or ``"none"`` as ghost clipping sets it.
    """

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def combine(self, losses, outputs, targets):
        return losses

    def forward(self, outputs, targets):
        losses = F.cross_entropy(outputs, targets, reduction="none")
        losses = self.combine(losses, outputs, targets)
        return losses.mean() if self.reduction == "mean" else losses


class Focal(SampleLosses):
    """Focal loss: each example is weighted by its own probability."""

    def combine(self, losses, outputs, targets):
        return (1 - (-losses).exp()) ** 2 * losses


class Contrastive(SampleLosses):
    """Every example is told apart from the others of its batch."""

    def combine(self, losses, outputs, targets):
        similar = outputs @ outputs.T
        return F.cross_entropy(similar, torch.arange(len(similar)), reduction="none")


class HardestHalf(SampleLosses):
    """The mean over the hardest half of the batch."""

    def combine(self, losses, outputs, targets):
        hardest = losses.topk(max(1, len(losses) // 2)).indices
        kept = torch.zeros_like(losses).index_fill(0, hardest, 1.0)
        return losses * kept * len(losses) / kept.sum()


class WorstGroup(SampleLosses):
    """Examples are weighted by their share of the batch's losses."""

    def combine(self, losses, outputs, targets):
        return losses * losses.detach().softmax(0) * len(losses)


class LossOfMean(SampleLosses):
    """The loss is not linear in the examples' losses."""

    def combine(self, losses, outputs, targets):
        return losses * losses.mean()


class Decorrelated(SampleLosses):
    """Adds a penalty on the covariance of the batch's outputs."""

    def combine(self, losses, outputs, targets):
        centred = outputs - outputs.mean(0)
        return losses + (centred.T @ centred).square().mean()


def class_weights():
    return torch.linspace(0.2, 5.0, CLASSES)


def weighted_cross_entropy():
    return nn.CrossEntropyLoss(weight=class_weights())


def ignoring_cross_entropy():
    """Ignores the examples with label 3, and divides by the number of the others."""
    return nn.CrossEntropyLoss(ignore_index=3)


def smoothed_cross_entropy():
    return nn.CrossEntropyLoss(label_smoothing=0.1)


def summed_cross_entropy():
    return nn.CrossEntropyLoss(reduction="sum")


def batchmean_divergence():
    return nn.KLDivLoss(reduction="batchmean")
