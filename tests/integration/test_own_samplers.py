"""Per-example gradients by functions of the user's are unchecked until an audit."""

import pytest
import torch
from opacus.grad_sample import GradSampleModule, register_grad_sampler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine

criterion = nn.CrossEntropyLoss()


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        return x @ self.weight


def right(layer, activations, backprops):
    return {layer.weight: torch.einsum("ni,nj->nij", activations[0], backprops)}


def reversed_rows(layer, activations, backprops):
    rows = right(layer, activations, backprops)
    return {layer.weight: rows[layer.weight].flip(0)}


@pytest.fixture
def register():
    kinds = dict(GradSampleModule.GRAD_SAMPLERS)
    yield lambda sampler: register_grad_sampler(Product)(sampler)
    GradSampleModule.GRAD_SAMPLERS.clear()
    GradSampleModule.GRAD_SAMPLERS.update(kinds)


def trained(mode="hooks", *, is_audited=False):
    torch.manual_seed(0)
    module, engine = nn.Sequential(Product()), PrivacyEngine()
    data = TensorDataset(torch.randn(24, 5), torch.arange(24) % 3)
    model, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=6),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    if is_audited:
        engine.audit(criterion)
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return engine


def norm_link(engine):
    return next(k for k in engine.ledger.custody.links if k.name == "norm")


@pytest.mark.parametrize("sampler", [right, reversed_rows])
def test_a_registered_function_is_not_believed(register, sampler):
    register(sampler)
    link = norm_link(trained())
    assert link.state == "unchecked"
    assert "gradients of Product are computed by a function" in link.sentence


def test_an_audit_compares_its_norms(register):
    register(right)
    assert norm_link(trained(is_audited=True)).state == "checked"
    engine = trained()
    assert engine.audit(criterion).passed
    assert norm_link(engine).state == "checked"


@pytest.mark.filterwarnings("ignore:This run no longer")
def test_an_audit_refuses_wrong_rows(register):
    register(reversed_rows)
    engine = trained(is_audited=True)
    with pytest.raises(AccountingError, match="not those of each example"):
        _ = engine.ledger


@pytest.mark.parametrize("mode", ["hooks", "functorch", "fast"])
def test_layers_without_such_a_function_are_not_doubted(mode):
    assert norm_link(trained(mode)).state == "checked"
