"""Per-example gradients that users compute themselves: grad_sample_mode="no_op"."""

import opacus
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from tests.test_combinations import CLIPPINGS, Watched

pytestmark = pytest.mark.filterwarnings(
    "ignore:This run has no ledger",
    "ignore:PrivacyEngine detected new dataset",
)


class ByHand(Watched):
    """Per-example gradients by vmap, as users of the mode no_op compute them."""

    def __init__(self, **options):
        super().__init__(grad_sample_mode="no_op", **options)
        self.calls_the_model = False

    def batch(self, x, y):
        def loss(params, one, label):
            out = functional_call(self.net, params, (one[None],))
            return nn.functional.cross_entropy(out, label[None])

        self.optimizer.zero_grad()
        if self.calls_the_model:
            self.criterion(self.forward(x), y).backward()
        parameters = {n: p.detach() for n, p in self.net.named_parameters()}
        found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
        for name, parameter in self.net.named_parameters():
            parameter.grad_sample = found[name]
        self.optimizer.step()


@pytest.mark.parametrize("wrap_model", [True, False])
@pytest.mark.parametrize("managed", [True, False])
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_gradients_made_by_hand(clipping, managed, wrap_model):
    training = ByHand(clipping=clipping, wrap_model=wrap_model, **CLIPPINGS[clipping])
    with pytest.warns(UserWarning, match="without verification"):
        for _ in training.memory_managed(5) if managed else [0]:
            training.train(2)
    assert len(training.check("by_latest").recorder.updates) == 4


@pytest.mark.parametrize("wrap_model", [True, False])
def test_gradients_made_by_hand_beside_a_backward_pass(wrap_model):
    training = ByHand(wrap_model=wrap_model)
    training.calls_the_model = True
    training.train(2).check()


def test_gradients_made_by_hand_of_batches_kept_for_later():
    training = ByHand(poisson_sampling=False)
    with pytest.warns(UserWarning, match="may come from several batches"):
        for x, y in list(training.loader):
            training.batch(x, y)
    assert training.engine.attribution["unattributed"] == 24
    assert not training.recorder.observed


@pytest.mark.parametrize("wrap_model", [True, False])
def test_training_by_hand_is_opacus_own(wrap_model):
    runs = [
        ByHand(engine=engine, wrap_model=wrap_model)
        for engine in (opacus.PrivacyEngine(accountant="rdp"), None)
    ]
    for run in runs:
        torch.manual_seed(1)
        run.train(2)
    for one, other in zip(*(run.net.parameters() for run in runs), strict=True):
        assert torch.equal(one, other)
