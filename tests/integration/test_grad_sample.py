import opacus
import pytest
import torch
from torch import nn

from opacus_pi.integration.grad_sample import GradSampleModule, grad_sample_norms
from tests.private_training import Net, data, one_at_a_time


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("force_functorch", [True, False])
def test_norms_of_the_last_backward_pass(reduction, force_functorch):
    torch.manual_seed(0)
    net, (x, y) = Net(), data().tensors
    truth = one_at_a_time(net, x, y)
    model = GradSampleModule(
        net, loss_reduction=reduction, force_functorch=force_functorch
    )
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    criterion(model(x), y).backward()
    norms = model.per_sample_gradient_norms
    assert norms.dtype == torch.float32 and not norms.requires_grad
    torch.testing.assert_close(norms, torch.tensor(truth), rtol=1e-5, atol=0)
    criterion(model(x[3:5]), y[3:5]).backward()  # accumulated: the last pass counts
    latest = model.per_sample_gradient_norms
    torch.testing.assert_close(latest, torch.tensor(truth[3:5]), rtol=1e-5, atol=0)


def test_unused_and_frozen_parameters_add_nothing():
    net = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)})
    net["used"].bias.requires_grad_(False)
    net.forward = lambda x: net["used"](x)
    model = GradSampleModule(net)
    model(torch.tensor([[3.0, 4.0]])).sum().backward()
    torch.testing.assert_close(model.per_sample_gradient_norms, torch.tensor([5.0]))


def test_without_a_backward_pass():
    model = GradSampleModule(nn.Linear(2, 1))
    with pytest.raises(RuntimeError, match="after loss.backward"):
        _ = model.per_sample_gradient_norms
    model(torch.ones(2, 2)).sum().backward()
    assert len(model.per_sample_gradient_norms) == 2
    model.zero_grad()
    with pytest.raises(RuntimeError, match="before zero_grad"):
        _ = model.per_sample_gradient_norms


def test_it_is_opacus_module():
    model = GradSampleModule(nn.Linear(2, 1))
    assert isinstance(model, opacus.GradSampleModule)
    assert isinstance(model.to_standard_module(), nn.Linear)


def test_half_precision_does_not_overflow():
    samples = torch.full((2, 4), 200.0, dtype=torch.float16)  # 200² > 65504
    torch.testing.assert_close(
        grad_sample_norms([samples, samples]), torch.full((2,), 200.0 * 8**0.5)
    )


def test_an_empty_batch_has_no_norms():
    assert grad_sample_norms([torch.zeros(0, 3, 2), torch.zeros(0)]).shape == (0,)
