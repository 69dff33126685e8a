"""Targets of a loss, compared with the delivered samples of the forward pass."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from opacus_pi.attribution import TargetOrder, Tracker
from opacus_pi.custody import Chain


def state_after(batches, change, inputs=lambda x: x):
    """Return the link "rows" and the warnings of a loop that changes its targets.

    Args:
        batches: Pairs of inputs and targets.
        change: What the loop does to the targets.
        inputs: What it does to the inputs.
    """
    tracker, chain = Tracker(), Chain()
    order, number = TargetOrder(tracker, chain), 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in batches:
            tracker.delivered(list(range(number, number + len(y))), (x, y))
            number += len(y)
            forward = tracker.bind(inputs(x))
            order.saw(change(y))
            tracker.mark_backward(forward)
            tracker.attribute([len(y)])
            tracker.end_update()
        tracker.report_to(chain)
    (link,) = [link for link in chain.custody().links if link.name == "rows"]
    return link, [str(warning.message) for warning in caught]


def batches_of(targets, size=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(len(y), 5, generator=generator), y) for y in targets.split(size)
    ]


CLASSES = torch.tensor([0, 1, 1, 2, 2, 0, 1, 1, 0, 2, 0, 1])
NUMBERS = torch.linspace(-1, 1, 12) ** 3
BINARY = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 1, 1])
TOKENS = torch.arange(60).reshape(12, 5) % 7


@pytest.mark.parametrize(
    ("targets", "change"),
    [
        (CLASSES, lambda y: y),
        (CLASSES, lambda y: y.clone()),
        (CLASSES, lambda y: y.double()),
        (CLASSES, lambda y: y.unsqueeze(1)),
        (CLASSES, lambda y: F.one_hot(y, 3)),
        (CLASSES, lambda y: 0.9 * F.one_hot(y, 3).float() + 0.1 / 3),
        (F.one_hot(CLASSES, 3).float(), lambda y: y.argmax(1)),
        (NUMBERS, lambda y: y.clone().unsqueeze(1)),
        (NUMBERS[:, None], lambda y: y.squeeze(1)),
        (TOKENS, lambda y: y.flatten()),
        (TOKENS, lambda y: y[:, 1:].reshape(-1)),
    ],
)
def test_targets_in_order_are_checked_without_a_word(targets, change):
    link, said = state_after(batches_of(targets), change)
    assert (link.state, said) == ("checked", [])


@pytest.mark.parametrize(
    ("targets", "change"),
    [
        (CLASSES, lambda y: y.roll(1)),
        (CLASSES, lambda y: F.one_hot(y, 3).roll(1, 0)),
        (F.one_hot(CLASSES, 3).float(), lambda y: y.argmax(1).roll(1)),
        (NUMBERS, lambda y: y.flip(0)),
        (NUMBERS, lambda y: y.copy_(y.flip(0))),
        (TOKENS, lambda y: y.roll(1, 0).flatten()),
        (TOKENS, lambda y: y.roll(1, 0)[:, 1:].reshape(-1)),
    ],
)
def test_targets_in_another_order_break_the_link(targets, change):
    link, _ = state_after(batches_of(targets.clone()), change)
    assert link.state == "broken"
    assert "in another order than the model's inputs" in link.sentence


def test_inputs_in_another_order_than_their_targets_break_the_link():
    link, _ = state_after(batches_of(NUMBERS), lambda y: y, lambda x: x.flip(0))
    assert link.state == "broken"


def test_inputs_and_targets_in_the_same_other_order_are_checked():
    flipped = lambda y: y.flip(0)  # noqa: E731
    link, said = state_after(batches_of(NUMBERS), flipped, flipped)
    assert (link.state, said) == ("checked", [])


@pytest.mark.parametrize(
    ("targets", "change", "words"),
    [
        (BINARY, lambda y: 1 - y, "relabelled the samples"),
        (NUMBERS, lambda y: 2 * y + 1, "computed the targets"),
    ],
)
def test_other_targets_are_said_once_and_not_refused(targets, change, words):
    link, said = state_after(batches_of(targets), change)
    assert link.state == "unchecked"
    assert words in link.sentence
    assert len(said) == 1


def one_hot(y):
    return F.one_hot(y, 3).float() if y.dim() == 1 else y


@pytest.mark.parametrize("targets", [CLASSES, F.one_hot(CLASSES, 3).float()])
@pytest.mark.parametrize(
    "change",
    [
        lambda y: 0.8 * one_hot(y) + 0.2 * one_hot(y).mean(0),
        lambda y: 0.8 * one_hot(y) + 0.2 * one_hot(y).roll(1, 0),
        lambda y: 0.8 * one_hot(y) + 0.2 * torch.rand(len(y), 1) * one_hot(y),
    ],
    ids=["mean of the batch", "neighbour", "amount of each example"],
)
def test_soft_targets_of_one_class_that_differ_are_said(targets, change):
    link, said = state_after(batches_of(targets), change)
    assert link.state == "unchecked" and len(said) == 1
    assert "computed from several examples, such as by the mean" in link.sentence


def test_constant_smoothing_of_many_batches_is_checked():
    labels = torch.arange(400) % 3
    link, said = state_after(
        batches_of(labels, 7), lambda y: 0.7 * one_hot(y) + torch.tensor([0.2, 0.1, 0])
    )
    assert (link.state, said) == ("checked", [])


def test_a_pass_whose_loss_was_computed_is_not_compared():
    tracker = Tracker()
    tracker.delivered([0, 1], torch.eye(2))
    forward = tracker.bind(torch.eye(2))
    assert tracker.awaiting_backward() == [forward]
    tracker.mark_backward(forward)
    assert tracker.awaiting_backward() == []
