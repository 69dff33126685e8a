"""Weights that are written after the last update, and ledgers that are read then."""

import copy
import warnings

import pytest
import torch
from torch import nn

from opacus_pi.accounting import privacy_statement
from tests.private_training import Training

OTHER = "the model had other weights than those that the last recorded update left"


@pytest.fixture
def training():
    return Training().train(1)


def weights_link(training):
    links = training.engine.ledger.custody.links
    return next(link for link in links if link.name == "weights")


def is_said(training):
    link = weights_link(training)
    assert (OTHER in link.sentence) == (link.state == "unchecked")
    return link.state == "unchecked"


def averages(net):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.9)


@pytest.mark.parametrize("read_before", [False, True])
def test_a_head_that_is_replaced_by_class_means(training, read_before):
    assert not (read_before and is_said(training))
    means = torch.stack([x.flatten()[:16].mean() for x, _ in training.data_set])
    with torch.no_grad():
        training.net.out.weight.copy_(means[:16])
    assert is_said(training)
    text = str(privacy_statement([training.engine.ledger], [0], 1e-3))
    assert OTHER in " ".join(text.split())


def test_another_layer(training):
    training.net.out = nn.Linear(16, 3)
    assert is_said(training)


def test_uncounted_writes_that_were_undone(training):
    own = [parameter.clone() for parameter in training.net.parameters()]
    for parameter in training.net.parameters():
        parameter.data.mul_(0.9)
    assert is_said(training)
    for parameter, value in zip(training.net.parameters(), own, strict=True):
        parameter.data.copy_(value)
    assert not is_said(training)


def test_averaged_weights_that_were_loaded_for_an_evaluation(training):
    own = copy.deepcopy(training.net.state_dict())
    other = copy.deepcopy(own)
    other["out.weight"] *= 0.9
    training.net.load_state_dict(other)
    assert is_said(training)
    training.net.load_state_dict(own)
    assert not is_said(training)
    training.train(1)
    assert not is_said(training)


def test_the_weights_of_an_earlier_epoch(training):
    best = copy.deepcopy(training.net.state_dict())
    training.train(1)
    assert not is_said(training)
    training.net.load_state_dict(best)
    assert is_said(training)
    assert "those of an earlier epoch" in weights_link(training).sentence


def test_it_is_said_beside_what_is_known(training):
    averages(training.net)
    with pytest.warns(UserWarning, match="changed between two updates"):
        training.train(1)
    averages(training.net)
    sentence = weights_link(training).sentence
    assert sentence.startswith("Weights were changed between two updates")
    assert OTHER in sentence


def test_reading_is_silent_and_changes_nothing_later(training):
    training.engine.ledger  # noqa: B018
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other weights")
        training.net.out.weight.data.mul_(0.9)
        assert is_said(training)


def test_ordinary_uses_are_not_said(training):
    net, optimizer = training.net, training.optimizer
    x, y = training.data_set[:]
    net.eval()
    net(x)
    net.train()
    assert not is_said(training)
    optimizer.zero_grad()
    training.net.requires_grad_(False).requires_grad_(True)
    copied = copy.deepcopy(net.state_dict())
    net.load_state_dict(copied)
    assert not is_said(training)
    for parameter in net.parameters():  # as ``net.cpu()`` does on an accelerator
        parameter.data = parameter.data.clone()
    assert not is_said(training)
    averages(net)
    assert is_said(training)


def test_weights_that_were_moved_and_then_changed(training):
    for parameter in training.net.parameters():
        parameter.data = 0.9 * parameter.data
    assert is_said(training)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
def test_a_ledger_that_is_read_in_the_middle_of_training(mode):
    training = Training(grad_sample_mode=mode)
    states = []

    def read(x, y):
        if training.recorder.updates:
            states.append(is_said(training))

    training.train(1, read)
    for x, y in training.loader:
        training.optimizer.zero_grad()
        training.criterion(training.forward(x), y).backward()
        read(x, y)
        training.optimizer.step()
        read(x, y)
    assert states
    assert not any(states)


def test_a_ledger_that_is_read_by_a_hook_of_the_step():
    training = Training(recorder=None)
    states = []

    def read(*_):
        states.append(OTHER in weights_of(training))

    training.optimizer.original_optimizer.register_step_post_hook(read)
    training.train(2)
    assert not any(states)


def weights_of(training):
    try:
        return weights_link(training).sentence
    except RuntimeError:
        return ""
