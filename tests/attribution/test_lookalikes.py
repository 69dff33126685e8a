"""Samples that look alike get their own example, or it is said that this is unknown."""

import warnings

import numpy as np
import pytest
import torch

from opacus_pi.attribution import UNATTRIBUTED, Tracker
from opacus_pi.attribution.causes import ALIKE, EQUAL_INPUTS, REPEATED, TRUSTED
from opacus_pi.attribution.lookalikes import Alike, charged, matched, refined
from opacus_pi.custody import Chain

WIDTH = 3


def examples(rng, num, *, kinds=3, classes=2):
    """Inputs of a few kinds only, with labels: many of them look alike."""
    kind = rng.integers(kinds, size=num)
    x = np.random.default_rng(0).normal(size=(kinds, WIDTH))[kind]
    return torch.tensor(x).float(), torch.tensor(rng.integers(classes, size=num))


def passed(tracker, *inputs):
    """The forward pass over some inputs, as the optimizer gets it."""
    tracker.mark_backward(tracker.bind(inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (forward,) = tracker.take_attributed([len(inputs[0])])
    return forward


def clone(x, y, _):
    return x.clone(), y.clone(), np.arange(len(x))


def permuted(x, y, rng):
    order = rng.permutation(len(x))
    return x[order], y[order], order


def swapped(x, y, _):
    order = np.arange(len(x))
    order[-2:] = order[[-1, -2]]
    return x[order], y[order], order


def permuted_in_place(x, y, rng):
    order = rng.permutation(len(x))
    x.copy_(x[order].clone())
    y.copy_(y[order].clone())
    return x, y, order


def swapped_in_place(x, y, rng):
    _, _, order = swapped(x, y, rng)
    x.copy_(x[order].clone())
    y.copy_(y[order].clone())
    return x, y, order


def part(x, y, rng):
    order = rng.permutation(len(x))[: len(x) - 1]
    return x[order], y[order], order


def as_delivered(x, y, _):
    return x, y, np.arange(len(x))


LOOPS = [
    *(clone, permuted, swapped, permuted_in_place, swapped_in_place, part),
    as_delivered,
]


@pytest.mark.parametrize("with_labels", [False, True], ids=["x", "x and y"])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda f: f.__name__)
def test_no_sample_is_taken_for_an_example_with_another_target(loop, with_labels):
    num_unclear = 0
    for seed in range(60):
        rng, tracker = np.random.default_rng(seed), Tracker()
        x, y = examples(rng, 12)
        for start in range(0, 12, 4):
            at = np.arange(start, start + 4)
            a, b = x[at].clone(), y[at].clone()
            tracker.delivered(at.tolist(), (a, b))
            a, b, order = loop(a, b, rng)
            forward = passed(tracker, a, b) if with_labels else passed(tracker, a)
            true, found = at[order], forward.indices
            assert REPEATED.name not in tracker.causes
            unclear = np.zeros(len(found), bool)
            for group in forward.alike:
                unclear[group.rows] = True
                assert sorted(found[group.rows]) == sorted(true[group.rows])
            num_unclear += unclear.sum()
            known = (found != UNATTRIBUTED) & ~unclear
            for i, j in zip(found[known], true[known], strict=True):
                assert torch.equal(x[i], x[j])
                assert y[i] == y[j]
    if loop in (permuted, permuted_in_place):
        assert (num_unclear == 0) == with_labels


def test_copies_in_the_delivered_order_are_told_apart_after_a_while():
    rng, tracker = np.random.default_rng(0), Tracker()
    unclear = []
    for start in range(0, 120, 4):
        x = torch.randn(4, WIDTH)
        x[3] = x[2]
        at = list(range(start, start + 4))
        tracker.delivered(at, (x, torch.arange(4)))
        forward = passed(tracker, clone(x, x, rng)[0])
        assert forward.indices.tolist() == at
        unclear.append(len(forward.alike))
    assert unclear[0] == 1
    assert not any(unclear[8:])
    assert doubts(tracker) == [EQUAL_INPUTS.explanation]


def doubts(tracker):
    chain = Chain()
    tracker.report_to(chain)
    (link,) = [x for x in chain.custody().unchecked if x.name == "identity"] or [None]
    texts = (EQUAL_INPUTS, TRUSTED, ALIKE)
    return [t.explanation for t in texts if link and t.explanation in link.sentence]


@pytest.mark.parametrize("loop", [permuted, permuted_in_place])
def test_a_loop_that_begins_to_permute_is_not_trusted_any_more(loop):
    rng, tracker = np.random.default_rng(1), Tracker()
    for start in range(0, 200, 20):
        x, at = torch.randn(20, WIDTH), list(range(start, start + 20))
        x[7] = x[8]
        y = torch.arange(20)
        tracker.delivered(at, (x, y))
        late = start >= 100
        x, y, _ = (loop if late else clone)(x, y, rng)
        assert bool(passed(tracker, x).alike) == late
    assert doubts(tracker) == [EQUAL_INPUTS.explanation, TRUSTED.explanation]


@pytest.mark.parametrize("rows", [slice(None), slice(2, None), slice(None, None, -1)])
def test_trust_alone_is_no_doubt(rows):
    tracker = Tracker()
    for _ in range(3):
        x = torch.randn(20, WIDTH)
        x[7] = x[9]
        tracker.delivered(list(range(20)), (x, torch.arange(20)))
        order = np.arange(20)[rows].copy()
        has_moved = bool(order[0] > order[-1])
        forward = passed(tracker, x[order])
        assert bool(forward.alike) == has_moved
        assert has_moved or forward.indices.tolist() == order.tolist()
    assert doubts(tracker) == [EQUAL_INPUTS.explanation] * has_moved


def test_examples_that_are_equal_in_everything_are_interchangeable():
    tracker, x = Tracker(), torch.randn(3, WIDTH)
    x[1] = x[2]
    y = torch.tensor([0, 1, 1])
    tracker.delivered([5, 6, 7], (x, y))
    forward = passed(tracker, x[[2, 0, 1]])
    assert forward.indices.tolist() == [6, 5, 7]
    assert not forward.alike
    tracker = Tracker()
    tracker.delivered([1, 2, 3], (x, y, ["text", "that", "differs"]))
    assert passed(tracker, x[[2, 0, 1]]).alike


def test_an_earlier_batch_does_not_make_copies_repeated():
    tracker, x = Tracker(), torch.randn(3, WIDTH)
    tracker.delivered([0, 1, 2], (x, torch.arange(3)))
    twice = x[[0, 0, 1]]
    tracker.delivered([3, 4, 5], (twice, torch.arange(3)))
    forward = passed(tracker, twice[[1, 2, 0]])
    assert sorted(forward.indices.tolist()) == [3, 4, 5]
    assert set(tracker.causes) == {EQUAL_INPUTS.name}
    alike = x[[0, 0, 0]]
    tracker.delivered([6, 7, 8], (alike, torch.arange(3)))
    assert passed(tracker, alike.clone()).indices.tolist() == [6, 7, 8]


def test_rows_that_were_really_repeated_are_repeated():
    tracker, x = Tracker(), torch.randn(3, WIDTH)
    x[1] = x[0]
    tracker.delivered([0, 1, 2], (x, torch.arange(3)))
    passed(tracker, x[[0, 0, 1]])
    assert REPEATED.name in tracker.causes


def test_a_second_input_distinguishes():
    tracker, x, u = Tracker(), torch.randn(3, WIDTH), torch.randn(3, 2)
    x[1] = x[2]
    tracker.delivered([0, 1, 2], (x, u))
    forward = passed(tracker, x[[2, 0, 1]], u[[2, 0, 1]])
    assert forward.indices.tolist() == [2, 0, 1]
    assert not forward.alike


def test_matching_uses_every_sample_once():
    found = matched(np.array([7, 7, 3, 9]), np.array([7, 3, 7, 5]))
    assert found.positions.tolist() == [-2, -2, 1, -1]
    (group,) = found.groups
    assert (group.rows.tolist(), group.places.tolist()) == ([0, 1], [0, 2])
    (group,) = refined([group], np.array([2, 2, 0, 0]), np.array([2, 0, 2, 0]))
    assert group.rows.tolist() == [0, 1]
    assert refined([group], np.array([2, 1, 0, 0]), np.array([2, 0, 2, 0])) is None


def test_the_largest_norm_of_each_group_is_charged():
    class Pass:
        def __init__(self, num, *groups, copies=()):
            self.num_samples = num
            self.alike = tuple(Alike(np.array(g), np.array(g)) for g in groups)
            self.copies = tuple(Alike(np.array(g), np.array(g)) for g in copies)

    norms = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0])
    passes = [Pass(3, [0, 2]), Pass(2, [0, 1])]
    found = charged(norms, passes)
    assert found.norms.tolist() == [2.0, 3.0, 2.0, 5.0, 5.0]
    assert found.differ is None
    assert charged(norms, [Pass(5)]).norms is norms
    found = charged(norms, [Pass(3), Pass(2, copies=[[0, 1]])])
    assert found.norms.tolist() == [1.0, 3.0, 2.0, 5.0, 5.0]
    assert found.differ.tolist() == [False] * 3 + [True] * 2
    found = charged(norms, [Pass(5, [0, 1], copies=[[1, 2], [3, 4]])])
    assert found.norms.tolist() == [3.0, 3.0, 3.0, 5.0, 5.0]
    close = torch.tensor([1.0, 1.0001, 1e-9, 3e-9])
    found = charged(close, [Pass(4, copies=[[0, 1], [2, 3]])])
    assert found.norms.tolist() == close[[1, 1, 3, 3]].tolist()
    assert not found.differ.any()
