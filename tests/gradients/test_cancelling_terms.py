"""Parameters whose gradient is zero because its terms cancel, in "fast"."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine, Recorder

N, FRAMES = 12, 5
LABELS = torch.arange(N) % 3


class Attention(nn.Module):
    """Attention over the patches of an example, which are flattened into one batch."""

    shape = (4,)

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 6)
        self.shifted, self.head = nn.Linear(6, 1), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.encoder(x.flatten(0, 1)).tanh()
        weights = self.shifted(hidden).view(*x.shape[:2], 1).softmax(1)
        return self.head((weights * hidden.view(*x.shape[:2], -1)).sum(1))


class Normalised(nn.Module):
    """A convolution of flattened frames whose bias is removed by a normalisation."""

    shape = (2, 6, 6)

    def __init__(self, norm):
        super().__init__()
        self.shifted, self.norm = nn.Conv2d(2, 4, 3), norm
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.norm(self.shifted(x.flatten(0, 1))).relu().mean((2, 3))
        return self.head(hidden.view(*x.shape[:2], -1).mean(1))


MODELS = {
    "softmax": Attention,
    "instance norm": lambda: Normalised(nn.InstanceNorm2d(4)),
    "group norm": lambda: Normalised(nn.GroupNorm(4, 4)),
}


def train(make, scale=1.0, penalty=0.0):
    """Train in "fast"; return the recorded and the true norms."""
    torch.manual_seed(0)
    net = make()
    x = scale * torch.randn(N, FRAMES, *net.shape)
    true = []
    for i in range(N):
        loss = F.cross_entropy(net(x[i : i + 1]), LABELS[i : i + 1])
        own = torch.autograd.grad(loss, list(net.parameters()))
        true.append(torch.cat([g.flatten() for g in own]).norm())
    engine = PrivacyEngine(recorder=Recorder(every=[1]))
    model, optimizer, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, LABELS), batch_size=N),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode="fast",
    )
    for inputs, labels in loader:
        loss = F.cross_entropy(model(inputs), labels)
        (loss + penalty * net.shifted.bias.sum()).backward()
        optimizer.step()
    return torch.as_tensor(engine.ledger.grad_norms[0]).float(), torch.stack(true)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("kind", MODELS)
def test_rounding_of_terms_that_cancel_stops_no_training(kind, scale):
    found, true = train(MODELS[kind], scale)
    torch.testing.assert_close(found, true, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("penalty", [1e-4, 1.0])
@pytest.mark.parametrize("kind", MODELS)
def test_a_missing_part_of_such_a_gradient_is_still_found(kind, penalty):
    with pytest.raises(ValueError, match=r"autograd computed for shifted\.bias"):
        train(MODELS[kind], penalty=penalty)
