"""Parameters of the model that the loop's loss uses, as uncertainty weights are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine
from opacus_pi.recording import AccountingError

INPUTS = torch.randn(24, 6, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(24) % 3


class TwoHeads(nn.Module):
    """A classifier, and a second head that only the loop calls."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.second = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class Weighted(TwoHeads):
    """The same with parameters that weight the loss."""

    def __init__(self, is_shared=False):
        super().__init__()
        self.second.requires_grad_(False)
        self.log_variance = nn.Parameter(torch.zeros(2))
        self.is_shared = is_shared

    def forward(self, x):
        outputs = super().forward(x)
        return outputs + self.log_variance.sum() if self.is_shared else outputs


def whole():
    """Return a model that Opacus treats as one layer, because it has a parameter."""
    model = Weighted()
    model.second.requires_grad_(True)
    return model


def weighted(model, outputs, labels):
    """Return a loss whose weights are parameters, one loss for each example."""
    return scaled(model, outputs, labels, model.second(outputs))


def scaled(model, outputs, labels, logits=None):
    """Return the same without a layer of the model, which an audit refuses."""
    logits = outputs if logits is None else logits
    own = F.cross_entropy(logits, labels, reduction="none")
    scales = (-model.log_variance).exp()
    return own * scales[0] + outputs.square().mean(1) * scales[1]


def by_second_head(model, outputs, labels):
    """Return a loss for which the loop calls a layer of the model itself."""
    return F.cross_entropy(model.second(outputs), labels, reduction="none")


def functional(model, outputs, labels):
    hidden = F.linear(model.second(outputs), model.head.weight.t())
    return F.cross_entropy(hidden, labels, reduction="none")


def train(model, loss, mode, *, clear="before", audits=False):
    engine = PrivacyEngine()
    wrapped, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        data_loader=DataLoader(TensorDataset(INPUTS, LABELS), batch_size=6),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    if audits:
        audit = engine.audit(lambda *batch: loss(model, *batch).mean())
        assert audit.passed  # it calls the criterion with parameters that are constant
    torch.manual_seed(0)
    for inputs, labels in loader:
        if clear == "before":
            optimizer.zero_grad()
        outputs = wrapped(inputs)
        if clear != "before":
            optimizer.zero_grad(set_to_none=clear == "between")
        loss(model, outputs, labels).mean().backward()
        optimizer.step()
    return engine


def doubts_on_norms(engine):
    unchecked = engine.ledger.custody.unchecked
    return [link.sentence for link in unchecked if link.name == "norm"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("clear", ["before", "between", "zeros between"])
@pytest.mark.parametrize("is_shared", [False, True])
def test_parameters_that_the_loss_uses_are_said(mode, clear, is_shared):
    engine = train(Weighted(is_shared), weighted, mode, clear=clear)
    (sentence,) = doubts_on_norms(engine)
    assert "'log_variance' is not the sum of the per-example gradients" in sentence
    assert "the use of a parameter in the loss" in sentence


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("clear", ["before", "between"])
def test_functions_with_weights_in_the_loop_are_said(clear):
    (sentence,) = doubts_on_norms(train(TwoHeads(), functional, "hooks", clear=clear))
    assert "'head.weight' is not the sum" in sentence


@pytest.mark.filterwarnings("ignore")
def test_an_audit_does_not_hide_it():
    assert doubts_on_norms(train(Weighted(), scaled, "hooks", audits=True))


def test_an_audit_refuses_a_loss_that_calls_a_layer():
    with pytest.raises(ValueError, match="^The criterion calls the model, or a layer"):
        train(Weighted(), weighted, "hooks", audits=True)


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("clear", ["before", "between", "zeros between"])
def test_the_norms_are_right_if_the_loop_calls_layers(mode, clear):
    with pytest.warns(UserWarning, match="outside of the model's forward pass"):
        engine = train(TwoHeads(), by_second_head, mode, clear=clear)
    assert not doubts_on_norms(engine)


@pytest.mark.filterwarnings("ignore")
def test_layers_of_a_model_that_is_one_layer_are_said_if_the_loop_calls_them():
    (sentence,) = doubts_on_norms(train(whole(), by_second_head, "hooks"))
    assert "'second.weight', 'second.bias' is not the sum" in sentence


@pytest.mark.filterwarnings("ignore")
def test_fast_mode_refuses_to_train_with_it():
    with pytest.raises(ValueError, match=r"for .*log_variance"):
        train(Weighted(), weighted, "fast")


@pytest.mark.filterwarnings("ignore")
def test_ghost_clipping_refuses_its_numbers():
    model, engine = Weighted(), PrivacyEngine()

    class Loss(nn.Module):
        reduction = "mean"

        def forward(self, outputs, labels):
            return weighted(model, outputs, labels)

    wrapped, optimizer, criterion, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(INPUTS, LABELS), batch_size=6),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="ghost",
        criterion=Loss(),
    )
    for inputs, labels in loader:
        optimizer.zero_grad()
        criterion(wrapped(inputs), labels).backward()
        optimizer.step()
    with pytest.raises(AccountingError, match=r"The loss uses 'log_variance' outside"):
        _ = engine.ledger
