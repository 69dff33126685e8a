"""Loops whose gradient is not that of the mean of the criterion are found."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from opacus_pi.attribution import Tracker
from opacus_pi.custody import Chain
from opacus_pi.integration.monitor.gradient_scale import GradientScale
from opacus_pi.recording import AccountingError
from tests.integration.monitor.training import Augmented, monitored, net, small


def train(run, loss, after=lambda run: None):
    run.module.train()
    for x, y in run.loader:
        run.optimizer.zero_grad()
        loss(run.module(x), y).backward()
        after(run)
        run.optimizer.step()


def state(run, name):
    links = {link.name: link for link in run.recorder.ledger.custody.links}
    return links[name].state


@pytest.mark.parametrize("poisson_sampling", [True, False])
@pytest.mark.parametrize("with_dropout_and_batch_norm", [True, False])
def test_the_mean_is_right(with_dropout_and_batch_norm, poisson_sampling):
    run = monitored(
        net() if with_dropout_and_batch_norm else small(),
        Augmented() if with_dropout_and_batch_norm else None,
        poisson_sampling=poisson_sampling,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(run, cross_entropy)
    assert state(run, "loss") == "checked" and state(run, "noise") == "checked"


def summed(outputs, targets):
    return cross_entropy(outputs, targets, reduction="sum")


def halved(outputs, targets):
    return cross_entropy(outputs, targets) / 2


def scaled(run):
    for parameter in run.module.parameters():
        parameter.grad.mul_(3)


def nothing(run):
    pass


@pytest.mark.parametrize(
    "loss, after, ratio",
    [(summed, nothing, "4"), (halved, nothing, "0.5"), (cross_entropy, scaled, "3")],
)
def test_a_multiple_is_refused(loss, after, ratio):
    run = monitored(poisson_sampling=False)
    with pytest.warns(UserWarning, match=f"was {ratio} times that of the mean"):
        train(run, loss, after)
    with pytest.raises(
        AccountingError, match="noise did not have the standard deviation"
    ):
        _ = run.recorder.ledger


def test_another_loss_is_said():
    run = monitored(poisson_sampling=False)
    with pytest.warns(UserWarning, match="not that of the criterion"):
        train(
            run, lambda outputs, y: outputs.square().mean() + cross_entropy(outputs, y)
        )
    assert state(run, "loss") == "unchecked"


def test_another_loss_that_begins_late_is_said():
    run = monitored(poisson_sampling=False)
    num_epochs, calls = 20, []

    def late(outputs, y):
        calls.append(y)
        extra = outputs.square().mean() if len(calls) > 40 else 0.0
        return extra + cross_entropy(outputs, y)

    with pytest.warns(UserWarning, match="not that of the criterion"):
        for _ in range(num_epochs):
            train(run, late)
    assert len(calls) > 40 + 63 and state(run, "loss") == "unchecked"


def test_later_updates_with_the_criterion_raise_no_alarm():
    run = monitored(net(), Augmented(), poisson_sampling=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            train(run, cross_entropy)
    assert state(run, "loss") == "checked" and state(run, "noise") == "checked"


@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_training_is_the_same_to_the_bit(poisson_sampling):
    """The comparison draws nothing and writes nothing."""
    weights = []
    for is_compared in (True, False):
        model = net()
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        run = monitored(model, Augmented(), poisson_sampling=poisson_sampling)
        if not is_compared:
            model._forward_pre_hooks.clear()  # without its arguments no comparison
        train(run, cross_entropy)
        assert (state(run, "loss") == "checked") == is_compared
        values = model.state_dict().values()
        weights.append(torch.cat([value.flatten().double() for value in values]))
    assert torch.equal(*weights)


def test_batches_are_not_kept_for_ever_if_nothing_can_be_compared():
    tracker, module = Tracker(), small()
    scale = GradientScale(module, cross_entropy, tracker, Chain())
    x = torch.ones(2, 1)
    for i in range(100):
        assert tracker.keeps_batches, i
        for _ in range(3):  # several passes, whose gradients are not compared
            scale.before_forward(module, (x,), {})
        assert len(scale._passes) == 2
        scale.compare(list(module.parameters()))
    assert not tracker.keeps_batches
    scale.before_forward(module, (x,), {})
    assert not scale._passes
