"""Models that return several tensors, of which one follows from another."""

import pytest
import torch
from torch import nn

from opacus_pi.gradients.clipping import TrainingTaps
from tests.integration.fast.training import SLOW

NUM, WIDTH = 4, 3


class Forked(nn.Module):
    """Logits, and the features that they follow from; a weight outside of layers."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        features = torch.tanh(torch.einsum("bi,ij->bj", x, self.weight))
        return {"logits": self.head(features), "more": (features, len(x))}


def of_logits(outputs):
    return outputs["logits"].square().sum()


def of_both(outputs):
    return of_logits(outputs) + outputs["more"][0].sum()


@pytest.mark.filterwarnings(f"ignore:.*{SLOW}")
@pytest.mark.parametrize("loss", [of_logits, of_both])
def test_each_output_counts_once(loss):
    model, taps = Forked(), TrainingTaps()
    taps.attach(model)
    x = torch.randn(NUM, WIDTH, generator=torch.Generator().manual_seed(1))
    outputs = model(x)
    assert outputs["more"][1] == NUM
    loss(outputs).backward()
    found = taps.caches[0].gradients(model.parameters(), model)
    for i in range(NUM):
        plain = Forked()
        loss(plain(x[i : i + 1])).backward()
        one = torch.eye(NUM)[i]
        for p, wanted in zip(model.parameters(), plain.parameters(), strict=True):
            ours = found[p].weighted_sum(one).view(p.shape)
            torch.testing.assert_close(ours.detach(), wanted.grad)
