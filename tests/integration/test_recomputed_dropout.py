"""An audit measures without dropout, also in layers that gradient checkpointing
runs again in the backward pass. The oracle is the same model without checkpoints."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine
from opacus_pi.custody.probed_call import NoDropout


class Net(nn.Module):
    """Dropout as a layer, as a function and in attention, within a checkpoint."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.drop, self.reentrant = nn.Dropout(0.5), reentrant

    def part(self, x):
        h = nn.functional.dropout(self.drop(torch.tanh(self.first(x))), 0.5)
        h = h.unflatten(1, (1, 2, 3))
        attend = nn.functional.scaled_dot_product_attention
        return attend(h, h, h, dropout_p=0.5).flatten(1)

    def forward(self, x):
        if self.reentrant is None:
            return self.second(self.part(x))
        x = x.clone().requires_grad_()
        return self.second(checkpoint(self.part, x, use_reentrant=self.reentrant))


def data_set():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(24, 5, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (24,), generator=generator))


def audited(mode, reentrant):
    net, criterion, engine = Net(reentrant), nn.CrossEntropyLoss(), PrivacyEngine()
    more = {"criterion": criterion} if mode == "ghost" else {}
    engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data_set(), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        **more,
    )
    return engine.audit(criterion)


@pytest.mark.parametrize(
    ("mode", "reentrant"), [("fast", False), ("fast", True), ("hooks", True)]
)
def test_an_audit_passes(mode, reentrant):
    found, plain = audited(mode, reentrant), audited(mode, None)
    assert found.passed and found["norms"].passed, str(found)
    torch.testing.assert_close(found.expected, plain.expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_mode_that_cannot_follow_checkpoints_names_one_that_can(mode):
    row = audited(mode, False)["norms"]
    assert row.passed is False and 'grad_sample_mode="fast"' in row.sentence


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("run", [torch.autograd.backward, torch.Tensor.backward])
def test_a_backward_pass_drops_nothing(run, reentrant):
    net, (x, y) = Net(reentrant), data_set()[:]
    gradients = []
    for model in (net, Net()):
        with NoDropout():
            run(nn.functional.cross_entropy(model(x), y))
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_other_ways_to_call_backward_stay():
    weight, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    with NoDropout():
        product = weight * other
        product.backward(torch.tensor([1.0, 2.0]), retain_graph=True)
        torch.autograd.backward([product], [torch.ones(2)], retain_graph=True)
        product.sum().backward(inputs=[weight])
    assert weight.grad.tolist() == [3, 4] and other.grad.tolist() == [2, 3]
