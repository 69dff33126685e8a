"""A part of the loss that does not come by the model's outputs is never dropped."""

import pytest
import torch
from torch import nn

from tests.integration.fast.models import CLASSES, series
from tests.integration.fast.training import SLOW
from tests.private_training import Training

pytestmark = pytest.mark.filterwarnings(
    f"ignore:.*{SLOW}", "ignore:.*samples are unattributed"
)


class Keeps(nn.Module):
    """Remembers its features; some of them by a weight outside of layers."""

    def __init__(self, has_bare_weight):
        torch.manual_seed(0)
        super().__init__()
        self.bare = nn.Parameter(torch.randn(12, 5)) if has_bare_weight else None
        self.first, self.head = nn.Linear(12, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        x = x.flatten(1)
        features = self.first(x)
        if self.bare is not None:
            self.part = torch.tanh(torch.einsum("bi,ij->bj", x, self.bare))
            features = features + self.part
        self.kept = torch.tanh(features)
        return self.head(self.kept)


def of_output(model, outputs):
    return outputs.square().sum()


def of_what_is_kept(model, outputs):
    return 0.1 * model.kept.square().sum()


def of_part(model, outputs):
    return 0.1 * model.part.square().sum()


def of_both(model, outputs):
    return of_output(model, outputs) + of_what_is_kept(model, outputs)


def of_much(model, outputs):
    return of_output(model, outputs) + 100 * of_what_is_kept(model, outputs)


def of_weights(model, outputs):
    return of_output(model, outputs) + 0.1 * model.head.weight.square().sum()


def stepped(
    losses, has_bare_weight=True, between=lambda model, x: None, kind=torch.float32
):
    """The training after one update, by one backward pass for each loss."""
    one = Training(
        module=Keeps(has_bare_weight),
        grad_sample_mode="fast",
        loss_reduction="sum",
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        poisson_sampling=False,
    )
    x = series(4)
    one.optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        outputs = one.model(x).float()
    between(one.model, x)
    for loss in losses:
        loss(one.net, outputs).backward(retain_graph=loss is not losses[-1])
    one.optimizer.step()
    return one, x


def clipped_sum(loss, has_bare_weight, x):
    """The same by one backward pass for each example."""
    total = 0
    for i in range(len(x)):
        model = Keeps(has_bare_weight)
        loss(model, model(x[i : i + 1])).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        total = total + gradient * (0.5 / gradient.norm()).clamp(max=1)
    return total


@pytest.mark.parametrize(
    ("loss", "has_bare_weight"),
    [(of_output, True), (of_output, False), (of_both, False)],
)
def test_what_can_be_told_apart_is_clipped(loss, has_bare_weight):
    one, x = stepped([loss], has_bare_weight)
    ours = torch.cat([p.summed_grad.flatten() for p in one.net.parameters()])
    torch.testing.assert_close(ours, clipped_sum(loss, has_bare_weight, x))


@pytest.mark.parametrize(
    ("losses", "name"),
    [
        ([of_both], "bare"),
        ([of_output, of_part], "bare"),
        ([of_what_is_kept], "bare"),
        ([of_weights], "head.weight"),
    ],
    ids=str,
)
def test_what_cannot_is_refused_by_name(losses, name):
    with pytest.raises(ValueError, match=f"autograd has of {name}: the loss") as error:
        stepped(losses)
    assert "Return from forward()" in str(error.value)


def attack(model, x):
    """A backward pass of no training, while another is to come."""
    model.eval()
    model(x.clone().requires_grad_()).square().sum().backward()
    model.train()


@pytest.mark.parametrize("has_bare_weight", [False, True])
def test_passes_in_evaluation_mode_take_no_part(has_bare_weight):
    one, x = stepped([of_output], has_bare_weight, attack)
    ours = torch.cat([p.summed_grad.flatten() for p in one.net.parameters()])
    torch.testing.assert_close(ours, clipped_sum(of_output, has_bare_weight, x))


def test_rounding_of_half_precision_is_no_other_way():
    one, x = stepped([of_output], kind=torch.bfloat16)
    ours = torch.cat([p.summed_grad.flatten() for p in one.net.parameters()])
    wanted = clipped_sum(of_output, True, x)
    assert (ours - wanted).norm() < 0.02 * wanted.norm()
    with pytest.raises(ValueError, match="autograd has of bare"):
        stepped([of_much], kind=torch.bfloat16)
