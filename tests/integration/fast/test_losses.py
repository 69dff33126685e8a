"""A part of the loss that does not depend on the model's outputs is never dropped."""

import re

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
    """Keeps its features as attributes; some come from a weight outside of layers."""

    def __init__(self, has_weight_outside):
        torch.manual_seed(0)
        super().__init__()
        self.outside = nn.Parameter(torch.randn(12, 5)) if has_weight_outside else None
        self.first, self.head = nn.Linear(12, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        x = x.flatten(1)
        features = self.first(x)
        if self.outside is not None:
            self.part = torch.tanh(torch.tensordot(x, self.outside, 1))
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
    losses, has_weight_outside=True, between=lambda model, x: None, kind=torch.float32
):
    """The training after one update, by one backward pass for each loss."""
    one = Training(
        module=Keeps(has_weight_outside),
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


def clipped_sum(loss, has_weight_outside, x):
    """The same sum, from one backward pass for each example."""
    total = 0
    for i in range(len(x)):
        model = Keeps(has_weight_outside)
        loss(model, model(x[i : i + 1])).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        total = total + gradient * (0.5 / gradient.norm()).clamp(max=1)
    return total


@pytest.mark.parametrize(
    ("loss", "has_weight_outside"),
    [(of_output, True), (of_output, False), (of_both, False)],
)
def test_losses_of_the_outputs_are_clipped_per_example(loss, has_weight_outside):
    one, x = stepped([loss], has_weight_outside)
    ours = torch.cat([p.summed_grad.flatten() for p in one.net.parameters()])
    torch.testing.assert_close(ours, clipped_sum(loss, has_weight_outside, x))


@pytest.mark.parametrize(
    ("losses", "name"),
    [
        ([of_both], "outside"),
        ([of_output, of_part], "outside"),
        ([of_what_is_kept], "outside"),
        ([of_weights], "head.weight"),
    ],
    ids=["both", "output and part", "what is kept", "weights"],
)
def test_other_losses_raise_with_the_parameters_name(losses, name):
    said = f"autograd computed for {name}. Either the loss depends"
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        stepped(losses)
    assert "Return from forward()" in str(error.value)


def attack(model, x):
    """A backward pass in evaluation mode, before the one that trains."""
    model.eval()
    model(x.clone().requires_grad_()).square().sum().backward()
    model.train()


@pytest.mark.parametrize("has_weight_outside", [False, True])
def test_passes_in_evaluation_mode_take_no_part(has_weight_outside):
    one, x = stepped([of_output], has_weight_outside, attack)
    ours = torch.cat([p.summed_grad.flatten() for p in one.net.parameters()])
    torch.testing.assert_close(ours, clipped_sum(of_output, has_weight_outside, x))


def test_rounding_of_half_precision_is_not_an_error():
    one, x = stepped([of_output], kind=torch.bfloat16)
    ours = torch.cat([p.summed_grad.flatten() for p in one.net.parameters()])
    wanted = clipped_sum(of_output, True, x)
    assert (ours - wanted).norm() < 0.02 * wanted.norm()
    with pytest.raises(ValueError, match="autograd computed for outside"):
        stepped([of_much], kind=torch.bfloat16)
