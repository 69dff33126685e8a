"""A probe under functional transforms, which it ignores, and under torch.compile."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from opacus_pi.attribution import Tracker, probe


def prepared():
    """A model with its probe, a batch that was delivered, and a loss of one example."""
    torch.manual_seed(0)
    model, tracker, x = nn.Linear(4, 2), Tracker(), torch.randn(3, 4)
    probe(model, tracker)
    tracker.delivered([4, 9, 7], x)

    def loss(params, rows):
        return functional_call(model, params, (rows,)).pow(2).sum()

    return model, tracker, x, loss


TRANSFORMS = {
    "vmap of grad": lambda loss: vmap(grad(loss), in_dims=(None, 0)),
    "grad": grad,
    "vmap": lambda loss: vmap(loss, in_dims=(None, 0)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_functional_passes_are_ignored_and_harmless(name):
    model, tracker, x, loss = prepared()
    params = {n: p.detach() for n, p in model.named_parameters()}
    TRANSFORMS[name](loss)(params, x)
    assert tracker.take() == []
    loss(dict(model.named_parameters()), x).backward()  # an ordinary pass is seen
    assert tracker.attribute([3]).tolist() == [4, 9, 7]
    assert tracker.counts["by_storage"] == 3


def test_a_compiled_model_is_followed():
    model, tracker, x, _ = prepared()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        compiled(x).pow(2).sum().backward()
        assert tracker.attribute([3]).tolist() == [4, 9, 7]
    assert tracker.counts["by_storage"] == 6
